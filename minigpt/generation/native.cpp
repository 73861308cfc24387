// A step of generation on a CPU in two calls: `decode` takes tokens to logits, `draw` samples from them.
//
// The formulas are those of model_minigpt.py and sampling.py; the tests compare this file with both. What it saves is
// calling some 150 operators a step, each with an allocation and a start of the threads, and passes over memory between
// them. It uses nothing of torch: native.py hands over addresses.
//
// A row is a token: the last one of a sequence, or one of several that a prompt has there. What is computed for it never
// depends on how many others there are, on their order, or on the number of threads: every sum is taken by one thread in
// a fixed order. `#pragma omp for` ends with a barrier.
//
// Shapes: N rows, E hidden size, H query heads, G key/value heads, D head size, F intermediate size, V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../model/tiles.h"

constexpr int BLOCK = 4 * W;     // tokens whose probabilities are summed up before one of them is chosen
constexpr int SPARE = 14, DEPTH = 8;  // as SPARE and COLUMN in sampling.py

// ------------------------------------------------------------------------------------------------------------ network

extern "C" {

struct Layer {
    const float* input_norm;
    const void* qkv;  // packed, as all products: [panels, width, COLUMNS] in T, for tiles [panels, width / 2, COLUMNS] pairs
    const float *qkv_bias, *q_norm, *k_norm;  // each may be null
    const void* out;
    const float* mlp_norm;
    const void *gate_up, *down;  // a panel of gate_up holds W columns of each
};

struct Network {
    int64_t layers, E, H, G, D, F, V, bf16_weights;
    float eps;
    const float *cos, *sin;  // [positions, D]; the sines of the first half are negative
    const void* embedding;   // [V, E] in T
    const Layer* layer;
    const float* final_norm;
    const void* head;
};

struct Cache {
    void* kv;  // [layers, 2, slots, G, length, D]: in bfloat16 where bf16 weights attend by tiles, else in float32
    int64_t slots, length;
};

// A token, where it belongs, the slot whose first `shared` positions hold the same as its own, and whether its logits are
// asked for.
struct Row {
    int64_t id, slot, position, lender, shared, heard;
};
}

// W: the weights are packed in vectors of that length.
extern "C" int vector_width() { return W; }

// A weight matrix as panels. rows: K weights of each column, null where there is none; out: [panels, K, COLUMNS], aligned to
// 64 bytes. In bfloat16 two weights are a word: k and k + 1 of a column for tiles, else k of a column of either half.
extern "C" void pack(const void* const* rows, int64_t panels, int64_t K, int bf16_weights, void* out, int threads) {
    const int64_t width = bf16_weights ? K / 2 : K;  // words of a row
    const bool pairs = bf16_weights && !has_tiles();
    // W words, from word k on, of each of W rows, as columns
    auto columns = [&](int64_t row, int64_t k, words (&found)[W]) {
        for (int i = 0; i < W; i++) {
            found[i] = words{};
            if (rows[row + i]) std::memcpy(&found[i], (const uint32_t*)rows[row + i] + k, sizeof found[i]);
        }
        transpose(found);
    };
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t p = 0; p < panels; p++) {
        uint32_t* to = (uint32_t*)out + p * width * COLUMNS;
        for (int64_t k = 0; k < width; k += W, to += W * COLUMNS) {
            words left[W], right[W];
            columns(p * COLUMNS, k, left), columns(p * COLUMNS + W, k, right);
            for (int i = 0; i < W; i++) {
                const words low = (left[i] & 0xffff) | right[i] << 16, high = left[i] >> 16 | (right[i] & 0xffff0000u);
                stream(to + i * COLUMNS, pairs ? low : left[i]), stream(to + i * COLUMNS + W, pairs ? high : right[i]);
            }
        }
        end_stream();
    }
}

// By tiles the rows are rounded to bfloat16, as torch does it, and a panel holds pairs.
constexpr int TILED_ROWS = 2 * TILE;
#if TILES
// The products of up to TILED_ROWS rows; there must be memory behind the last one of x for so many.
template <class Use>
static inline void multiply_tiles(const bf16* x, int64_t row, int64_t rows, int64_t width, const bf16* panel, Use use) {
    float sums[TILED_ROWS][2][TILE];
    tile_product(x + row * width, width, width, panel, sums[0][0], COLUMNS, false, rows - row > TILE);
    for (int64_t r = 0; r < std::min<int64_t>(rows - row, TILED_ROWS); r++) use(row + r, load(sums[r][0]), load(sums[r][1]));
}
#else
template <class Use>
static inline void multiply_tiles(const bf16*, int64_t, int64_t, int64_t, const bf16*, Use) {}
#endif

// x W^T of all rows, panel by panel, by tiles where x is in bfloat16; use(panel, row, left, right) takes the sums of its 2 W
// columns.
template <class T, class X, class Use>
static void product(const X* x, int64_t rows, int64_t width, const void* packed, int64_t panels, Use use) {
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < panels; p++) {
        const T* panel = (const T*)packed + p * width * COLUMNS;
        auto use_row = [&](int64_t row, vec left, vec right) { use(p, row, left, right); };
        int64_t row = 0;
        if constexpr (std::is_same_v<X, bf16>) {
            for (; row < rows; row += TILED_ROWS) multiply_tiles(x, row, rows, width, panel, use_row);
        } else {
            for (; row + ROWS <= rows; row += ROWS) multiply<ROWS>(x, width, row, width, panel, use_row);
            if ((rows - row) & 4) multiply<4>(x, width, row, width, panel, use_row), row += 4;
            if ((rows - row) & 2) multiply<2>(x, width, row, width, panel, use_row), row += 2;
            if ((rows - row) & 1) multiply<1>(x, width, row, width, panel, use_row);
        }
    }
}

static float root_mean_square(const float* x, int64_t width, float eps) {
    vec squares = {};
    for (int64_t i = 0; i < width; i += W) squares += load(x + i) * load(x + i);
    return std::sqrt(sum(squares) / width + eps);
}

// Of the rows of x that are listed, or of the first ones.
template <class X>
static void norm(const float* x, const int64_t* listed, const float* weight, int64_t rows, int64_t width, float eps, X* out) {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
        const float* from = x + (listed ? listed[row] : row) * width;
        const float scale = 1 / root_mean_square(from, width, eps);
        for (int64_t i = 0; i < width; i += W) store(out + row * width + i, load(from + i) * scale * load(weight + i));
    }
}

// A query or key: its norm, if there is one, and its rotation.
static void rotate(const float* x, const float* weight, const Network& net, int64_t position, float factor, float* out) {
    const int64_t D = net.D, half = D / 2;
    float normed[D];
    std::memcpy(normed, x, sizeof normed);
    if (weight) {
        const float scale = 1 / root_mean_square(x, D, net.eps);
        for (int64_t i = 0; i < D; i++) normed[i] *= scale * weight[i];
    }
    const float *cos = net.cos + position * D, *sin = net.sin + position * D;
    for (int64_t i = 0; i < half; i++) {
        out[i] = (normed[i] * cos[i] + normed[i + half] * sin[i]) * factor;
        out[i + half] = (normed[i + half] * cos[i + half] + normed[i] * sin[i + half]) * factor;
    }
}

// softmax(q k^T) v of a head over positions 0 .. row.position. The first `shared` of them are read from `lent`, where others
// read them too. Up to W - 1 keys behind the last are read as well, but not used.
template <class X>
static void attend(const float* q, const float* own, const float* lent, int64_t v_offset, const Row& row, int64_t D,
                   float* scores, X* out) {
    const int64_t tokens = row.position + 1;
    auto key = [&](int64_t t) { return (t < row.shared ? lent : own) + t * D; };
    vec most = vec{} - INFINITY;
    for (int64_t t = 0; t < tokens; t += W) {
        vec found = sums_of([&](int i) {
            const float* k = key(t + i);
            vec products = load(q) * load(k);
            for (int64_t d = W; d < D; d += W) products += load(q + d) * load(k + d);
            return products;
        });
        store(scores + t, found);
        for (int64_t i = tokens; i < t + W; i++) scores[i] = -INFINITY;
        found = load(scores + t);
        most = found > most ? found : most;
    }
    const float total = exponentiate(scores, tokens, greatest(most));
    for (int64_t d = 0; d < D; d += W) {
        vec even = {}, odd = {};  // two sums, since each addition waits for the one before
        for (int64_t t = 0; t < tokens; t += 2) {  // the weight behind the last one is 0
            even += scores[t] * load(key(t) + v_offset + d);
            odd += scores[t + 1] * load(key(t + 1) + v_offset + d);
        }
        store(out + d, (even + odd) / total);
    }
}

// Whether attention with bf16 weights is computed by tiles, `group` being the heads that read the same keys.
extern "C" int attends_by_tiles(int64_t D, int64_t group) { return has_tiles() && D % (2 * TILE) == 0 && group <= TILE; }

#if TILES
struct alignas(4 * TILE) TileRow { bf16 of[2 * TILE]; };

template <int... I>
static constexpr ints multiples(int of, std::integer_sequence<int, I...>) { return ints{of * I...}; }

// Rows 2 i and 2 i + 1 of a matrix as row i of a right tile: one of its even columns, one of the odd ones.
static inline void pair_up(const bf16* above, const bf16* below, TileRow& even, TileRow& odd) {
    words a, b;
    std::memcpy(&a, above, sizeof a), std::memcpy(&b, below, sizeof b);
    const words low = (a & 0xffff) | b << 16, high = a >> 16 | (b & 0xffff0000u);
    std::memcpy(&even, &low, sizeof low), std::memcpy(&odd, &high, sizeof high);
}

// The even columns and the odd ones, rounded to bfloat16, back in their order.
static inline void store_pairs(bf16* to, vec even, vec odd) {
    bf16 narrow[2][W];
    halves h[2];
    store(narrow[0], even), store(narrow[1], odd);
    std::memcpy(h, narrow, sizeof h);
    const words both = __builtin_convertvector(h[0], words) | __builtin_convertvector(h[1], words) << 16;
    std::memcpy(to, &both, sizeof both);
}

// The same for `group` heads of each of `count` rows, at most TILE heads in all, whose rows have the same lender and `shared`:
// what is shared they read together. Every number is summed up as it would be without the others. Queries and the weights
// e^(score - greatest score) are rounded to bfloat16.
//
//     keys q^T     keys are the left tile, as they lie in the cache; heads are columns
//     weights v    heads are rows; the values of two tokens become pairs
//
// q: [count, group, D]; own(r): the keys of the slot of row r; out(r): [group, D].
template <class Own, class Out>
static void attend_by_tiles(const float* q, const Row* rows, int64_t count, int64_t group, Own own, const bf16* lent,
                            int64_t v_offset, int64_t D, Out out) {
    constexpr int PAIRS = 2 * TILE, bytes = sizeof(TileRow);
    static thread_local std::vector<float> score_memory;
    static thread_local std::vector<TileRow> query_memory, weight_memory;
    const int64_t heads = count * group, shared = rows[0].shared, together = shared / PAIRS * PAIRS;
    int64_t room = 0;
    for (int64_t r = 0; r < count; r++) room = std::max(room, round_up(rows[r].position + 1, PAIRS));
    score_memory.resize(heads * room), weight_memory.resize(room / PAIRS * heads + TILE), query_memory.assign(D / 2, {});
    float* const scores = score_memory.data();      // [heads, room]
    TileRow* const weights = weight_memory.data();  // [room / PAIRS, heads], and something behind for the last tile's rows
    TileRow* const queries = query_memory.data();   // [D / 2], a pair of each head
    for (int64_t h = 0; h < heads; h++) {
        bf16 narrow[D];
        write(q + h * D, D, 1, narrow);
        for (int64_t d = 0; d < D; d += 2) std::memcpy(queries[d / 2].of + 2 * h, narrow + d, 2 * sizeof(bf16));
    }

    static const ints ROWS_OF_A_COLUMN = multiples(TILE, std::make_integer_sequence<int, TILE>());
    const float scale = 1 / std::sqrt((float)D);
    auto score = [&](const bf16* keys, int64_t t, int64_t first_head, int64_t last_head) {  // TILE tokens, but none shared
        float sums[TILE][TILE];
        asm volatile("" : : : "memory");  // GCC does not know that tiles are loaded from memory
        _tile_zero(0);
        for (int64_t d = 0; d < D; d += PAIRS) {
            _tile_loadd(1, keys + t * D + d, D * sizeof(bf16)); _tile_loadd(2, queries + d / 2, bytes);
            _tile_dpbf16ps(0, 1, 2);
        }
        for (int64_t i = 0; i < TILE * D; i += PAIRS) __builtin_prefetch(keys + v_offset + t * D + i);
        _tile_stored(0, sums, sizeof sums[0]);
        for (int64_t h = first_head; h < last_head; h++) {
            float* to = scores + h * room + t;
            vec column = (vec)_mm512_i32gather_ps((__m512i)ROWS_OF_A_COLUMN, sums[0] + h, sizeof(float)) * scale;
            if (keys != lent && t < shared) std::memcpy(&column, to, (shared - t) * sizeof(float));
            store(to, column);
        }
    };
    for (int64_t t = 0; t < shared; t += TILE) score(lent, t, 0, heads);
    float totals[TILE];
    for (int64_t r = 0; r < count; r++) {
        const int64_t tokens = rows[r].position + 1, whole = round_up(tokens, PAIRS);
        for (int64_t t = shared / TILE * TILE; t < tokens; t += TILE) score(own(r), t, r * group, (r + 1) * group);
        for (int64_t h = r * group; h < (r + 1) * group; h++) {
            float* from = scores + h * room;
            std::fill(from + tokens, from + whole, -INFINITY);
            vec most = load(from);
            for (int64_t t = W; t < whole; t += W) most = load(from + t) > most ? load(from + t) : most;
            totals[h] = exponentiate(from, whole, greatest(most));
            for (int64_t t = 0; t < whole; t += W) store(weights[t / PAIRS * heads + h].of + t % PAIRS, load(from + t));
        }
    }

    for (int64_t d = 0; d < D; d += PAIRS) {
        auto add = [&](const bf16* keys, int64_t t, int64_t tokens, int64_t head) {  // PAIRS tokens; those behind weigh 0
            TileRow even[TILE], odd[TILE];
            auto value = [&](int64_t token) {
                token = std::min(token, tokens - 1);
                return (token < shared ? lent : keys) + v_offset + token * D + d;
            };
            if (t + PAIRS <= tokens && (keys == lent || t >= shared)) {
                const bf16* v = keys + v_offset + t * D + d;
                for (int i = 0; i < TILE; i++, v += 2 * D) pair_up(v, v + D, even[i], odd[i]);
            } else {
                for (int i = 0; i < TILE; i++) pair_up(value(t + 2 * i), value(t + 2 * i + 1), even[i], odd[i]);
            }
            asm volatile("" : : : "memory");
            _tile_loadd(2, weights + t / PAIRS * heads + head, bytes);
            _tile_loadd(3, even, bytes); _tile_loadd(4, odd, bytes);
            _tile_dpbf16ps(0, 2, 3); _tile_dpbf16ps(1, 2, 4);
        };
        float sums[2][2 * TILE][TILE];  // of a row's heads, and behind them something for the rest of the tile
        constexpr int sums_bytes = sizeof sums[0][0];
        _tile_zero(0); _tile_zero(1);
        for (int64_t t = 0; t < together; t += PAIRS) add(lent, t, shared, 0);
        _tile_stored(0, sums[0][0], sums_bytes); _tile_stored(1, sums[1][0], sums_bytes);
        for (int64_t r = 0; r < count; r++) {
            const int64_t head = r * group, tokens = rows[r].position + 1;
            if (r) { _tile_loadd(0, sums[0][head], sums_bytes); _tile_loadd(1, sums[1][head], sums_bytes); }
            for (int64_t t = together; t < tokens; t += PAIRS) add(own(r), t, tokens, head);
            float mixed[2][TILE][TILE];
            _tile_stored(0, mixed[0][0], sums_bytes); _tile_stored(1, mixed[1][0], sums_bytes);
            for (int64_t h = 0; h < group; h++)
                store_pairs(out(r) + h * D + d, load(mixed[0][h]) / totals[head + h], load(mixed[1][h]) / totals[head + h]);
        }
    }
}
#endif

// Rows that attend together.
struct Run {
    int64_t first, count;
};

// Rows one by one, or up to `most` of them that follow each other and share their beginning.
static std::vector<Run> runs_of(const Row* rows, int64_t N, int64_t most) {
    std::vector<Run> runs;
    for (int64_t n = 0; n < N; n++) {
        const Row& first = rows[runs.empty() ? 0 : runs.back().first];
        const bool joins = n && runs.back().count < most && rows[n].shared && rows[n].shared == first.shared &&
                           rows[n].lender == first.lender;
        if (joins) runs.back().count++;
        else runs.push_back({n, 1});
    }
    return runs;
}

// T: of the weights. X: of what they are multiplied by. C: of the cache.
template <class T, class X, class C>
static void decode_as(const Network& net, const Cache& cache, const Row* rows, int64_t N, float* logits, int64_t stride,
                      int threads) {
    const int64_t E = net.E, D = net.D, F = net.F, queries = net.H * D, group = net.H / net.G;
    const int64_t all_heads = (queries + 2 * net.G * D + COLUMNS - 1) / COLUMNS * COLUMNS;
    static thread_local std::vector<float> sums;  // what products add to and give
    static thread_local std::vector<X> factors;   // what they read, in whole tiles
    const int64_t tiled = round_up(N, TILED_ROWS);
    sums.resize(N * (E + all_heads)), factors.resize(tiled * (E + queries + F));
    float *x = sums.data(), *qkv = x + N * E;
    X *normed = factors.data(), *mixed = normed + tiled * E, *gated = mixed + tiled * queries;
    constexpr bool BY_TILES = std::is_same_v<C, bf16>;
    const std::vector<Run> runs = runs_of(rows, N, BY_TILES ? std::clamp<int64_t>(net.G * N / threads, 1, TILE / group) : 1);
    std::vector<int64_t> heard;
    for (int64_t n = 0; n < N; n++)
        if (rows[n].heard) heard.push_back(n);
    auto add_to_x = [&](int64_t panel, int64_t row, vec left, vec right) {
        float* to = x + row * E + panel * COLUMNS;
        store(to, load(to) + left);
        store(to + W, load(to + W) + right);
    };
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] Tiles tiles;
        std::vector<float> scores(cache.length + W);
#pragma omp for
        for (int64_t n = 0; n < N; n++)
            for (int64_t i = 0; i < E; i += W) store(x + n * E + i, load((const T*)net.embedding + rows[n].id * E + i));
        for (int64_t l = 0; l < net.layers; l++) {
            const Layer& layer = net.layer[l];
            norm(x, nullptr, layer.input_norm, N, E, net.eps, normed);
            product<T>(normed, N, E, layer.qkv, all_heads / COLUMNS, [&](int64_t panel, int64_t row, vec left, vec right) {
                int64_t column = panel * COLUMNS;
                if (layer.qkv_bias) left += load(layer.qkv_bias + column), right += load(layer.qkv_bias + column + W);
                store(qkv + row * all_heads + column, left);
                store(qkv + row * all_heads + column + W, right);
            });
            const int64_t v_offset = cache.slots * net.G * cache.length * D;
            C* layer_k = (C*)cache.kv + 2 * l * v_offset;
            auto keys = [&](int64_t slot, int64_t g) { return layer_k + (slot * net.G + g) * cache.length * D; };
#pragma omp for
            for (int64_t n = 0; n < N; n++)
                for (int64_t g = 0; g < net.G; g++) {
                    const float* k = qkv + n * all_heads + queries + g * D;
                    float rotated[D];
                    rotate(k, layer.k_norm, net, rows[n].position, 1, rotated);
                    C* own_k = keys(rows[n].slot, g) + rows[n].position * D;
                    write(rotated, D, 1, own_k);
                    write(k + net.G * D, D, 1, own_k + v_offset);
                }
            const int64_t parts = runs.size();
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < net.G * parts; task++) {  // head by head, so that lent keys stay in the core's cache
                const int64_t g = task / parts, columns = g * group * D;
                const Run run = runs[task % parts];
                const Row* row = rows + run.first;
                float q[run.count * group * D];
                for (int64_t i = 0; i < run.count * group; i++) {
                    const int64_t n = run.first + i / group, h = i % group;
                    const float factor = BY_TILES ? 1 : 1 / std::sqrt((float)D);  // queries are rounded as the model's are
                    rotate(qkv + n * all_heads + columns + h * D, layer.q_norm, net, rows[n].position, factor, q + i * D);
                }
                const C* lent_k = keys(row->lender, g);
                auto own_k = [&](int64_t r) { return keys(row[r].slot, g); };
                auto out = [&](int64_t r) { return mixed + (run.first + r) * queries + columns; };
#if TILES
                if constexpr (BY_TILES) {
                    attend_by_tiles(q, row, run.count, group, own_k, lent_k, v_offset, D, out);
                    continue;
                }
#endif
                if constexpr (!BY_TILES)
                    for (int64_t h = 0; h < group; h++)
                        attend(q + h * D, own_k(0), lent_k, v_offset, *row, D, scores.data(), out(0) + h * D);
            }
            product<T>(mixed, N, queries, layer.out, E / COLUMNS, add_to_x);
            norm(x, nullptr, layer.mlp_norm, N, E, net.eps, normed);
            product<T>(normed, N, E, layer.gate_up, F / W, [&](int64_t panel, int64_t row, vec gate, vec up) {
                store(gated + row * F + panel * W, gate / (1.0f + exp(-gate)) * up);
            });
            product<T>(gated, N, F, layer.down, E / COLUMNS, add_to_x);
        }
        norm(x, heard.data(), net.final_norm, heard.size(), E, net.eps, normed);
        product<T>(normed, heard.size(), E, net.head, (net.V + COLUMNS - 1) / COLUMNS,
                   [&](int64_t panel, int64_t row, vec left, vec right) {
                       float* to = logits + rows[heard[row]].slot * stride + panel * COLUMNS;
                       store(to, left);
                       store(to + W, right);
                   });
    }
}

// logits: [slots, stride], a stride being V rounded up to whole panels; the slots of rows that are heard are written.
extern "C" void decode(const Network* net, const Cache* cache, const Row* rows, int64_t N, float* logits, int64_t stride,
                       int threads) {
    auto decode = decode_as<float, float, float>;
    if (net->bf16_weights && !has_tiles()) decode = decode_as<bf16, float, float>;
    if (net->bf16_weights && has_tiles())
        decode = attends_by_tiles(net->D, net->H / net->G) ? decode_as<bf16, bf16, bf16> : decode_as<bf16, bf16, float>;
    decode(*net, *cache, rows, N, logits, stride, threads);
}

// ----------------------------------------------------------------------------------------------------------- sampling

extern "C" struct Draw {  // how a row is sampled, and below what came of it
    int64_t slot, top_k, limit;  // top_k is V where off; limit: see SamplingTensors
    double uniform, top_p;
    float temperature, log_min_p;  // temperature 0: greedy
    int64_t id;
    double log_prob, behaviour_log_prob;
};

struct Token {
    float logit;
    int id;
};

// logits / temperature, filled up with -inf, which NaN becomes as well; returns the greatest. There are whole vectors of
// logits.
static float temper(const float* logits, int64_t V, float temperature, std::vector<float>& t) {
    const vec nothing = vec{} - INFINITY;
    const float factor = 1 / temperature;
    t.resize(round_up(V, DEPTH * BLOCK));
    for (int64_t i = 0; i < V; i += W) {
        const vec x = load(logits + i) * factor;
        store(&t[i], x == x ? x : nothing);
    }
    std::fill(t.begin() + V, t.end(), -INFINITY);
    vec most = nothing;
    for (int64_t i = 0; i < V; i += W) {
        const vec x = load(&t[i]);
        most = x > most ? x : most;
    }
    return greatest(most);
}

// The `count` greatest of t and all equals of the last one, best first, equals by id.
static void best(const std::vector<float>& t, int64_t V, int64_t count, std::vector<Token>& found) {
    static thread_local std::vector<float> heads, ordered;
    const int64_t columns = t.size() / DEPTH;  // token c stands in one column with c + columns, c + 2 columns …
    heads.assign(t.begin(), t.begin() + columns);
    for (int64_t i = columns; i < DEPTH * columns; i += columns)
        for (int64_t c = 0; c < columns; c++) heads[c] = t[i + c] > heads[c] ? t[i + c] : heads[c];
    float bound = -INFINITY;
    if (count <= columns) {  // so many columns hold something not below the bound
        ordered = heads;
        std::nth_element(ordered.begin(), ordered.begin() + count - 1, ordered.end(), std::greater<float>());
        bound = ordered[count - 1];
    }
    found.clear();
    for (int64_t c = 0; c < columns; c++)
        if (heads[c] >= bound)
            for (int64_t i = c; i < V; i += columns)
                if (t[i] >= bound) found.push_back({t[i], (int)i});
    std::sort(found.begin(), found.end(), [](Token a, Token b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; });
    while ((int64_t)found.size() > count && found.back().logit < found[count - 1].logit) found.pop_back();
}

// The sum of e^(t - most) over the tokens that are not below `least`; the sums up to each block's end in `ends`.
static double weigh(const std::vector<float>& t, float most, float least, std::vector<double>& ends) {
    double total = 0;
    ends.clear();
    for (size_t i = 0; i < t.size(); i += BLOCK) {
        vec sums = {};
        for (int j = 0; j < BLOCK; j += W) {
            vec logits = load(&t[i + j]);
            sums += logits >= least ? exp(logits - most) : vec{};
        }
        ends.push_back(total += sum(sums));
    }
    return total;
}

// The smallest logit of a nucleus: the largest one at and above which the weights sum up to `mass`.
static float nucleus_bound(const std::vector<float>& t, float most, double mass) {
    static thread_local std::vector<float> weights;
    weights = t;
    exponentiate(weights.data(), weights.size(), most);
    float low = most - 100, high = most;  // e^-100 is 0 beside e^0
    for (float middle; (middle = low + (high - low) / 2) > low && middle < high;) {
        vec sums = {};
        for (size_t i = 0; i < t.size(); i += W) sums += load(&t[i]) >= middle ? load(&weights[i]) : vec{};
        (sum(sums) >= mass ? low : high) = middle;
    }
    return low;
}

// The token, in the order of ids, at which the sum of weights passes `target`.
static int64_t walk(const std::vector<float>& t, float most, float least, const std::vector<double>& ends, double target) {
    size_t block = std::upper_bound(ends.begin(), ends.end(), target) - ends.begin();
    block = std::min(block, ends.size() - 1);
    double reached = block ? ends[block - 1] : 0;
    int64_t last = 0;
    for (int64_t i = block * BLOCK; i < (int64_t)(block + 1) * BLOCK; i++)
        if (t[i] >= least && t[i] > -INFINITY) {
            last = i;
            if ((reached += std::exp(t[i] - most)) > target) break;
        }
    return last;
}

static void draw_row(const float* own, const float* logits, int64_t V, bool log_probs, Draw& row) {
    static thread_local std::vector<float> t;
    static thread_local std::vector<double> ends;
    static thread_local std::vector<Token> found;
    const float temperature = row.temperature > 0 ? row.temperature : 1;
    const float most = temper(logits, V, temperature, t);
    row.behaviour_log_prob = 0;
    if (std::isinf(most)) {  // a network that has diverged
        row.id = 0, row.log_prob = row.behaviour_log_prob = NAN;
        return;
    }
    if (row.temperature == 0) {
        row.id = std::find(t.begin(), t.end(), most) - t.begin();
    } else {
        float least = most + row.log_min_p;
        double total = 0;
        bool listed = false;
        if (row.top_k < V || row.top_p < 1) {
            double whole = row.top_k < V || row.top_p >= 1 ? 0 : weigh(t, most, -INFINITY, ends);
            best(t, V, row.top_k < V ? row.top_k : std::min<int64_t>(64, V), found);
            if (row.top_k < V)
                for (Token token : found) whole += std::exp(token.logit - most);
            double before = 0;
            size_t inside = 0;
            for (; inside < found.size() && (row.top_p >= 1 || before < row.top_p * whole); inside++)
                before += std::exp(found[inside].logit - most);
            const bool goes_on = row.top_k == V && inside == found.size() && inside < (size_t)V;
            least = std::max(least, goes_on ? nucleus_bound(t, most, row.top_p * whole) : found[inside - 1].logit);
            const int64_t counted = found.size();
            while (found.back().logit < least) found.pop_back();
            const int64_t kept = found.size();
            listed = row.limit > 0 && (row.top_k < V ? counted < row.limit + SPARE || row.limit + SPARE >= V
                                                     : kept < row.limit || row.limit == V);
        }
        if (listed) {
            for (Token token : found) total += std::exp(token.logit - most);
            double reached = 0;
            size_t i = 0;
            while ((reached += std::exp(found[i].logit - most)) <= row.uniform * total && i + 1 < found.size()) i++;
            row.id = found[i].id;
        } else {
            total = weigh(t, most, least, ends);
            row.id = walk(t, most, least, ends, row.uniform * total);
        }
        row.behaviour_log_prob = t[row.id] - most - std::log(total);
        if (log_probs && own == logits && least == -INFINITY) {
            row.log_prob = row.behaviour_log_prob;
            return;
        }
    }
    if (!log_probs) return;
    const float peak = temper(own, V, temperature, t);
    row.log_prob = t[row.id] - peak - std::log(weigh(t, peak, -INFINITY, ends));
}

// own: the model's logits [slots, stride]; logits: the same behind penalties and bias, which are sampled from.
extern "C" void draw(const float* own, const float* logits, int64_t stride, int64_t V, int log_probs, Draw* rows, int64_t N,
                     int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        int64_t start = rows[n].slot * stride;
        draw_row(own + start, logits + start, V, log_probs, rows[n]);
    }
}
