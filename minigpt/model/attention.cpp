// Causal attention within the documents of packed rows, on a CPU, forward and backward.
//
// A task is a document and a key/value head: its keys and values are brought once into float32 panels, which stay in the
// core's cache while the queries come by, TILE at a time. Scores exist for these queries only; what lies behind a
// query, or in another document, is neither read nor computed. Everything is summed in float32 by one thread in a fixed
// order, so a document's result depends on nothing but itself.
//
// The formulas are those of FlashAttention-2 (arXiv:2307.08691, section 3.1) without its tiling over keys: with
// P = softmax(s q k^T), o = P v and the row sums d = Σ do · o it is dv = P^T do, ds = P (do v^T − d), dq = s ds k,
// dk = s ds^T q. It uses nothing of torch: attention.py hands over addresses.
//
// Shapes: L tokens of a document, H query heads, G key/value heads, D head size.

#include "vectors.h"

#include <vector>

constexpr int TILE = 8;  // queries that come by together; a multiple of ROWS

extern "C" {

struct Heads {  // [tokens, heads, D], steps counted in numbers
    const void* data;
    int64_t token, head;
};

struct Attention {
    const int32_t* edges;  // [documents + 1]
    int64_t documents, H, G, D, is_bf16, threads;
    Heads q, k, v;
    void* out;        // [tokens, H, D]
    float* log_sums;  // [tokens, H]: log Σ exp of the scores
    Heads grad;       // of out; from here on only for the backward pass
    void *dq, *dk, *dv;
};
}

template <class T>
static inline const T* vector_at(const Heads& x, int64_t token, int64_t head) {
    return (const T*)x.data + token * x.token + head * x.head;
}

// Panels for products of one document: [panel][row][COLUMNS], as `multiply` reads them.
struct Panels {
    std::vector<float> memory;
    int64_t size = 0;

    float* operator[](int64_t panel) { return memory.data() + panel * size; }

    // The tokens as columns: a panel holds COLUMNS of them, its rows are the D channels.
    template <class T>
    void tokens(const Heads& x, int64_t start, int64_t L, int64_t head, int64_t D) {
        size = D * COLUMNS;
        memory.resize(round_up(L, COLUMNS) / COLUMNS * size);
        for (int64_t p = 0; p * COLUMNS < L; p++) {
            const int64_t here = std::min<int64_t>(COLUMNS, L - p * COLUMNS);
            const T* columns[COLUMNS];
            for (int64_t t = 0; t < here; t++) columns[t] = vector_at<T>(x, start + p * COLUMNS + t, head);
            float* to = (*this)[p];
            for (int64_t d = 0; d < D; d++, to += COLUMNS) {
                for (int64_t t = 0; t < here; t++) to[t] = widened(columns[t][d]);
                for (int64_t t = here; t < COLUMNS; t++) to[t] = 0;
            }
        }
    }

    // The channels as columns: a panel holds COLUMNS of them, its rows are the L tokens.
    template <class T>
    void channels(const Heads& x, int64_t start, int64_t L, int64_t head, int64_t D) {
        size = L * COLUMNS;
        memory.resize(round_up(D, COLUMNS) / COLUMNS * size);
        for (int64_t p = 0; p * COLUMNS < D; p++) {
            const int64_t here = std::min<int64_t>(COLUMNS, D - p * COLUMNS);
            float* to = (*this)[p];
            for (int64_t t = 0; t < L; t++, to += COLUMNS) {
                read(vector_at<T>(x, start + t, head) + p * COLUMNS, here, 1, to);
                for (int64_t d = here; d < COLUMNS; d++) to[d] = 0;
            }
        }
    }
};

// TILE rows of floats, `stride` apart.
struct Rows {
    std::vector<float> memory;
    int64_t stride = 0;

    void resize(int64_t width) { stride = width, memory.assign(TILE * width, 0); }
    float* operator[](int64_t row) { return memory.data() + row * stride; }

    // Those of tokens `start` to `start + count - 1`, times a factor; 0 in the rows behind.
    template <class T>
    void fill(const Heads& x, int64_t start, int64_t count, int64_t head, int64_t D, float factor) {
        for (int64_t r = 0; r < count; r++) read(vector_at<T>(x, start + r, head), D, factor, (*this)[r]);
        for (int64_t r = count; r < TILE; r++) std::fill((*this)[r], (*this)[r] + D, 0.0f);
    }

    // The first `count` of these times the first `panels` panels of `width` rows, into the columns of `to`.
    void times(Panels& other, int64_t panels, int64_t width, int64_t count, Rows& to) {
        for (int64_t p = 0; p < panels; p++)
            for (int64_t row = 0; row < count; row += ROWS)
                multiply<ROWS>(memory.data(), stride, row, width, other[p], [&](int64_t r, vec left, vec right) {
                    store(to[r] + p * COLUMNS, left);
                    store(to[r] + p * COLUMNS + W, right);
                });
    }
};

template <int... I>
static constexpr ints numbers(std::integer_sequence<int, I...>) { return ints{I...}; }
static const ints LANES = numbers(std::make_integer_sequence<int, W>());  // 0, 1, 2, …

// Scores to weights e^(score - greatest score), 0 behind the first `visible` of `width`; returns log Σ e^score and
// the factor that makes the weights sum to 1.
static inline float soften(float* scores, int64_t visible, int64_t width, float& factor) {
    vec most = vec{} - INFINITY;
    for (int64_t t = 0; t < width; t += W) {
        vec x = LANES + (int32_t)t < (int32_t)visible ? load(scores + t) : vec{} - INFINITY;
        store(scores + t, x);
        most = x > most ? x : most;
    }
    const float peak = greatest(most);
    const float total = exponentiate(scores, width, peak);
    factor = 1 / total;
    return peak + std::log(total);
}

// to[t] += Σ_r weights[r][t] · rows[r] for the first `tokens` tokens; `to` is [tokens, stride of rows].
static void add_transposed_product(Rows& weights, Rows& rows, int64_t tokens, float* to) {
    for (int64_t column = 0; column < rows.stride; column += COLUMNS)
        for (int64_t t = 0; t < tokens; t += ROWS) {
            vec sums[ROWS][2];
            float* at = to + t * rows.stride + column;
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
                sums[i][0] = load(at + i * rows.stride), sums[i][1] = load(at + i * rows.stride + W);
            for (int r = 0; r < TILE; r++) {
                const vec left = load(rows[r] + column), right = load(rows[r] + column + W);
                const float* factors = weights[r] + t;
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) sums[i][0] += factors[i] * left, sums[i][1] += factors[i] * right;
            }
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
                store(at + i * rows.stride, sums[i][0]), store(at + i * rows.stride + W, sums[i][1]);
        }
}

template <class T>
static void attend(const Attention& a, int64_t start, int64_t L, int64_t g) {
    static thread_local Panels keys, values;
    static thread_local Rows queries, scores, mixed;
    const int64_t D = a.D, channel_panels = round_up(D, COLUMNS) / COLUMNS, group = a.H / a.G;
    keys.tokens<T>(a.k, start, L, g, D);
    values.channels<T>(a.v, start, L, g, D);
    queries.resize(D), scores.resize(round_up(L, COLUMNS)), mixed.resize(channel_panels * COLUMNS);
    for (int64_t h = g * group; h < (g + 1) * group; h++)
        for (int64_t i = 0; i < L; i += TILE) {
            const int64_t count = std::min<int64_t>(TILE, L - i), seen = i + count;
            const int64_t panels = round_up(seen, COLUMNS) / COLUMNS;
            float factors[TILE];
            queries.fill<T>(a.q, start + i, count, h, D, 1 / std::sqrt((float)D));
            queries.times(keys, panels, D, count, scores);
            for (int64_t r = 0; r < count; r++)
                a.log_sums[(start + i + r) * a.H + h] = soften(scores[r], i + r + 1, round_up(seen, W), factors[r]);
            scores.times(values, channel_panels, seen, count, mixed);
            for (int64_t r = 0; r < count; r++)
                write(mixed[r], D, factors[r], (T*)a.out + ((start + i + r) * a.H + h) * D);
        }
}

template <class T>
static void attend_backward(const Attention& a, int64_t start, int64_t L, int64_t g) {
    static thread_local Panels key_columns, value_columns, key_channels;
    static thread_local Rows queries, grads, weights, slopes, mixed;
    static thread_local std::vector<float> dk, dv;
    const int64_t D = a.D, channel_panels = round_up(D, COLUMNS) / COLUMNS, group = a.H / a.G;
    const int64_t stride = channel_panels * COLUMNS;
    const float scale = 1 / std::sqrt((float)D);
    const Heads out = {a.out, a.H * D, D};
    key_columns.tokens<T>(a.k, start, L, g, D);
    value_columns.tokens<T>(a.v, start, L, g, D);
    key_channels.channels<T>(a.k, start, L, g, D);
    queries.resize(stride), grads.resize(stride), mixed.resize(stride);
    weights.resize(round_up(L, COLUMNS)), slopes.resize(round_up(L, COLUMNS));
    dk.assign(round_up(L, ROWS) * stride, 0), dv.assign(round_up(L, ROWS) * stride, 0);
    for (int64_t h = g * group; h < (g + 1) * group; h++)
        for (int64_t i = 0; i < L; i += TILE) {
            const int64_t count = std::min<int64_t>(TILE, L - i), seen = i + count;
            const int64_t panels = round_up(seen, COLUMNS) / COLUMNS;
            queries.fill<T>(a.q, start + i, count, h, D, scale);
            grads.fill<T>(a.grad, start + i, count, h, D, 1);
            queries.times(key_columns, panels, D, count, weights);
            grads.times(value_columns, panels, D, count, slopes);
            for (int64_t r = 0; r < TILE; r++) {
                const int64_t token = start + i + r, visible = r < count ? i + r + 1 : 0;
                float log_sum = 0, dot = 0;
                if (visible) {
                    vec products = {};
                    read(vector_at<T>(out, token, h), D, 1, mixed[r]);
                    for (int64_t d = 0; d < stride; d += W) products += load(mixed[r] + d) * load(grads[r] + d);
                    dot = sum(products);
                    log_sum = a.log_sums[token * a.H + h];
                }
                for (int64_t t = 0; t < panels * COLUMNS; t += W) {
                    const ints is_seen = LANES + (int32_t)t < (int32_t)visible;
                    const vec p = is_seen ? exp(load(weights[r] + t) - log_sum) : vec{};
                    store(weights[r] + t, p);
                    store(slopes[r] + t, is_seen ? p * (load(slopes[r] + t) - dot) : vec{});
                }
            }
            slopes.times(key_channels, channel_panels, seen, count, mixed);
            for (int64_t r = 0; r < count; r++)
                write(mixed[r], D, scale, (T*)a.dq + ((start + i + r) * a.H + h) * D);
            add_transposed_product(weights, grads, seen, dv.data());
            add_transposed_product(slopes, queries, seen, dk.data());
        }
    for (int64_t t = 0; t < L; t++) {
        write(dk.data() + t * stride, D, 1, (T*)a.dk + ((start + t) * a.G + g) * D);
        write(dv.data() + t * stride, D, 1, (T*)a.dv + ((start + t) * a.G + g) * D);
    }
}

template <class Task>
static void each_document(const Attention& a, Task task) {
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t n = 0; n < a.documents * a.G; n++) {
        const int64_t document = n / a.G, start = a.edges[document], L = a.edges[document + 1] - start;
        if (L > 0) task(start, L, n % a.G);
    }
}

extern "C" void attention_forward(const Attention* a) {
    each_document(*a, [&](int64_t start, int64_t L, int64_t g) {
        a->is_bf16 ? attend<bf16>(*a, start, L, g) : attend<float>(*a, start, L, g);
    });
}

extern "C" void attention_backward(const Attention* a) {
    each_document(*a, [&](int64_t start, int64_t L, int64_t g) {
        a->is_bf16 ? attend_backward<bf16>(*a, start, L, g) : attend_backward<float>(*a, start, L, g);
    });
}
