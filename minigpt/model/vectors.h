// Vectors of floats for the compiled code of a CPU, in the compiler's own vector types: GCC and Clang make of them what
// `-march=native` has (AVX-512, AVX2, NEON).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __AVX__
#include <immintrin.h>
#endif

// W: floats that are computed together, those of one register; GCC turns longer vectors into scalar code in places.
// ROWS: rows that are multiplied by a panel together; their 2 ROWS sums must fit into the registers, of which there are 32
// or 16. It divides COLUMNS.
#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int W = 8, ROWS = 4;
#elif defined(__aarch64__)
constexpr int W = 4, ROWS = 8;
#else
constexpr int W = 4, ROWS = 4;
#endif
constexpr int COLUMNS = 2 * W;  // of a panel, a piece of a weight matrix: [width, COLUMNS]

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ints __attribute__((vector_size(4 * W)));
typedef uint32_t words __attribute__((vector_size(4 * W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));
struct bf16 { uint16_t bits; };

static inline vec load(const float* from) { vec v; std::memcpy(&v, from, sizeof v); return v; }
static inline void store(float* to, vec v) { std::memcpy(to, &v, sizeof v); }
static inline vec load(const bf16* from) {  // bfloat16 is the upper half of a float
    halves h;
    std::memcpy(&h, from, sizeof h);
    return (vec)(__builtin_convertvector(h, words) << 16);
}

// To the nearest, to even where two are; NaN stays NaN.
static inline void store(bf16* to, vec v) {
    words bits = (words)v;
    bits = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : words{} + 0x7fc0;
    halves h = __builtin_convertvector(bits, halves);
    std::memcpy(to, &h, sizeof h);
}

// Past the caches, for what is read much later; whole vectors to places aligned like them. Behind the end others see it.
static inline void stream(uint32_t* to, words v) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, (__m512i)v);
#elif defined(__AVX__)
    _mm256_stream_si256((__m256i*)to, (__m256i)v);
#else
    std::memcpy(to, &v, sizeof v);
#endif
}
static inline void end_stream() {
#ifdef __AVX__
    _mm_sfence();
#endif
}

// COLUMNS weights of a panel. In bfloat16, but for tiles, weight i of the left half stands beside weight i of the right one.
static inline void load_both(const float* from, vec& left, vec& right) { left = load(from), right = load(from + W); }
static inline void load_both(const bf16* from, vec& left, vec& right) {
    words w;
    std::memcpy(&w, from, sizeof w);
    left = (vec)(w << 16), right = (vec)(w & 0xffff0000u);
}

// a0 + a1, a2 + a3, … b0 + b1, …
template <int... I>
static inline vec add_neighbours(vec a, vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, 2 * I + 1 ...);
}

// A vector of the sums of W vectors, make(0) to make(W - 1): neighbours are added in pairs, again and again.
template <int N = W, class Make>
static inline vec sums_of(Make make, int first = 0) {
    if constexpr (N == 1) {
        return make(first);
    } else {
        vec a = sums_of<N / 2>(make, first), b = sums_of<N / 2>(make, first + N / 2);
        return add_neighbours(a, b, std::make_integer_sequence<int, W>());
    }
}

// Rows to columns: W / 2 apart, then W / 4 …, two rows exchange what belongs to the other.
template <int S, int... I>
static inline void exchange(words& a, words& b, std::integer_sequence<int, I...>) {
    const words first = __builtin_shufflevector(a, b, (I & S ? I - S + W : I)...);
    b = __builtin_shufflevector(a, b, (I & S ? I + W : I + S)...), a = first;
}
template <int S = W / 2>
static inline void transpose(words (&rows)[W]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, W>());
    if constexpr (S > 1) transpose<S / 2>(rows);
}

static inline float sum(vec v) {
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

static inline float greatest(vec v) {
    float most = v[0];
    for (int i = 1; i < W; i++) most = std::max(most, v[i]);
    return most;
}

// e^x to about 1e-7 of its value: 2^n · e^r with |r| <= ln(2) / 2, as in Cephes; 0 below the normal numbers, and e^88
// above 88, the largest whose power of two is a float.
static inline vec exp(vec x) {
    vec limited = x < -87.0f ? vec{} - 87.0f : x;
    limited = limited > 88.0f ? vec{} + 88.0f : limited;
    vec n = (limited * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to a whole number
    vec r = limited - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = vec{} + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    vec power = (vec)((__builtin_convertvector(n, ints) + 127) << 23);
    return x < -87.0f ? vec{} : p * power;
}

// x to e^(x - peak), `width` numbers rounded up to whole vectors; returns their sum.
static inline float exponentiate(float* x, int64_t width, float peak) {
    vec sums = {};
    for (int64_t i = 0; i < width; i += W) {
        vec weights = exp(load(x + i) - peak);
        store(x + i, weights);
        sums += weights;
    }
    return sum(sums);
}

// The products of R rows of x, `stride` floats apart, with a panel of `width` rows; use(row, left, right) takes the sums.
template <int R, class T, class Use>
static inline void multiply(const float* x, int64_t stride, int64_t row, int64_t width, const T* panel, Use use) {
    vec sums[R][2] = {};
    for (int64_t k = 0; k < width; k++, panel += COLUMNS) {
        vec left, right;
        load_both(panel, left, right);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            float factor = x[(row + r) * stride + k];
            sums[r][0] += factor * left;
            sums[r][1] += factor * right;
        }
    }
    for (int r = 0; r < R; r++) use(row + r, sums[r][0], sums[r][1]);
}

static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline float widened(float x) { return x; }
static inline float widened(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// D numbers of T, times a factor, as floats; and back.
template <class T>
static inline void read(const T* from, int64_t D, float factor, float* to) {
    int64_t d = 0;
    for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
    for (; d < D; d++) to[d] = widened(from[d]) * factor;
}

template <class T>
static inline void write(const float* from, int64_t D, float factor, T* to) {
    int64_t d = 0;
    for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
    if (d < D) {
        float rest[W] = {};
        T narrow[W];
        std::copy(from + d, from + D, rest);
        store(narrow, load(rest) * factor);
        std::copy(narrow, narrow + (D - d), to + d);
    }
}
