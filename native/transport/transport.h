/* transport.h — how the ranks of one instance talk to each other while they compute: one interface over shared memory, RDMA
 * verbs and TCP. The public half (making a group, aborting it) is in caravan.h; this half is for the engine's compute threads.
 *
 * Every call blocks its own thread for at most `timeout_ms`, counted from the call. The first error poisons the group: it
 * and every later call give the same code and text, all other ranks fail within their own deadline, and only a new group
 * (a new epoch) works again. Two threads may call at the same time only where their (peer, channel) pairs differ.
 *
 * A message has a channel: messages of one channel between two ranks arrive in order and are matched by order. */
#ifndef CV_TRANSPORT_H
#define CV_TRANSPORT_H

#include <stddef.h>
#include <stdint.h>

#include "../include/caravan.h"

/* Channels: independent ordered streams between each pair of ranks. */
enum {
    CV_CHANNEL_REDUCE = 0, /* collectives inside a tensor group */
    CV_CHANNEL_HIDDEN = 1, /* hidden states from stage to stage */
    CV_CHANNEL_STEP = 2,   /* step descriptors from rank 0 */
    CV_CHANNEL_RESULT = 3, /* sampled tokens back to rank 0 */
    CV_CHANNEL_COUNT
};

/* A run of ranks [first, first + count) that take part in a collective; the caller is one of them. */
typedef struct {
    uint32_t first, count;
} cv_members;

uint32_t cv_group_rank(const cv_group *g);
uint32_t cv_group_size(const cv_group *g);

/* x[i] = Σ over members of their x[i], float32, added in rank order starting with the lowest rank: all members hold the same
 * bits. n may differ from call to call but not between members. Uses CV_CHANNEL_REDUCE. */
int cv_all_reduce(cv_group *g, cv_members m, float *x, size_t n, uint32_t timeout_ms);

/* Every member's `bytes` bytes, by rank: out [count][bytes]. bytes is the same on all members. Uses CV_CHANNEL_REDUCE. */
int cv_all_gather(cv_group *g, cv_members m, const void *mine, size_t bytes, void *out, uint32_t timeout_ms);

/* Sends or receives exactly `bytes` bytes. A receiver that expects another number of bytes than were sent gets CV_E_GROUP. */
int cv_send(cv_group *g, uint32_t peer, uint32_t channel, const void *data, size_t bytes, uint32_t timeout_ms);
int cv_recv(cv_group *g, uint32_t peer, uint32_t channel, void *data, size_t bytes, uint32_t timeout_ms);

/* Messages whose size the receiver does not know. cv_recv_any: *data is malloc'ed, to be freed by the caller; at most
 * `most` bytes. timeout_ms = 0 waits until a message, an abort or a failure (heartbeats go on meanwhile). */
int cv_send_any(cv_group *g, uint32_t peer, uint32_t channel, const void *data, size_t bytes, uint32_t timeout_ms);
int cv_recv_any(cv_group *g, uint32_t peer, uint32_t channel, void **data, size_t *bytes, size_t most, uint32_t timeout_ms);

int cv_group_barrier(cv_group *g, uint32_t timeout_ms);

/* The first error of the group as a sentence that names the rank; "" while there is none. Copied, any thread. */
void cv_group_error(cv_group *g, char *out, size_t out_size);

#endif
