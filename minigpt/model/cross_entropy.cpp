// Rows of logits to log-probabilities, and to their own gradients, on a CPU.
//
// A row is read once from memory; everything else happens in the core's cache. Sums are taken in float32 by one thread in
// a fixed order. It uses nothing of torch: cross_entropy.py hands over addresses.
//
// Shapes: N rows, V vocabulary.

#include "vectors.h"

#include <vector>

extern "C" struct Arguments {
    const void* logits;  // [N, V], float or bfloat16
    void* to;            // [N, V]: their gradients; may be the same memory
    int64_t N, V, is_bf16, threads;
    const int64_t* labels;  // [N]
    float temperature;
    float* log_probs;  // [N], of the labels
    float* log_sums;   // [N]: log Σ exp(logit / temperature)
    float* entropies;  // [N] or null
    // Upstream gradients. `softmax_stats` writes the logits' gradients if grads is given.
    const float* grads;          // [N] of the log-probabilities
    const float* entropy_grads;  // [N] of the entropies, or null
};

constexpr float NOTHING = -1e30f;  // a logit behind the last one: e to its power is 0, and 0 times it is 0

// logits / temperature of a row, filled up to whole vectors.
template <class T>
static const float* temper(const T* logits, int64_t V, float temperature) {
    static thread_local std::vector<float> row;
    row.resize(round_up(V, W));
    read(logits, V, 1 / temperature, row.data());
    std::fill(row.begin() + V, row.end(), NOTHING);
    return row.data();
}

static float log_sum_exp(const float* x, int64_t V) {
    vec most = vec{} + NOTHING;
    for (int64_t i = 0; i < V; i += W) {
        vec v = load(x + i);
        most = v > most ? v : most;
    }
    const float peak = greatest(most);
    vec sums[2] = {};  // two, since each addition waits for the one before
    for (int64_t i = 0; i < V; i += W) sums[(i / W) & 1] += exp(load(x + i) - peak);
    return peak + std::log(sum(sums[0] + sums[1]));
}

// −Σ p log p; not log Σ − Σ p · logit, where two large numbers would cancel if the model is sure.
static float entropy_of(const float* x, int64_t V, float log_sum) {
    vec sums = {};
    for (int64_t i = 0; i < V; i += W) {
        const vec log_p = load(x + i) - log_sum;
        sums -= exp(log_p) * log_p;
    }
    return sum(sums);
}

// d/d logit of grad · log p(label) + entropy_grad · entropy: (label − p) grad − p (log p + entropy) entropy_grad.
template <class T>
static void write_gradient(const float* x, int64_t V, int64_t label, float log_sum, float grad, float entropy,
                           float entropy_grad, float temperature, T* to) {
    const float factor = 1 / temperature;
    float out[W];
    for (int64_t i = 0; i < V; i += W) {
        const vec log_p = load(x + i) - log_sum;
        vec slope = vec{} + grad;
        if (entropy_grad != 0) slope += entropy_grad * (log_p + entropy);
        store(out, exp(log_p) * slope * -factor);
        if (label >= i && label < i + W) out[label - i] += grad * factor;
        if (i + W <= V)
            store(to + i, load(out));
        else
            write(out, V - i, 1, to + i);
    }
}

template <class T>
static void softmax_stats_row(const Arguments& a, int64_t n) {
    const float* x = temper((const T*)a.logits + n * a.V, a.V, a.temperature);
    T* to = (T*)a.to + n * a.V;
    const float log_sum = log_sum_exp(x, a.V);
    a.log_sums[n] = log_sum;
    a.log_probs[n] = x[a.labels[n]] - log_sum;
    if (a.entropies) a.entropies[n] = entropy_of(x, a.V, log_sum);
    if (a.grads) write_gradient(x, a.V, a.labels[n], log_sum, a.grads[n], 0, 0, a.temperature, to);
}

template <class T>
static void grad_logits_row(const Arguments& a, int64_t n) {
    const float* x = temper((const T*)a.logits + n * a.V, a.V, a.temperature);
    T* to = (T*)a.to + n * a.V;
    const float entropy = a.entropies ? a.entropies[n] : 0, entropy_grad = a.entropy_grads ? a.entropy_grads[n] : 0;
    write_gradient(x, a.V, a.labels[n], a.log_sums[n], a.grads[n], entropy, entropy_grad, a.temperature, to);
}

// From the logits: log_probs, log_sums, entropies if asked for, and the gradients of `grads` if given.
extern "C" void softmax_stats(const Arguments* a) {
#pragma omp parallel for num_threads(a->threads)
    for (int64_t n = 0; n < a->N; n++) a->is_bf16 ? softmax_stats_row<bf16>(*a, n) : softmax_stats_row<float>(*a, n);
}

// From the logits, log_sums and upstream gradients: the gradients of the logits.
extern "C" void grad_logits(const Arguments* a) {
#pragma omp parallel for num_threads(a->threads)
    for (int64_t n = 0; n < a->N; n++) a->is_bf16 ? grad_logits_row<bf16>(*a, n) : grad_logits_row<float>(*a, n);
}
