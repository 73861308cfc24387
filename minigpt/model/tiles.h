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
#else
#define TILES 0
extern "C" int has_tiles() { return false; }
struct Tiles {};
#endif
