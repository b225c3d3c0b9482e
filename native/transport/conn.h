/* conn.h — one TCP connection between two ranks, for one channel: messages cut into frames, each with length, channel, sequence
 * number, epoch and a MAC. Both directions have own keys and numbers. Nothing blocks; one thread a direction. */
#ifndef CV_TRANSPORT_CONN_H
#define CV_TRANSPORT_CONN_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "mac.h"

/* A message on its way, in one direction. `done` counts payload bytes that have moved. */
typedef struct cv_transfer {
    uint32_t peer, channel;
    bool sending;
    bool any;      /* receiving: the size is the sender's; data is malloc'ed when the first frame says how much */
    bool finished;
    uint8_t *data;
    size_t bytes;  /* sending and not any: of the message */
    size_t most;   /* any: largest size taken */
    size_t done;
    /* Not NULL: what comes are floats, and is added to data: data[i] + in[i] or, with in_first, in[i] + data[i]. `behind` sends the same
     * data; nothing is added to what it has not sent. */
    const struct cv_transfer *behind;
    bool in_first;
} cv_transfer;

/* x = x + in, or in + x: the same number, but where both are not numbers the first one's payload wins. */
void cv_add_floats(float *x, const float *in, size_t n, bool in_first);

#define CV_FRAME_MAX (256u << 10) /* payload bytes */
#define CV_STAGING_BYTES (64u << 10)

typedef struct {
    uint32_t magic;
    uint16_t channel, reserved;
    uint32_t length; /* of the payload behind this header */
    uint32_t from;   /* rank of the sender */
    uint64_t seq;    /* frames of this direction so far */
    uint64_t epoch;
    uint64_t message_bytes;  /* of the whole message */
    uint64_t message_offset; /* of this payload in it */
    uint8_t tag[CV_TAG_BYTES]; /* over the bytes above and the payload */
} cv_frame_header; /* 64 bytes */

typedef struct {
    int fd; /* -1: not connected */
    uint32_t self, peer, channel;
    uint64_t epoch;
    uint8_t send_key[CV_KEY_BYTES], recv_key[CV_KEY_BYTES];
    uint64_t send_seq, recv_seq;
    atomic_uint_fast64_t *mac_ns; /* time spent on MACs is added here */
    /* sending: the frame that is on its way */
    bool out_open;
    cv_frame_header out;
    size_t out_sent; /* bytes of header and payload */
    /* receiving */
    bool in_open;
    cv_frame_header in;
    size_t in_got; /* payload bytes */
    cv_mac in_mac;
    uint8_t *staging; /* [CV_STAGING_BYTES] bytes that were read ahead */
    float *summand;   /* [CV_FRAME_MAX bytes] the frame that is to be added, once it has proved genuine; NULL until there is one */
    size_t staged_from, staged_to;
    char why[160]; /* what went wrong, after a negative result */
} cv_conn;

enum { CV_CONN_CLOSED = -1, /* the other side is gone */ CV_CONN_BROKEN = -2 /* what came is no frame of this connection */ };

/* Takes the descriptor over. 0, or -1 without memory. */
int cv_conn_init(cv_conn *c, int fd, uint32_t self, uint32_t peer, uint32_t channel, uint64_t epoch, atomic_uint_fast64_t *mac_ns);
void cv_conn_close(cv_conn *c);

/* Moves what can be moved without blocking. 1 when bytes moved, 0 when none could, else CV_CONN_*. Sets t->finished. */
int cv_conn_progress(cv_conn *c, cv_transfer *t);

#endif
