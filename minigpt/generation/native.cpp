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
    float* kv;  // [layers, 2, slots, G, length, D]
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

// By tiles the rows are rounded to bfloat16, as torch does it, and a panel holds pairs: a word is weights k and k + 1 of a
// column.
constexpr int TILED_ROWS = 2 * TILE;
#if TILES
// The products of up to TILED_ROWS rows; there must be memory behind the last one of x for so many.
template <class Use>
static inline void multiply_tiles(const bf16* x, int64_t row, int64_t rows, int64_t width, const bf16* panel, Use use) {
    const int64_t x_bytes = sizeof(bf16) * width, panel_bytes = sizeof(uint32_t) * COLUMNS;
    const bool second = rows - row > TILE;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);  // they are macros
    for (int64_t k = 0; k < width; k += 2 * TILE) {
        _tile_loadd(6, panel + k * COLUMNS, panel_bytes);
        _tile_loadd(7, panel + k * COLUMNS + COLUMNS, panel_bytes);
        _tile_loadd(4, x + row * width + k, x_bytes);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        if (!second) continue;
        _tile_loadd(5, x + (row + TILE) * width + k, x_bytes);
        _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    float sums[TILED_ROWS][2][TILE];
    constexpr int sums_bytes = sizeof sums[0];
    _tile_stored(0, sums[0][0], sums_bytes); _tile_stored(1, sums[0][1], sums_bytes);
    if (second) { _tile_stored(2, sums[TILE][0], sums_bytes); _tile_stored(3, sums[TILE][1], sums_bytes); }
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

// softmax(q k^T) v over positions 0 .. row.position. The first `shared` of them are read from `lent`, where others read
// them too. Up to W - 1 keys behind the last are read as well, but not used.
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

// T: of the weights. X: of what they are multiplied by.
template <class T, class X>
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
            float* layer_k = cache.kv + 2 * l * v_offset;
            auto keys = [&](int64_t slot, int64_t g) { return layer_k + (slot * net.G + g) * cache.length * D; };
#pragma omp for
            for (int64_t n = 0; n < N; n++)
                for (int64_t g = 0; g < net.G; g++) {
                    const float* k = qkv + n * all_heads + queries + g * D;
                    float* own_k = keys(rows[n].slot, g) + rows[n].position * D;
                    rotate(k, layer.k_norm, net, rows[n].position, 1, own_k);
                    std::memcpy(own_k + v_offset, k + net.G * D, D * sizeof(float));
                }
#pragma omp for
            for (int64_t task = 0; task < net.G * N; task++) {  // head by head, so that lent keys stay in the core's cache
                const int64_t g = task / N, n = task % N;
                const Row& row = rows[n];
                const float *heads = qkv + n * all_heads, *own_k = keys(row.slot, g), *lent_k = keys(row.lender, g);
                for (int64_t h = g * group; h < (g + 1) * group; h++) {
                    float q[D];
                    rotate(heads + h * D, layer.q_norm, net, row.position, 1 / std::sqrt((float)D), q);
                    attend(q, own_k, lent_k, v_offset, row, D, scores.data(), mixed + n * queries + h * D);
                }
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
    auto decode = !net->bf16_weights ? decode_as<float, float> : has_tiles() ? decode_as<bf16, bf16> : decode_as<bf16, float>;
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
