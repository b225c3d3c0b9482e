/* tiles.h — the words that amx_tile.c speaks to the processor's tile registers in: one instruction of AMX each. Tiles are numbered
 * 0 to 7, by a literal. native/test/tile_model.h defines the same words in software, from Intel's description of the instructions, so
 * that the product can be tested where there is no AMX.
 *
 * Assembly and not the compilers' intrinsics: GCC's name only eight of the 64 bytes that ldtilecfg reads and none of those that
 * tileloadd reads, so that the compiler may leave out or move the stores before them. Nor does a compiler need to know AMX, only its
 * assembler. */
#ifndef CV_X86_TILES_H
#define CV_X86_TILES_H

#include "tile_config.h"

/* Sets the shapes of all tiles and fills them with zeros. */
static inline void cv_tiles_configure(const cv_tile_config *config) { __asm__ volatile("ldtilecfg %0" ::"m"(*config)); }

/* Gives the tiles back: a thread without them is switched without their 8 KB. */
static inline void cv_tiles_release(void) { __asm__ volatile("tilerelease"); }

#define cv_tile_zero(tile) __asm__ volatile("tilezero %%tmm" #tile ::)

/* Rows of the tile's shape, `stride` bytes apart. */
#define cv_tile_load(tile, from, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void *)(from)), "r"((size_t)(stride)) : "memory")
#define cv_tile_store(tile, to, stride) __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void *)(to)), "r"((size_t)(stride)) : "memory")

/* sums += a · b. sums [m, n] int32, a [m, 4k] int8, b [k, n, 4] uint8: sums[i][j] += Σ a[i][4x+y] * b[x][j][y], modulo 2^32. */
#define cv_tile_dot(sums, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::)

#endif
