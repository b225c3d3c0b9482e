/* tile_model.h — AMX's tile registers in software: the words of native/backend/cpu/x86/tiles.h, with the state, results and faults that
 * Intel's manual (volume 2, LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBSUD, TILERELEASE; palette 1) gives the instructions. What
 * would fault on a processor ends the process with a message and SIGABRT. Include it before amx_tile.c. */
#ifndef CV_X86_TILES_H
#define CV_X86_TILES_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../backend/cpu/x86/tile_config.h"

typedef struct {
    uint8_t palette; /* 0: the initial state, in which no tile instruction but ldtilecfg and tilerelease may run */
    struct {
        size_t rows, row_bytes; /* both 0: does not exist */
        uint8_t data[CV_TILE_ROWS][CV_TILE_ROW_BYTES];
    } tiles[CV_TILES];
    size_t configured, released, dots; /* how often, for the tests */
} cv_tile_model;

static cv_tile_model tile_model; /* the thread's registers: tests have one thread */

static void tile_fault(const char *what) {
    fprintf(stderr, "tile model: %s\n", what);
    abort();
}

static void tile_require(int condition, const char *what) {
    if (!condition) tile_fault(what);
}

static int tile_all_zero(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (p[i]) return 0;
    return 1;
}

static void cv_tiles_configure(const cv_tile_config *c) {
    uint8_t bytes[64];
    memcpy(bytes, c, sizeof bytes);
    memset(tile_model.tiles, 0, sizeof tile_model.tiles);
    tile_model.palette = bytes[0];
    tile_model.configured++;
    if (bytes[0] == 0) return; /* as tilerelease */
    tile_require(bytes[0] == 1, "ldtilecfg: there is no such palette");
    tile_require(bytes[1] < CV_TILE_ROWS, "ldtilecfg: the start row lies past the last one");
    tile_require(bytes[1] == 0, "ldtilecfg: a start row continues an interrupted instruction, which no kernel does");
    tile_require(tile_all_zero(bytes + 2, 14), "ldtilecfg: reserved bytes are set");
    tile_require(tile_all_zero(bytes + 32, 16) && tile_all_zero(bytes + 56, 8), "ldtilecfg: palette 1 has eight tiles");
    for (size_t t = 0; t < CV_TILES; t++) {
        const size_t row_bytes = (size_t)bytes[16 + 2 * t] | (size_t)bytes[17 + 2 * t] << 8, rows = bytes[48 + t];
        tile_require(row_bytes <= CV_TILE_ROW_BYTES, "ldtilecfg: more than 64 bytes a row");
        tile_require(rows <= CV_TILE_ROWS, "ldtilecfg: more than 16 rows");
        tile_require(!rows == !row_bytes, "ldtilecfg: rows without bytes, or bytes without rows");
        tile_model.tiles[t].rows = rows;
        tile_model.tiles[t].row_bytes = row_bytes;
    }
}

static void cv_tiles_release(void) {
    memset(tile_model.tiles, 0, sizeof tile_model.tiles);
    tile_model.palette = 0;
    tile_model.released++;
}

static void tile_exists(size_t tile, const char *instruction) {
    if (tile_model.palette == 1 && tile < CV_TILES && tile_model.tiles[tile].rows) return;
    fprintf(stderr, "tile model: %s of tile %zu, which is not configured\n", instruction, tile);
    abort();
}

static void cv_tile_zero(size_t tile) {
    tile_exists(tile, "tilezero");
    memset(tile_model.tiles[tile].data, 0, sizeof tile_model.tiles[tile].data);
}

static void cv_tile_load(size_t tile, const void *from, size_t stride) {
    tile_exists(tile, "tileloadd");
    memset(tile_model.tiles[tile].data, 0, sizeof tile_model.tiles[tile].data);
    for (size_t i = 0; i < tile_model.tiles[tile].rows; i++) memcpy(tile_model.tiles[tile].data[i], (const uint8_t *)from + i * stride, tile_model.tiles[tile].row_bytes);
}

static void cv_tile_store(size_t tile, void *to, size_t stride) {
    tile_exists(tile, "tilestored");
    for (size_t i = 0; i < tile_model.tiles[tile].rows; i++) memcpy((uint8_t *)to + i * stride, tile_model.tiles[tile].data[i], tile_model.tiles[tile].row_bytes);
}

/* tdpbsud: signed a, unsigned b. */
static void cv_tile_dot(size_t sums, size_t a, size_t b) {
    tile_exists(sums, "tdpbsud");
    tile_exists(a, "tdpbsud");
    tile_exists(b, "tdpbsud");
    tile_require(sums != a && a != b && sums != b, "tdpbsud: two operands are the same tile");
    const size_t m = tile_model.tiles[sums].rows, n = tile_model.tiles[sums].row_bytes / 4, k = tile_model.tiles[a].row_bytes / 4;
    tile_require(tile_model.tiles[sums].row_bytes % 4 == 0 && tile_model.tiles[a].row_bytes % 4 == 0 && tile_model.tiles[b].row_bytes % 4 == 0, "tdpbsud: rows are not whole groups of four bytes");
    tile_require(tile_model.tiles[b].row_bytes == 4 * n, "tdpbsud: sums and the second factor have different columns");
    tile_require(tile_model.tiles[a].rows == m, "tdpbsud: sums and the first factor have different rows");
    tile_require(tile_model.tiles[b].rows == k, "tdpbsud: the factors' inner sizes differ");
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            uint32_t sum;
            memcpy(&sum, tile_model.tiles[sums].data[i] + 4 * j, 4);
            for (size_t x = 0; x < k; x++)
                for (size_t y = 0; y < 4; y++) sum += (uint32_t)((int32_t)(int8_t)tile_model.tiles[a].data[i][4 * x + y] * (int32_t)tile_model.tiles[b].data[x][4 * j + y]);
            memcpy(tile_model.tiles[sums].data[i] + 4 * j, &sum, 4);
        }
    tile_model.dots++;
}

#endif
