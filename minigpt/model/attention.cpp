// Causal attention within the documents of packed rows, on a CPU, forward and backward.
//
// A task is a document and a key/value head: its keys and values are brought once into panels, which stay in the core's
// cache while the queries come by, a few at a time. Scores exist for these queries only; of what lies behind a query, or
// in another document, nothing is computed but what fills up a vector or a tile. Everything is summed in float32 by one
// thread in a fixed order, so a document's result depends on nothing but itself.
//
// In bfloat16 the products are computed by tiles, where the processor has them. Factors of products are then rounded to
// bfloat16, the weights P and the gradients ds too, as flash attention does it on a GPU. Elsewhere they are float32.
//
// The formulas are those of FlashAttention-2 (arXiv:2307.08691, section 3.1) without its tiling over keys: with
// P = softmax(s q k^T), o = P v and the row sums d = Σ do · o it is dv = P^T do, ds = P (do v^T − d), dq = s ds k,
// dk = s ds^T q. It uses nothing of torch: attention.py hands over addresses.
//
// Shapes: L tokens of a document, H query heads, G key/value heads, D head size.

#include "tiles.h"

#include <vector>

constexpr int BATCH = 8;  // queries that come by together; a multiple of ROWS

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

// BATCH rows of floats, `stride` apart.
struct Rows {
    std::vector<float> memory;
    int64_t stride = 0;

    void resize(int64_t width) { stride = width, memory.assign(BATCH * width, 0); }
    float* operator[](int64_t row) { return memory.data() + row * stride; }

    // Those of tokens `start` to `start + count - 1`, times a factor; 0 in the rows behind.
    template <class T>
    void fill(const Heads& x, int64_t start, int64_t count, int64_t head, int64_t D, float factor) {
        for (int64_t r = 0; r < count; r++) read(vector_at<T>(x, start + r, head), D, factor, (*this)[r]);
        for (int64_t r = count; r < BATCH; r++) std::fill((*this)[r], (*this)[r] + D, 0.0f);
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
            for (int r = 0; r < BATCH; r++) {
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
        for (int64_t i = 0; i < L; i += BATCH) {
            const int64_t count = std::min<int64_t>(BATCH, L - i), seen = i + count;
            const int64_t panels = round_up(seen, COLUMNS) / COLUMNS;
            float factors[BATCH];
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
        for (int64_t i = 0; i < L; i += BATCH) {
            const int64_t count = std::min<int64_t>(BATCH, L - i), seen = i + count;
            const int64_t panels = round_up(seen, COLUMNS) / COLUMNS;
            queries.fill<T>(a.q, start + i, count, h, D, scale);
            grads.fill<T>(a.grad, start + i, count, h, D, 1);
            queries.times(key_columns, panels, D, count, weights);
            grads.times(value_columns, panels, D, count, slopes);
            for (int64_t r = 0; r < BATCH; r++) {
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

// ----------------------------------------------------------------------------------------------------------- by tiles

#if TILES
constexpr int STRIP = 2 * TILE;  // rows that come by together: queries of a group's heads, token by token
constexpr int PANEL = 2 * TILE;  // columns of a panel of pairs

// What a task keeps for the next one, in whole lines of the cache, as tiles are read.
template <class X>
struct Scratch {
    struct alignas(64) Line { X numbers[64 / sizeof(X)]; };
    std::vector<Line> lines;

    X* of(int64_t count) {
        lines.resize(std::max<size_t>(lines.size(), round_up(count * sizeof(X), 64) / 64));
        return lines[0].numbers;
    }
};

// Registers of pairs: 2 W numbers in bfloat16.
static inline void store(bf16* to, words pairs) { std::memcpy(to, &pairs, sizeof pairs); }
static inline words load_some(const bf16* from, int64_t count) {  // 0 behind the first `count`
    return (words)_mm512_maskz_loadu_epi16(count >= 2 * W ? ~0u : (1u << count) - 1, from);
}
static inline words narrowed(vec a, vec b) { return (words)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
// a0 b0 a1 b1 … with ties away from 0: takes half the time of `narrowed` and a permutation.
static inline words zipped(vec a, vec b) {
    return (((words)a + 0x8000) >> 16) | (((words)b + 0x8000) & 0xffff0000u);
}

// 2^x to about 3e-6 of its value, which is enough for what is rounded to bfloat16: 2^floor(x) times a polynomial.
constexpr float LOG2_E = 1.44269504f;
static inline vec exp2(vec x) {
    const vec r = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    vec p = vec{} + 0.013426811f;
    for (float c : {0.052242048f, 0.24128065f, 0.6930447f, 1.0f}) p = p * r + c;
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}

typedef uint16_t shorts __attribute__((vector_size(4 * W)));
template <int... I>
static inline words zipped(words a, words b, int first, std::integer_sequence<int, I...>) {
    return (words)(first ? __builtin_shufflevector((shorts)a, (shorts)b, (W + I / 2 + I % 2 * 2 * W)...)
                         : __builtin_shufflevector((shorts)a, (shorts)b, (I / 2 + I % 2 * 2 * W)...));
}
// a0 b0 a1 b1 …, from number `first`, 0 or W, on.
static inline words zipped(words a, words b, int first) {
    return zipped(a, b, first, std::make_integer_sequence<int, 2 * W>());
}
template <int... I>
static inline words halves_zipped(words a, std::integer_sequence<int, I...>) {
    return (words)__builtin_shufflevector((shorts)a, (shorts)a, (I / 2 + I % 2 * W)...);
}
static inline words halves_zipped(words a) { return halves_zipped(a, std::make_integer_sequence<int, 2 * W>()); }

// A document's tokens as columns: [tokens / PANEL][width / 2][PANEL] pairs of channels.
static void pack_tokens(const Heads& x, int64_t start, int64_t L, int64_t head, int64_t D, int64_t width, bf16* to) {
    for (int64_t t = 0; t < round_up(L, PANEL); t += TILE)
        for (int64_t d = 0; d < width; d += 2 * TILE) {
            words rows[W];
            for (int i = 0; i < TILE; i++)
                rows[i] = t + i < L ? load_some(vector_at<bf16>(x, start + t + i, head) + d, D - d) : words{};
            transpose(rows);
            bf16* at = to + (t / PANEL * width + d) * PANEL + t % PANEL * 2;
            for (int i = 0; i < TILE; i++) store(at + i * 2 * PANEL, rows[i]);
        }
}

// Its channels as columns: [width / PANEL][tokens / 2][PANEL] pairs of tokens.
static void pack_channels(const Heads& x, int64_t start, int64_t L, int64_t head, int64_t D, int64_t width, bf16* to) {
    for (int64_t d = 0; d < width; d += PANEL)
        for (int64_t t = 0; t < round_up(L, PANEL); t += 2, to += 2 * PANEL) {
            auto token = [&](int64_t t) {
                return t < L ? load_some(vector_at<bf16>(x, start + t, head) + d, D - d) : words{};
            };
            const words even = token(t), odd = token(t + 1);
            store(to, zipped(even, odd, 0)), store(to + PANEL, zipped(even, odd, W));
        }
}

// STRIP rows of a task, from `first` on: the first `count` exist, and see `seen` keys together.
struct Strip {
    int64_t first, count, seen;
    int64_t token[STRIP], head[STRIP], index[STRIP];  // index: of [tokens, H]
    int32_t visible[STRIP];                           // keys of the document

    Strip(int64_t first, int64_t L, int64_t start, int64_t g, int64_t group, int64_t H)
        : first(first), count(std::min<int64_t>(STRIP, L * group - first)), seen((first + count - 1) / group + 1) {
        int64_t t = first / group, h = first % group;
        for (int64_t r = 0; r < STRIP; r++) {
            token[r] = start + t, head[r] = g * group + h, index[r] = token[r] * H + head[r];
            visible[r] = r < count ? t + 1 : 0;
            if (++h == group) h = 0, t++;
        }
    }

    // Their vectors, 0 behind the last one: [STRIP, width]. Those of the next strip are on their way then.
    void read(const Heads& x, int64_t D, int64_t width, bf16* to) const {
        const int64_t next = (token[STRIP - 1] - token[0] + 1) * x.token;
        for (int64_t r = 0; r < STRIP; r++) {
            const bf16* from = vector_at<bf16>(x, token[r], head[r]);
            for (int64_t d = 0; d < width; d += 2 * W, to += 2 * W) {
                store(to, r < count ? load_some(from + d, D - d) : words{});
                __builtin_prefetch(from + d + next);
            }
        }
    }
};

// Such a strip as columns: [width, STRIP].
static void transpose_strip(const bf16* strip, int64_t width, bf16* to) {
    for (int64_t d = 0; d < width; d += W) {
        words columns[W];
        for (int i = 0; i < W; i++) {
            const words even = load_some(strip + 2 * i * width + d / (2 * W) * 2 * W, 2 * W);
            const words odd = load_some(strip + (2 * i + 1) * width + d / (2 * W) * 2 * W, 2 * W);
            columns[i] = d % (2 * W) ? zipped(even, odd, W) : zipped(even, odd, 0);
        }
        transpose(columns);
        for (int i = 0; i < W; i++) store(to + (d + i) * STRIP, columns[i]);
    }
}

// Scores to weights 2^(factor (score - greatest score)), 0 behind the first `visible` of `width`; returns the sum of the
// weights and, in `peak`, the greatest score.
static inline float soften(const float* scores, int64_t visible, int64_t width, float factor, bf16* weights, float& peak) {
    const int64_t whole = visible / (2 * W) * 2 * W;
    const auto greater = [](vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); };
    const auto seen = [&](int64_t t) { return LANES + (int32_t)t < (int32_t)visible; };
    vec left = vec{} - INFINITY, right = left;
    for (int64_t t = 0; t < whole; t += 2 * W) left = greater(left, load(scores + t)), right = greater(right, load(scores + t + W));
    if (whole < visible) {
        left = greater(left, seen(whole) ? load(scores + whole) : vec{} - INFINITY);
        right = greater(right, seen(whole + W) ? load(scores + whole + W) : vec{} - INFINITY);
    }
    peak = _mm512_reduce_max_ps((__m512)greater(left, right));
    const float shift = factor * peak;
    const auto weight = [&](int64_t t) { return exp2(load(scores + t) * factor - shift); };
    vec sums = {};
    for (int64_t t = 0; t < whole; t += 2 * W) {
        left = weight(t), right = weight(t + W), sums += left + right;
        store(weights + t, narrowed(left, right));
    }
    for (int64_t t = whole; t < width; t += 2 * W) {
        left = seen(t) ? weight(t) : vec{}, right = seen(t + W) ? weight(t + W) : vec{}, sums += left + right;
        store(weights + t, narrowed(left, right));
    }
    return _mm512_reduce_add_ps((__m512)sums);
}

static void attend_by_tiles(const Attention& a, int64_t start, int64_t L, int64_t g) {
    static thread_local Scratch<bf16> key_memory, value_memory, query_memory, weight_memory;
    static thread_local Scratch<float> score_memory, mixed_memory;
    const int64_t D = a.D, group = a.H / a.G, width = round_up(D, PANEL), tokens = round_up(L, PANEL);
    bf16 *keys = key_memory.of(tokens * width), *values = value_memory.of(tokens * width);
    bf16 *queries = query_memory.of(STRIP * width);
    float* mixed = mixed_memory.of(STRIP * width);
    pack_tokens(a.k, start, L, g, D, width, keys);
    pack_channels(a.v, start, L, g, D, width, values);
    const int64_t score_stride = tokens + W, weight_stride = tokens + 2 * W;  // odd in lines: other sets of the cache
    float* scores = score_memory.of(STRIP * score_stride);
    bf16* weights = weight_memory.of(STRIP * weight_stride);
    const float scale = 1 / std::sqrt((float)D);
    for (int64_t row = 0; row < L * group; row += STRIP) {
        const Strip strip(row, L, start, g, group, a.H);
        float peaks[STRIP], totals[STRIP];
        strip.read(a.q, D, width, queries);
        for (int64_t t = 0; t < strip.seen; t += PANEL)
            tile_product(queries, width, width, keys + t * width, scores + t, score_stride);
        for (int64_t r = 0; r < strip.count; r++)
            totals[r] = soften(scores + r * score_stride, strip.visible[r], round_up(strip.seen, PANEL), scale * LOG2_E,
                               weights + r * weight_stride, peaks[r]);
        for (int64_t r = 0; r < strip.count; r++) a.log_sums[strip.index[r]] = scale * peaks[r] + std::log(totals[r]);
        for (int64_t d = 0; d < width; d += PANEL)
            tile_product(weights, weight_stride, round_up(strip.seen, PANEL), values + d * tokens, mixed + d, width);
        for (int64_t r = 0; r < strip.count; r++) write(mixed + r * width, D, 1 / totals[r], (bf16*)a.out + strip.index[r] * D);
    }
}

struct alignas(64) Slopes {  // of a strip's rows and a panel's keys
    float scores[STRIP][PANEL], products[STRIP][PANEL];     // q k^T, do v^T
    bf16 p[STRIP / 2][PANEL][2], ds[STRIP / 2][PANEL][2];  // pairs of rows
    bf16 ds_rows[STRIP][PANEL];
    float log_sums[STRIP], dots[STRIP];  // log_sums of base 2

    // The weights and the gradients of their exponents; the first key is `t`. MASKED: some keys are not seen by all.
    template <bool MASKED>
    void find(const Strip& strip, int64_t t, float factor) {
        for (int half = 0; half < PANEL; half += W, t += W)
            for (int r = 0; r < STRIP; r += 2) {
                vec weight[2] = {}, slope[2] = {};
                if (!MASKED || t < std::max(strip.visible[r], strip.visible[r + 1]))
                    for (int i = 0; i < 2; i++) {
                        weight[i] = exp2(load(scores[r + i] + half) * factor - log_sums[r + i]);
                        slope[i] = weight[i] * (load(products[r + i] + half) - dots[r + i]);
                        if constexpr (MASKED) {
                            const ints is_seen = LANES + (int32_t)t < strip.visible[r + i];
                            weight[i] = is_seen ? weight[i] : vec{}, slope[i] = is_seen ? slope[i] : vec{};
                        }
                    }
                store(p[r / 2][half], zipped(weight[0], weight[1]));
                const words rows = narrowed(slope[0], slope[1]);
                store(ds[r / 2][half], halves_zipped(rows));
                _mm256_store_si256((__m256i*)(ds_rows[r] + half), _mm512_castsi512_si256((__m512i)rows));
                _mm256_store_si256((__m256i*)(ds_rows[r + 1] + half), _mm512_extracti64x4_epi64((__m512i)rows, 1));
            }
    }
};

// Sums of a document's tokens as columns, [tokens / PANEL][width][PANEL], times a factor: [tokens, G, D].
static void write_tokens(const float* sums, int64_t L, int64_t D, int64_t width, float factor, bf16* to, int64_t stride) {
    static thread_local Scratch<float> memory;
    float* token = memory.of(TILE * width);
    for (int64_t t = 0; t < L; t += TILE) {
        for (int64_t d = 0; d < width; d += W) {
            words columns[W];
            const float* from = sums + (t / PANEL * width + d) * PANEL + t % PANEL;
            for (int i = 0; i < W; i++) columns[i] = (words)load(from + i * PANEL);
            transpose(columns);
            for (int i = 0; i < TILE; i++) store(token + i * width + d, (vec)columns[i]);
        }
        for (int64_t i = 0; i < std::min<int64_t>(TILE, L - t); i++)
            write(token + i * width, D, factor, to + (t + i) * stride);
    }
}

static void attend_backward_by_tiles(const Attention& a, int64_t start, int64_t L, int64_t g) {
    static thread_local Scratch<bf16> key_memory, value_memory, key_channel_memory, strip_memory;
    static thread_local Scratch<float> dk_memory, dv_memory, dq_memory;
    static thread_local Slopes slopes;
    const int64_t D = a.D, group = a.H / a.G, width = round_up(D, PANEL), tokens = round_up(L, PANEL), size = tokens * width;
    const float scale = 1 / std::sqrt((float)D);
    const Heads out = {a.out, a.H * D, D};
    bf16 *key_tokens = key_memory.of(size), *value_tokens = value_memory.of(size), *key_channels = key_channel_memory.of(size);
    bf16 *queries = strip_memory.of(5 * STRIP * width), *grads = queries + STRIP * width, *outs = grads + STRIP * width;
    bf16 *query_columns = outs + STRIP * width, *grad_columns = query_columns + STRIP * width;
    float *dk = dk_memory.of(size), *dv = dv_memory.of(size), *dq = dq_memory.of(STRIP * width);
    pack_tokens(a.k, start, L, g, D, width, key_tokens);
    pack_tokens(a.v, start, L, g, D, width, value_tokens);
    pack_channels(a.k, start, L, g, D, width, key_channels);
    std::fill(dk, dk + size, 0.0f), std::fill(dv, dv + size, 0.0f);
    for (int64_t row = 0; row < L * group; row += STRIP) {
        const Strip strip(row, L, start, g, group, a.H);
        strip.read(a.q, D, width, queries), strip.read(a.grad, D, width, grads), strip.read(out, D, width, outs);
        transpose_strip(queries, width, query_columns), transpose_strip(grads, width, grad_columns);
        for (int64_t r = 0; r < STRIP; r += W)
            store(slopes.dots + r, sums_of([&](int i) {
                __m512 products = {};
                for (int64_t d = 0; d < width; d += 2 * W)
                    products = _mm512_dpbf16_ps(products, (__m512bh)load_some(outs + (r + i) * width + d, 2 * W),
                                                (__m512bh)load_some(grads + (r + i) * width + d, 2 * W));
                return (vec)products;
            }));
        for (int64_t r = 0; r < STRIP; r++) slopes.log_sums[r] = r < strip.count ? a.log_sums[strip.index[r]] * LOG2_E : 0;
        for (int64_t t = 0; t < strip.seen; t += PANEL) {
            tile_product(queries, width, width, key_tokens + t * width, slopes.scores[0], PANEL);
            tile_product(grads, width, width, value_tokens + t * width, slopes.products[0], PANEL);
            const bool all_seen = strip.count == STRIP && t + PANEL <= strip.visible[0];
            all_seen ? slopes.find<false>(strip, t, scale * LOG2_E) : slopes.find<true>(strip, t, scale * LOG2_E);
            for (int64_t d = 0; d < width; d += PANEL) {
                tile_product(slopes.ds_rows[0], PANEL, PANEL, key_channels + d * tokens + t * PANEL, dq + d, width, t > 0);
                const int64_t at = t * width + d * PANEL;
                tile_product(grad_columns + d * STRIP, STRIP, STRIP, slopes.p[0][0], dv + at, PANEL, true);
                tile_product(query_columns + d * STRIP, STRIP, STRIP, slopes.ds[0][0], dk + at, PANEL, true);
            }
        }
        for (int64_t r = 0; r < strip.count; r++) write(dq + r * width, D, scale, (bf16*)a.dq + strip.index[r] * D);
    }
    const int64_t at = (start * a.G + g) * D;
    write_tokens(dk, L, D, width, scale, (bf16*)a.dk + at, a.G * D);
    write_tokens(dv, L, D, width, 1, (bf16*)a.dv + at, a.G * D);
}
#endif

template <class Compute>
static void each_document(const Attention& a, Compute compute) {
#pragma omp parallel num_threads(a.threads)
    {
        [[maybe_unused]] Tiles tiles;
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < a.documents * a.G; n++) {
            const int64_t document = n / a.G, start = a.edges[document], L = a.edges[document + 1] - start;
            if (L > 0) compute(start, L, n % a.G);
        }
    }
}

extern "C" void attention_forward(const Attention* a) {
    each_document(*a, [&](int64_t start, int64_t L, int64_t g) {
#if TILES
        if (a->is_bf16 && has_tiles()) return attend_by_tiles(*a, start, L, g);
#endif
        a->is_bf16 ? attend<bf16>(*a, start, L, g) : attend<float>(*a, start, L, g);
    });
}

extern "C" void attention_backward(const Attention* a) {
    each_document(*a, [&](int64_t start, int64_t L, int64_t g) {
#if TILES
        if (a->is_bf16 && has_tiles()) return attend_backward_by_tiles(*a, start, L, g);
#endif
        a->is_bf16 ? attend_backward<bf16>(*a, start, L, g) : attend_backward<float>(*a, start, L, g);
    });
}
