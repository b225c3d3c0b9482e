/* tile_config.h — what ldtilecfg reads: the shapes of eight tiles, as palette 1 has them. */
#ifndef CV_X86_TILE_CONFIG_H
#define CV_X86_TILE_CONFIG_H

#include <stddef.h>
#include <stdint.h>

enum { CV_TILES = 8, CV_TILE_ROWS = 16, CV_TILE_ROW_BYTES = 64, CV_TILE_PALETTE = 1 };

/* A tile without rows and bytes does not exist. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16]; /* of tile i, at most CV_TILE_ROW_BYTES; from CV_TILES on zero */
    uint8_t rows[16];       /* at most CV_TILE_ROWS */
} cv_tile_config;

_Static_assert(sizeof(cv_tile_config) == 64, "ldtilecfg reads 64 bytes");

#endif
