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
static float* temper(const T* logits, int64_t V, float temperature) {
    static thread_local std::vector<float> row;
    row.resize(round_up(V, W));
    read(logits, V, 1 / temperature, row.data());
    std::fill(row.begin() + V, row.end(), NOTHING);
    return row.data();
}

static float greatest(const float* x, int64_t V) {
    vec most = vec{} + NOTHING;
    for (int64_t i = 0; i < V; i += W) {
        const vec v = load(x + i);
        most = v > most ? v : most;
    }
    return greatest(most);
}

struct Softmax {
    float log_total, total;  // of e^(x - peak)
    float distance;          // Σ e^(x - peak) (peak - x)
};

// x to e^(x - peak). Ones are counted and only the others summed: where the model is sure they are too small for a sum
// that begins with 1.
static Softmax soften(float* x, int64_t V, float peak) {
    const vec one = vec{} + 1.0f;
    vec ones = {}, sums[2] = {}, distances = {};
    for (int64_t i = 0; i < V; i += W) {
        const vec below = load(x + i) - peak, weights = exp(below);
        store(x + i, weights);
        ones += below == 0.0f ? one : vec{};
        sums[(i / W) & 1] += below == 0.0f ? vec{} : weights;
        distances -= weights * below;
    }
    const float count = sum(ones), rest = sum(sums[0] + sums[1]);
    return {std::log(count) + std::log1p(rest / count), count + rest, sum(distances)};
}

template <class T>
static void softmax_stats_row(const Arguments& a, int64_t n) {
    const int64_t label = a.labels[n];
    float* x = temper((const T*)a.logits + n * a.V, a.V, a.temperature);
    const float of_label = x[label], peak = greatest(x, a.V);
    const auto [log_total, total, distance] = soften(x, a.V, peak);
    a.log_sums[n] = peak + log_total;
    a.log_probs[n] = of_label - peak - log_total;
    // log Σ + Σ p (peak - logit), neither below 0: in −Σ p · logit large numbers would cancel if the model is sure
    if (a.entropies) a.entropies[n] = log_total + distance / total;
    if (!a.grads) return;
    const float factor = a.grads[n] / a.temperature;  // times (1 of the label - p)
    T* to = (T*)a.to + n * a.V;
    write(x, a.V, -factor / total, to);
    const float gradient = factor - factor / total * x[label];
    write(&gradient, 1, 1, to + label);
}

// d/d logit of grad · log p(label) + entropy_grad · entropy: (label − p) grad − p (log p + entropy) entropy_grad.
template <class T>
static void grad_logits_row(const Arguments& a, int64_t n) {
    const float entropy = a.entropies ? a.entropies[n] : 0, entropy_grad = a.entropy_grads ? a.entropy_grads[n] : 0;
    const float factor = 1 / a.temperature, grad = a.grads[n], log_sum = a.log_sums[n];
    float* x = temper((const T*)a.logits + n * a.V, a.V, a.temperature);
    for (int64_t i = 0; i < a.V; i += W) {
        const vec log_p = load(x + i) - log_sum;
        vec slope = vec{} + grad;
        if (entropy_grad != 0) slope += entropy_grad * (log_p + entropy);
        store(x + i, exp(log_p) * slope * -factor);
    }
    x[a.labels[n]] += grad * factor;
    write(x, a.V, 1, (T*)a.to + n * a.V);
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
