/* checksum.c — see checksum.h. */
#include "checksum.h"

#include <string.h>

#define ODD 0x9e3779b97f4a7c15ull /* 2^64 / golden ratio */

static inline uint64_t mix(uint64_t h, uint64_t word) {
    h ^= word;
    return (h << 29 | h >> 35) * ODD;
}

void cv_checksum_start(cv_checksum *c) {
    for (uint64_t i = 0; i < 8; i++) c->sum[i] = c->sums[i] = (i + 1) * ODD;
    c->bytes = 0;
}

/* Two lanes: a vector register of every processor. As scalars the lanes would live in memory from block to block. */
typedef uint64_t pair __attribute__((vector_size(16)));

static inline pair turned(pair x) { return x << 1 | x >> 63; }

static const uint8_t *blocks(cv_checksum *c, const uint8_t *p, size_t n) {
    pair a[4], b[4], w[4];
    memcpy(a, c->sum, sizeof a);
    memcpy(b, c->sums, sizeof b);
    for (; n; n--, p += 64) {
        memcpy(w, p, sizeof w);
        a[0] += w[0], a[1] += w[1], a[2] += w[2], a[3] += w[3];
        b[0] = turned(b[0]) + a[0], b[1] = turned(b[1]) + a[1], b[2] = turned(b[2]) + a[2], b[3] = turned(b[3]) + a[3];
    }
    memcpy(c->sum, a, sizeof a);
    memcpy(c->sums, b, sizeof b);
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
    for (int i = 0; i < 8; i++) h = mix(mix(h, last.sum[i]), last.sums[i]);
    return h ^ h >> 31;
}
