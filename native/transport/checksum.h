/* checksum.h — a fast checksum of messages on paths that nobody else can write to (shared memory, RDMA cables): it finds damage and mix-ups,
 * not attacks. Eight lanes of 64-bit words, each h = rotate(h xor word)·odd, which no change of one word survives unseen. */
#ifndef CV_TRANSPORT_CHECKSUM_H
#define CV_TRANSPORT_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t lane[8];
    uint64_t bytes;
    uint8_t rest[64];
} cv_checksum;

void cv_checksum_start(cv_checksum *c);
/* The pieces' boundaries do not matter. */
void cv_checksum_add(cv_checksum *c, const void *data, size_t bytes);
uint64_t cv_checksum_finish(const cv_checksum *c);

#endif
