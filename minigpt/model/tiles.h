// AMX: Intel's processors multiply tiles of 16 rows of 32 numbers in bfloat16 by tiles of 16 columns, and add to sums in
// float32. The right tile holds pairs: a word of its row k is the numbers of rows 2 k and 2 k + 1 of a column.

#pragma once

#include "vectors.h"

constexpr int TILE = 16;

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define TILES 1  // the compiler knows them

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether the system lends this process the tiles: Linux wants to be asked.
extern "C" int has_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool lent = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return lent;
}

// A thread's tiles, for as long as this lives: eight of 16 rows of 64 bytes.
struct Tiles {
    Tiles() {
        struct alignas(64) { uint8_t palette = 1, row = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shape;
        std::fill(shape.bytes, shape.bytes + 8, 4 * TILE), std::fill(shape.rows, shape.rows + 8, TILE);
        asm volatile("" : : "r"(&shape) : "memory");  // GCC believes that only the first bytes are read
        if (has_tiles()) _tile_loadconfig(&shape);
    }
    ~Tiles() { if (has_tiles()) _tile_release(); }
};

// c = a b, or c + a b, of 2 TILE columns and as many rows, or TILE where the others are not `wanted`: a has `width` numbers a
// row, a multiple of 2 TILE, and b is a panel of width / 2 rows of 2 TILE pairs. Strides are counted in numbers.
static inline void tile_product(const bf16* a, int64_t a_stride, int64_t width, const bf16* b, float* c, int64_t c_stride,
                                bool add = false, bool wanted = true) {
    constexpr int PAIRS = 4 * TILE, b_bytes = PAIRS * sizeof(bf16);
    const int64_t a_bytes = a_stride * sizeof(bf16), c_bytes = c_stride * sizeof(float);
    float* below = c + TILE * c_stride;
    asm volatile("" : : : "memory");  // GCC does not know that tiles are loaded from memory
    if (add) {
        _tile_loadd(0, c, c_bytes); _tile_loadd(1, c + TILE, c_bytes);
        _tile_loadd(2, below, c_bytes); _tile_loadd(3, below + TILE, c_bytes);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);  // they are macros
    }
    for (int64_t k = 0; k < width; k += 2 * TILE) {
        _tile_loadd(6, b + k / 2 * PAIRS, b_bytes); _tile_loadd(7, b + k / 2 * PAIRS + 2 * TILE, b_bytes);
        _tile_loadd(4, a + k, a_bytes);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        if (!wanted) continue;
        _tile_loadd(5, a + TILE * a_stride + k, a_bytes);
        _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes); _tile_stored(1, c + TILE, c_bytes);
    if (!wanted) return;
    _tile_stored(2, below, c_bytes); _tile_stored(3, below + TILE, c_bytes);
}
#else
#define TILES 0
extern "C" int has_tiles() { return false; }
struct Tiles {};
#endif
