/* checksum.h — a fast checksum of messages on paths that nobody else can write to (shared memory, RDMA cables): it finds damage and mix-ups,
 * not attacks. Eight lanes of 64-bit words, each with their sum and a sum of these sums that is turned by a bit a step, so that order counts; no
 * change of one word survives unseen. Additions alone, because every instruction set can make several at once. */
#ifndef CV_TRANSPORT_CHECKSUM_H
#define CV_TRANSPORT_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t sum[8], sums[8];
    uint64_t bytes;
    uint8_t rest[64];
} cv_checksum;

void cv_checksum_start(cv_checksum *c);
/* The pieces' boundaries do not matter. */
void cv_checksum_add(cv_checksum *c, const void *data, size_t bytes);
uint64_t cv_checksum_finish(const cv_checksum *c);

#endif
