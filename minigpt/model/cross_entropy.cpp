// Rows of logits to log-probabilities, and to their own gradients, on a CPU.
//
// A row is read once from memory; everything else happens in the core's cache. Sums are taken in float32 by one thread in
// a fixed order. It uses nothing of torch: cross_entropy.py hands over addresses.
//
// Shapes: N rows, V vocabulary.

#include "vectors.h"

#include <vector>

extern "C" struct Judgement {
    const void* logits;  // [N, V], float or bfloat16
    void* to;            // [N, V]: their gradients; may be the same memory
    int64_t N, V, is_bf16, threads;
    const int64_t* labels;  // [N]
    float temperature;
    float* log_probs;  // [N], of the labels
    float* log_sums;   // [N]: log Σ exp(logit / temperature)
    float* entropies;  // [N] or null
    // Upstream gradients. `judge` writes the logits' gradients if grads is given.
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
static void judge_row(const Judgement& j, int64_t n) {
    const float* x = temper((const T*)j.logits + n * j.V, j.V, j.temperature);
    T* to = (T*)j.to + n * j.V;
    const float log_sum = log_sum_exp(x, j.V);
    j.log_sums[n] = log_sum;
    j.log_probs[n] = x[j.labels[n]] - log_sum;
    if (j.entropies) j.entropies[n] = entropy_of(x, j.V, log_sum);
    if (j.grads) write_gradient(x, j.V, j.labels[n], log_sum, j.grads[n], 0, 0, j.temperature, to);
}

template <class T>
static void differentiate_row(const Judgement& j, int64_t n) {
    const float* x = temper((const T*)j.logits + n * j.V, j.V, j.temperature);
    T* to = (T*)j.to + n * j.V;
    const float entropy = j.entropies ? j.entropies[n] : 0, entropy_grad = j.entropy_grads ? j.entropy_grads[n] : 0;
    write_gradient(x, j.V, j.labels[n], j.log_sums[n], j.grads[n], entropy, entropy_grad, j.temperature, to);
}

// From the logits: log_probs, log_sums, entropies if asked for, and the gradients of `grads` if given.
extern "C" void judge(const Judgement* j) {
#pragma omp parallel for num_threads(j->threads)
    for (int64_t n = 0; n < j->N; n++) j->is_bf16 ? judge_row<bf16>(*j, n) : judge_row<float>(*j, n);
}

// From the logits, log_sums and upstream gradients: the gradients of the logits.
extern "C" void differentiate(const Judgement* j) {
#pragma omp parallel for num_threads(j->threads)
    for (int64_t n = 0; n < j->N; n++) j->is_bf16 ? differentiate_row<bf16>(*j, n) : differentiate_row<float>(*j, n);
}
