/* conn.c — see conn.h. */
#include "conn.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "clock.h"

#define FRAME_MAGIC 0x31465643u /* "CVF1" */
#define SIGNED_BYTES offsetof(cv_frame_header, tag)
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS: SO_NOSIGPIPE is set on the socket */
#endif

_Static_assert(sizeof(cv_frame_header) == 64, "the frame header has no padding");
_Static_assert(SIGNED_BYTES == 48, "the tag is last");

int cv_conn_init(cv_conn *c, int fd, uint32_t self, uint32_t peer, uint32_t channel, uint64_t epoch, atomic_uint_fast64_t *mac_ns) {
    memset(c, 0, sizeof *c);
    c->fd = fd;
    c->self = self;
    c->peer = peer;
    c->channel = channel;
    c->epoch = epoch;
    c->mac_ns = mac_ns;
    c->staging = malloc(CV_STAGING_BYTES);
    return c->staging ? 0 : -1;
}

void cv_conn_close(cv_conn *c) {
    if (c->fd >= 0) close(c->fd);
    free(c->staging);
    free(c->summand);
    memset(c, 0, sizeof *c);
    c->fd = -1;
}

static int broken(cv_conn *c, const char *what) {
    snprintf(c->why, sizeof c->why, "%s", what);
    return CV_CONN_BROKEN;
}

static int lost(cv_conn *c, const char *doing) {
    snprintf(c->why, sizeof c->why, "%s: %s", doing, strerror(errno));
    return CV_CONN_CLOSED;
}

static void spent(cv_conn *c, uint64_t since) { atomic_fetch_add_explicit(c->mac_ns, cv_now() - since, memory_order_relaxed); }

/* Writes the header of the frame with t's next bytes, tag included. */
static void open_frame(cv_conn *c, const cv_transfer *t) {
    size_t length = t->bytes - t->done;
    if (length > CV_FRAME_MAX) length = CV_FRAME_MAX;
    c->out = (cv_frame_header){.magic = FRAME_MAGIC, .channel = (uint16_t)c->channel, .length = (uint32_t)length, .from = c->self,
                               .seq = c->send_seq, .epoch = c->epoch, .message_bytes = t->bytes, .message_offset = t->done};
    uint64_t start = cv_now();
    cv_mac mac;
    cv_mac_start(&mac, c->send_key, c->send_seq);
    cv_mac_add(&mac, &c->out, SIGNED_BYTES);
    if (length) cv_mac_add(&mac, t->data + t->done, length);
    cv_mac_finish(&mac, c->out.tag);
    spent(c, start);
    c->out_sent = 0;
    c->out_open = true;
}

static int progress_send(cv_conn *c, cv_transfer *t) {
    int moved = 0;
    while (!t->finished) {
        if (!c->out_open) open_frame(c, t);
        size_t length = c->out.length, whole = sizeof c->out + length;
        struct iovec iov[2];
        int pieces = 0;
        size_t payload_sent = 0;
        if (c->out_sent < sizeof c->out) iov[pieces++] = (struct iovec){(uint8_t *)&c->out + c->out_sent, sizeof c->out - c->out_sent};
        else payload_sent = c->out_sent - sizeof c->out;
        if (length > payload_sent) iov[pieces++] = (struct iovec){t->data + t->done + payload_sent, length - payload_sent};
        struct msghdr message = {.msg_iov = iov};
        message.msg_iovlen = (size_t)pieces;
        ssize_t n = sendmsg(c->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            if (errno == EINTR) continue;
            if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) return moved;
            return lost(c, "sending");
        }
        moved = 1;
        c->out_sent += (size_t)n;
        if (c->out_sent < whole) continue;
        c->out_open = false;
        c->send_seq++;
        t->done += length;
        t->finished = t->done == t->bytes;
    }
    return moved;
}

/* Checks the next frame's header against what this connection and t expect. */
static int take_header(cv_conn *c, cv_transfer *t) {
    memcpy(&c->in, c->staging + c->staged_from, sizeof c->in);
    c->staged_from += sizeof c->in;
    const cv_frame_header *h = &c->in;
    if (h->magic != FRAME_MAGIC || h->reserved != 0) return broken(c, "what it sent is no frame");
    if (h->channel != c->channel || h->from != c->peer) return broken(c, "a frame of another channel or rank");
    if (h->epoch != c->epoch) return broken(c, "a frame of another epoch");
    if (h->seq != c->recv_seq) return broken(c, "a frame out of sequence (lost, repeated or replayed)");
    if (h->length > CV_FRAME_MAX) return broken(c, "an oversized frame");
    if (h->message_offset != t->done || h->message_bytes < t->done || h->length > h->message_bytes - t->done ||
        (h->length == 0 && h->message_bytes != 0))
        return broken(c, "a frame that does not continue its message");
    if (t->done == 0 && t->any) {
        if (h->message_bytes > t->most) return broken(c, "a message larger than the receiver takes");
        free(t->data);
        t->data = malloc(h->message_bytes ? (size_t)h->message_bytes : 1);
        if (!t->data) return broken(c, "no memory for a message");
        t->bytes = (size_t)h->message_bytes;
    }
    if (h->message_bytes != t->bytes) {
        snprintf(c->why, sizeof c->why, "a message of %llu bytes where %zu were expected", (unsigned long long)h->message_bytes, t->bytes);
        return CV_CONN_BROKEN;
    }
    if (t->behind && !c->summand && !(c->summand = malloc(CV_FRAME_MAX))) return broken(c, "no memory for a frame");
    if (t->behind && h->length % sizeof(float)) return broken(c, "a frame that ends inside a number");
    c->in_open = true;
    c->in_got = 0;
    uint64_t start = cv_now();
    cv_mac_start(&c->in_mac, c->recv_key, c->recv_seq);
    cv_mac_add(&c->in_mac, h, SIGNED_BYTES);
    spent(c, start);
    return 0;
}

/* Where the open frame's next byte goes. */
static uint8_t *landing(const cv_conn *c, const cv_transfer *t) { return (t->behind ? (uint8_t *)c->summand : t->data + t->done) + c->in_got; }

static void took(cv_conn *c, const cv_transfer *t, size_t bytes) {
    uint64_t start = cv_now();
    cv_mac_add(&c->in_mac, landing(c, t), bytes);
    spent(c, start);
    c->in_got += bytes;
}

/* Reads into `first` (may be empty) and, what is more, into the staging buffer, which must be empty then. 1, 0 or CV_CONN_*. */
static int read_ahead(cv_conn *c, uint8_t *first, size_t bytes, size_t *got) {
    if (c->staged_from == c->staged_to) c->staged_from = c->staged_to = 0;
    if (c->staged_from) {
        memmove(c->staging, c->staging + c->staged_from, c->staged_to - c->staged_from);
        c->staged_to -= c->staged_from;
        c->staged_from = 0;
    }
    struct iovec iov[2];
    int pieces = 0;
    if (bytes) iov[pieces++] = (struct iovec){first, bytes};
    iov[pieces++] = (struct iovec){c->staging + c->staged_to, CV_STAGING_BYTES - c->staged_to};
    struct msghdr message = {.msg_iov = iov};
    message.msg_iovlen = (size_t)pieces;
    for (;;) {
        ssize_t n = recvmsg(c->fd, &message, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return 0;
        if (n < 0) return lost(c, "receiving");
        if (n == 0) {
            snprintf(c->why, sizeof c->why, "its connection closed");
            return CV_CONN_CLOSED;
        }
        *got = (size_t)n < bytes ? (size_t)n : bytes;
        c->staged_to += (size_t)n - *got;
        return 1;
    }
}

static int progress_receive(cv_conn *c, cv_transfer *t) {
    int moved = 0;
    while (!t->finished) {
        size_t got = 0;
        if (!c->in_open) {
            if (c->staged_to - c->staged_from < sizeof c->in) {
                int r = read_ahead(c, NULL, 0, &got);
                if (r <= 0) return r < 0 ? r : moved;
                moved = 1;
                continue;
            }
            int r = take_header(c, t);
            if (r < 0) return r;
        }
        size_t left = c->in.length - c->in_got, staged = c->staged_to - c->staged_from;
        if (left && staged) {
            size_t n = left < staged ? left : staged;
            memcpy(landing(c, t), c->staging + c->staged_from, n);
            c->staged_from += n;
            took(c, t, n);
            moved = 1;
        } else if (left) {
            int r = read_ahead(c, landing(c, t), left, &got);
            if (r <= 0) return r < 0 ? r : moved;
            took(c, t, got);
            moved = 1;
        }
        if (c->in_got < c->in.length) continue;
        if (t->behind && t->behind->done < t->done + c->in.length) return moved;
        uint8_t tag[CV_TAG_BYTES];
        cv_mac_finish(&c->in_mac, tag);
        if (!cv_mac_equal16(tag, c->in.tag)) return broken(c, "a frame whose MAC is wrong");
        if (t->behind) cv_add_floats((float *)(void *)(t->data + t->done), c->summand, c->in.length / sizeof(float), t->in_first);
        c->in_open = false;
        c->recv_seq++;
        t->done += c->in.length;
        t->finished = t->done == t->bytes;
        moved = 1;
    }
    return moved;
}

int cv_conn_progress(cv_conn *c, cv_transfer *t) {
    if (c->fd < 0) {
        snprintf(c->why, sizeof c->why, "it is not connected");
        return CV_CONN_CLOSED;
    }
    return t->sending ? progress_send(c, t) : progress_receive(c, t);
}
