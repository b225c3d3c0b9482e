/* rdma.c — frames over RDMA queue pairs. A send's completion says nothing about arrival, a dead peer gives no completion at all, and a
 * message without a posted receive is lost: so every frame has numbers and a checksum, receives are posted ahead and counted
 * as credits, and both sides send heartbeats on the cable itself. See rdma.h. */
#include "rdma.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checksum.h"

#define FRAME_MAGIC 0x31445643u /* "CVD1" */

_Static_assert(sizeof(cv_rdma_header) == 64, "the header has no padding");

static int failed(cv_rdma_link *l, const char *what) {
    snprintf(l->why, sizeof l->why, "%s", what);
    return -1;
}

static uint64_t check_of(cv_group *g, const cv_rdma_header *h, const uint8_t *payload) {
    uint64_t start = cv_now();
    cv_rdma_header plain = *h;
    plain.check = 0;
    cv_checksum c;
    cv_checksum_start(&c);
    cv_checksum_add(&c, &plain, sizeof plain);
    cv_checksum_add(&c, payload, h->length);
    uint64_t sum = cv_checksum_finish(&c);
    atomic_fetch_add_explicit(&g->mac_ns, cv_now() - start, memory_order_relaxed);
    return sum;
}

/* ---- posting ---- */

int cv_rdma_post_recv(cv_rdma *s, cv_rdma_link *l, uint32_t lane) {
    cv_lane *a = &l->lanes[lane];
    uint32_t i = a->posted % a->ring;
    vb_sge sge = {(uintptr_t)(a->recv_memory + (size_t)i * a->slot), a->slot, l->device->mr->lkey};
    vb_recv_wr wr = {.wr_id = (uint64_t)lane << 32 | i, .sg_list = &sge, .num_sge = 1};
    int error = s->verbs->post_recv(s->verbs, l->lanes[lane].qp, &wr);
    if (!error) a->posted++;
    return error;
}

static bool has_room(const cv_lane *a, uint32_t reserve) { return (int32_t)(a->credit - a->sent) > (int32_t)reserve && a->sent - a->sent_done < a->ring; }

/* Posts one frame; the caller has checked has_room. Always the whole slot: the receive on the other side has that size. */
static int post(cv_group *g, cv_rdma *s, cv_rdma_link *l, uint32_t lane, cv_rdma_header *h, const uint8_t *payload) {
    cv_lane *a = &l->lanes[lane];
    uint32_t i = a->sent % a->ring;
    uint8_t *slot = a->send_memory + (size_t)i * a->slot;
    h->magic = FRAME_MAGIC;
    h->lane_seq = a->sent;
    h->epoch = g->options.epoch;
    for (uint32_t k = 0; k < CV_LANES; k++) h->credit[k] = l->lanes[k].posted;
    h->check = check_of(g, h, payload);
    memcpy(slot, h, sizeof *h);
    if (h->length) memcpy(slot + sizeof *h, payload, h->length);
    vb_sge sge = {(uintptr_t)slot, a->slot, l->device->mr->lkey};
    vb_send_wr wr = {.wr_id = 1ull << 40 | (uint64_t)lane << 32 | i, .sg_list = &sge, .num_sge = 1, .opcode = VB_WR_SEND, .send_flags = VB_SEND_SIGNALED};
    int error = s->verbs->post_send(s->verbs, a->qp, &wr);
    if (error) {
        snprintf(l->why, sizeof l->why, "posting a send failed: %s%s%s", strerror(error), s->broken_rule[0] ? ": " : "", s->broken_rule);
        return -1;
    }
    a->sent++;
    for (uint32_t k = 0; k < CV_LANES; k++) l->lanes[k].told = l->lanes[k].posted;
    l->said_ns = cv_now();
    return 0;
}

int cv_rdma_beat(cv_group *g, cv_rdma *s, uint32_t peer, uint32_t lane) {
    cv_rdma_link *l = &s->links[peer];
    if (!has_room(&l->lanes[lane], 0)) return 0;
    cv_rdma_header h = {.channel = CV_RDMA_BEAT};
    return post(g, s, l, lane, &h, NULL) ? -1 : 1;
}

/* ---- taking what arrived ---- */

/* Copies one frame of the message that `t` receives. 0 or negative. */
static int deliver(cv_rdma_link *l, cv_transfer *t, const cv_rdma_header *h, const uint8_t *payload) {
    if (h->message_offset != t->done || h->message_bytes < t->done || h->length > h->message_bytes - t->done || (h->length == 0 && h->message_bytes != 0))
        return failed(l, "a frame that does not continue its message");
    if (t->any && t->done == 0) {
        if (h->message_bytes > t->most) return failed(l, "a message larger than the receiver takes");
        free(t->data);
        t->bytes = (size_t)h->message_bytes;
        t->data = malloc(t->bytes ? t->bytes : 1);
        if (!t->data) return failed(l, "no memory for a message");
    }
    if (h->message_bytes != t->bytes) {
        snprintf(l->why, sizeof l->why, "a message of %llu bytes where %zu were expected", (unsigned long long)h->message_bytes, t->bytes);
        return -1;
    }
    if (h->length) memcpy(t->data + t->done, payload, h->length);
    t->done += h->length;
    t->finished = t->done == t->bytes;
    l->recv_seq[t->channel]++;
    return 0;
}

static int stash(cv_rdma_link *l, const cv_rdma_header *h, const uint8_t *payload) {
    cv_stashed *n = malloc(sizeof *n + h->length);
    if (!n) return failed(l, "no memory for a frame");
    n->next = NULL;
    n->head = *h;
    memcpy(n->payload, payload, h->length);
    if (l->stash[h->channel]) l->stash_end[h->channel]->next = n;
    else l->stash[h->channel] = n;
    l->stash_end[h->channel] = n;
    l->stash_bytes += h->length;
    return 0;
}

/* Gives t the stashed frames that come next, wherever they are in the list: two lanes may swap neighbours. */
static int deliver_stashed(cv_rdma_link *l, cv_transfer *t) {
    int moved = 0;
    for (cv_stashed **at = &l->stash[t->channel], *before = NULL; *at && !t->finished;) {
        cv_stashed *n = *at;
        if (n->head.channel_seq != l->recv_seq[t->channel]) {
            before = n;
            at = &n->next;
            continue;
        }
        if (deliver(l, t, &n->head, n->payload)) return -1;
        moved = 1;
        l->stash_bytes -= n->head.length;
        *at = n->next;
        if (l->stash_end[t->channel] == n) l->stash_end[t->channel] = before;
        free(n);
        at = &l->stash[t->channel];
        before = NULL;
    }
    return moved;
}

static int take_frame(cv_group *g, cv_rdma *s, cv_rdma_link *l, uint32_t lane, uint32_t index, cv_transfer *wanted) {
    cv_lane *a = &l->lanes[lane];
    if (index != a->received % a->ring) return failed(l, "a receive completed out of order");
    const uint8_t *slot = a->recv_memory + (size_t)index * a->slot;
    cv_rdma_header h;
    memcpy(&h, slot, sizeof h);
    const uint8_t *payload = slot + sizeof h;
    if (h.magic != FRAME_MAGIC || h.length > a->slot - sizeof h) return failed(l, "what arrived is no frame");
    if (h.check != check_of(g, &h, payload)) return failed(l, "a frame whose checksum is wrong");
    if (h.epoch != g->options.epoch) return failed(l, "a frame of another epoch");
    if (h.lane_seq != a->received) return failed(l, "a frame was lost on the cable");
    a->received++;
    for (uint32_t k = 0; k < CV_LANES; k++)
        if ((int32_t)(h.credit[k] - l->lanes[k].credit) > 0) l->lanes[k].credit = h.credit[k];
    l->heard_ns = cv_now();
    if (h.channel == CV_RDMA_BEAT) l->beats_heard |= 1ull << lane;
    else if (h.channel >= CV_CHANNEL_COUNT) return failed(l, "a frame of no channel");
    else if (wanted && !wanted->finished && !wanted->sending && wanted->channel == h.channel && h.channel_seq == l->recv_seq[h.channel]) {
        if (deliver(l, wanted, &h, payload)) return -1;
    } else {
        if (l->stash_bytes > CV_STASH_MOST) return failed(l, "more than 64 MiB have come that nobody takes");
        if (stash(l, &h, payload)) return -1;
    }
    int error = cv_rdma_post_recv(s, l, lane);
    if (error) {
        snprintf(l->why, sizeof l->why, "posting a receive failed: %s%s%s", strerror(error), s->broken_rule[0] ? ": " : "", s->broken_rule);
        return -1;
    }
    return 0;
}

/* Tells the peer of our receives when it may be about to run out of them and nothing else goes its way. */
static int return_credits(cv_group *g, cv_rdma *s, uint32_t peer) {
    cv_rdma_link *l = &s->links[peer];
    for (uint32_t k = 0; k < CV_LANES; k++)
        if (l->lanes[k].posted - l->lanes[k].told >= l->lanes[k].ring / 2) return cv_rdma_beat(g, s, peer, CV_LANE_SMALL) < 0 ? -1 : 0;
    return 0;
}

int cv_rdma_poll(cv_group *g, cv_rdma *s, uint32_t peer, cv_transfer *wanted) {
    cv_rdma_link *l = &s->links[peer];
    int moved = 0;
    for (;;) {
        vb_wc wc[8];
        int n = s->verbs->poll_cq(s->verbs, l->cq, 8, wc);
        if (n < 0) return failed(l, "the completion queue failed");
        if (n == 0) break;
        moved = 1;
        for (int i = 0; i < n; i++) {
            if (wc[i].status != VB_WC_SUCCESS) {
                snprintf(l->why, sizeof l->why, "the cable or its other end failed (%s)", s->verbs->status_text(s->verbs, (int)wc[i].status));
                return -1;
            }
            uint32_t lane = (uint32_t)(wc[i].wr_id >> 32) & 1, index = (uint32_t)wc[i].wr_id;
            if (wc[i].wr_id >> 40) l->lanes[lane].sent_done++;
            else if (take_frame(g, s, l, lane, index, wanted)) return -1;
        }
    }
    return return_credits(g, s, peer) ? -1 : moved;
}

/* ---- the transport ---- */

static int send_some(cv_group *g, cv_rdma *s, cv_transfer *t) {
    cv_rdma_link *l = &s->links[t->peer];
    int moved = 0;
    while (!t->finished) {
        size_t left = t->bytes - t->done;
        uint32_t lane = left <= CV_SMALL_SLOT - sizeof(cv_rdma_header) ? CV_LANE_SMALL : CV_LANE_LARGE;
        cv_lane *a = &l->lanes[lane];
        if (!has_room(a, lane == CV_LANE_SMALL ? CV_RESERVED_CREDITS : 0)) return moved;
        size_t n = a->slot - sizeof(cv_rdma_header) < left ? a->slot - sizeof(cv_rdma_header) : left;
        cv_rdma_header h = {.channel = (uint16_t)t->channel, .length = (uint32_t)n, .channel_seq = l->send_seq[t->channel], .message_bytes = t->bytes, .message_offset = t->done};
        if (post(g, s, l, lane, &h, t->data ? t->data + t->done : NULL)) return -1;
        l->send_seq[t->channel]++;
        t->done += n;
        t->finished = t->done == t->bytes;
        moved = 1;
    }
    return moved;
}

static int progress(cv_group *g, cv_transfer *t) {
    cv_rdma *s = g->wire_state;
    cv_rdma_link *l = &s->links[t->peer];
    char why[sizeof l->why];
    pthread_mutex_lock(&l->lock);
    int moved = l->why[0] ? -1 : t->sending ? 0 : deliver_stashed(l, t), r = moved; /* after one failure the link stays broken */
    if (r >= 0) r = cv_rdma_poll(g, s, t->peer, t);
    if (r >= 0 && !t->sending && !t->finished) { /* a frame of the other lane may have come first */
        int more = deliver_stashed(l, t);
        r = more < 0 ? more : r | more;
    }
    if (r >= 0 && t->sending) {
        int sent = send_some(g, s, t);
        r = sent < 0 ? sent : r | sent;
    }
    memcpy(why, l->why, sizeof why);
    pthread_mutex_unlock(&l->lock);
    if (r >= 0) return (r | moved) > 0;
    return cv_group_suspect(g, t->peer, why);
}

/* There is nothing to sleep on: nap, the longer the longer nothing has happened. */
static void wait_for(cv_group *g, cv_transfer *t, size_t n, uint64_t until_ns, uint64_t idle_ns) {
    (void)g, (void)t, (void)n, (void)until_ns;
    uint64_t ns = idle_ns / 8 < 1 * CV_MS ? idle_ns / 8 : 1 * CV_MS;
    struct timespec nap = {0, (long)(ns < 20000 ? 20000 : ns)};
    nanosleep(&nap, NULL);
}

/* Monitor: keeps credits and heartbeats flowing while this rank computes, and notices a cable that brings nothing. */
static void beat(cv_group *g) {
    cv_rdma *s = g->wire_state;
    uint64_t now = cv_now(), silence = g->options.silence_ms * CV_MS, since_last = now - s->last_beat;
    s->last_beat = now;
    for (uint32_t r = 0; r < g->size; r++) {
        cv_rdma_link *l = &s->links[r];
        char why[sizeof l->why];
        if (!l->used || atomic_load(&g->peers[r].left) || atomic_load(&g->code) != CV_OK) continue;
        pthread_mutex_lock(&l->lock);
        int code = l->why[0] ? -1 : cv_rdma_poll(g, s, r, NULL);
        if (code >= 0 && now - l->said_ns >= silence / 8) code = cv_rdma_beat(g, s, r, CV_LANE_SMALL);
        if (since_last > silence / 2 && l->heard_ns < now) l->heard_ns += since_last < now - l->heard_ns ? since_last : now - l->heard_ns; /* we did not listen */
        uint64_t later = cv_now(), quiet = later > l->heard_ns ? later - l->heard_ns : 0, limit = (atomic_load(&g->waiting) > 0 ? 4 : 8) * silence / 5; /* looked at every fifth of a silence */
        memcpy(why, l->why, sizeof why);
        pthread_mutex_unlock(&l->lock);
        if (code < 0) cv_group_fail(g, CV_E_GROUP, (int)r, "rank %u is gone: %s", r, why);
        else if (quiet > limit && !atomic_load(&g->closing))
            cv_group_fail(g, CV_E_GROUP, (int)r, "nothing has come from rank %u over RDMA for %llu ms: its cable is out or its process is stopped", r, (unsigned long long)(quiet / CV_MS));
    }
}

static void close_rdma(cv_group *g) {
    cv_rdma_free(g, g->wire_state);
    g->wire_state = NULL;
}

const cv_wire cv_rdma_wire = {.kind = CV_TRANSPORT_RDMA, .progress = progress, .wait = wait_for, .beat = beat, .close = close_rdma, .one_shot_bytes = 32u << 10};
