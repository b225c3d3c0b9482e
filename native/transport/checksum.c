/* checksum.c — see checksum.h. */
#include "checksum.h"

#include <string.h>

#define ODD 0x9e3779b97f4a7c15ull /* 2^64 / golden ratio */

static inline uint64_t mix(uint64_t h, uint64_t word) {
    h ^= word;
    return (h << 29 | h >> 35) * ODD;
}

void cv_checksum_start(cv_checksum *c) {
    for (uint64_t i = 0; i < 8; i++) c->lane[i] = (i + 1) * ODD;
    c->bytes = 0;
}

static const uint8_t *blocks(cv_checksum *c, const uint8_t *p, size_t n) {
    uint64_t a[8], w[8];
    memcpy(a, c->lane, sizeof a);
    for (; n; n--, p += 64) {
        memcpy(w, p, sizeof w);
        for (int i = 0; i < 8; i++) a[i] = mix(a[i], w[i]);
    }
    memcpy(c->lane, a, sizeof a);
    return p;
}

void cv_checksum_add(cv_checksum *c, const void *data, size_t bytes) {
    const uint8_t *p = data;
    size_t have = c->bytes % 64;
    c->bytes += bytes;
    if (have) {
        size_t n = 64 - have < bytes ? 64 - have : bytes;
        memcpy(c->rest + have, p, n);
        p += n;
        bytes -= n;
        if (have + n < 64) return;
        blocks(c, c->rest, 1);
    }
    p = blocks(c, p, bytes / 64);
    if (bytes % 64) memcpy(c->rest, p, bytes % 64);
}

uint64_t cv_checksum_finish(const cv_checksum *c) {
    cv_checksum last = *c;
    size_t have = last.bytes % 64;
    if (have) {
        memset(last.rest + have, 0, 64 - have);
        blocks(&last, last.rest, 1);
    }
    uint64_t h = mix(ODD, last.bytes);
    for (int i = 0; i < 8; i++) h = mix(h, last.lane[i] ^ last.lane[i] >> 32);
    return h ^ h >> 31;
}
