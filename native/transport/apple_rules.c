/* apple_rules.c — a verbs table that refuses what RDMA over Thunderbolt refuses, so that the software device of the tests, which is much more
 * patient, shows when the transport would fail on a Mac. The rules are those of docs/transport.md, with their errors where they
 * are known. Every refusal leaves a sentence; correct use passes through unchanged. */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "verbs.h"

#define FRAME 4096u
#define MOST_QPS 10         /* a device */
#define MOST_REGIONS 100    /* a device */
#define MOST_OUTSTANDING 32 /* work requests a queue */
#define MOST_FRAMES 4095u   /* a queue's depth, counted in frames */
#define PAGE 16384u
#define TRACKED 256

typedef struct {
    vb_qp *qp;
    vb_context *context;
    vb_pd *pd;
    vb_cq *cq; /* of both directions */
    uint32_t state, number;
    uint32_t sends, sends_frames;                  /* outstanding */
    uint32_t recv_frames[MOST_OUTSTANDING], first, recvs; /* frames of the posted receives, in order */
} tracked_qp;

typedef struct {
    vb_mr *mr;
    vb_context *context;
    vb_pd *pd;
} tracked_mr;

typedef struct {
    cv_verbs table;
    cv_verbs *inner;
    char *broken;
    size_t broken_size;
    pthread_mutex_t lock;
    tracked_qp qps[TRACKED];
    tracked_mr mrs[TRACKED];
} apple;

#define SELF(v) ((apple *)(v))
#define INNER(v) (SELF(v)->inner)

/* Keeps the first broken rule; gives the errno value back. */
static int refuse(apple *a, int error, const char *rule) {
    if (!a->broken[0]) snprintf(a->broken, a->broken_size, "Apple's rules: %s", rule);
    errno = error;
    return error;
}

static tracked_qp *qp_of(apple *a, const vb_qp *qp) {
    for (size_t i = 0; i < TRACKED; i++)
        if (a->qps[i].qp == qp) return &a->qps[i];
    return NULL;
}

static uint32_t frames_of(uint64_t bytes) { return bytes ? (uint32_t)((bytes + FRAME - 1) / FRAME) : 1; }

/* Whether a piece of memory lies within the region of its key. */
static bool registered(apple *a, const vb_pd *pd, const vb_sge *s) {
    for (size_t i = 0; i < TRACKED; i++) {
        const vb_mr *m = a->mrs[i].mr;
        if (m && m->lkey == s->lkey && a->mrs[i].pd == pd && s->addr >= (uintptr_t)m->addr && s->addr + s->length <= (uintptr_t)m->addr + m->length) return true;
    }
    return false;
}

/* ---- regions and queue pairs ---- */

static vb_mr *reg_mr(cv_verbs *v, vb_pd *pd, void *memory, size_t bytes, int access) {
    apple *a = SELF(v);
    pthread_mutex_lock(&a->lock);
    size_t here = 0, at = TRACKED;
    for (size_t i = 0; i < TRACKED; i++) {
        if (a->mrs[i].mr && a->mrs[i].context == pd->context) here++;
        if (!a->mrs[i].mr && at == TRACKED) at = i;
    }
    vb_mr *mr = NULL;
    if ((uintptr_t)memory % PAGE) refuse(a, EINVAL, "memory is registered in whole pages of 16 KiB");
    else if (here >= MOST_REGIONS || at == TRACKED) refuse(a, ENOMEM, "a device has about 100 memory regions: register one and carve slots");
    else mr = a->inner->reg_mr(a->inner, pd, memory, bytes, access);
    if (mr) a->mrs[at] = (tracked_mr){mr, pd->context, pd};
    pthread_mutex_unlock(&a->lock);
    return mr;
}

static int dereg_mr(cv_verbs *v, vb_mr *mr) {
    apple *a = SELF(v);
    pthread_mutex_lock(&a->lock);
    int error = 0;
    for (size_t i = 0; i < TRACKED; i++)
        if (a->qps[i].qp && a->qps[i].pd == mr->pd) error = refuse(a, EBUSY, "queue pairs are destroyed before their memory is deregistered");
    for (size_t i = 0; i < TRACKED && !error; i++)
        if (a->mrs[i].mr == mr) a->mrs[i].mr = NULL;
    pthread_mutex_unlock(&a->lock);
    return error ? error : a->inner->dereg_mr(a->inner, mr);
}

static vb_qp *create_qp(cv_verbs *v, vb_pd *pd, vb_qp_init_attr *attr) {
    apple *a = SELF(v);
    pthread_mutex_lock(&a->lock);
    size_t here = 0, at = TRACKED;
    for (size_t i = 0; i < TRACKED; i++) {
        if (a->qps[i].qp && a->qps[i].context == pd->context) here++;
        if (!a->qps[i].qp && at == TRACKED) at = i;
    }
    vb_qp *qp = NULL;
    if (attr->qp_type != VB_QPT_UC) refuse(a, EOPNOTSUPP, "only unreliable-connected queue pairs exist");
    else if (here >= MOST_QPS || at == TRACKED) refuse(a, EBUSY, "a device has 10 queue pairs");
    else if (attr->cap.max_send_wr > MOST_OUTSTANDING || attr->cap.max_recv_wr > MOST_OUTSTANDING) refuse(a, EINVAL, "queues deeper than 32 requests are not to be relied on");
    else if (attr->cap.max_send_sge > 1 || attr->cap.max_recv_sge > 1 || attr->cap.max_inline_data) refuse(a, EINVAL, "a request has one piece of memory, and none inline");
    else qp = a->inner->create_qp(a->inner, pd, attr);
    if (qp) a->qps[at] = (tracked_qp){.qp = qp, .context = pd->context, .pd = pd, .cq = attr->recv_cq, .number = qp->qp_num};
    pthread_mutex_unlock(&a->lock);
    return qp;
}

static int destroy_qp(cv_verbs *v, vb_qp *qp) {
    apple *a = SELF(v);
    pthread_mutex_lock(&a->lock);
    tracked_qp *t = qp_of(a, qp);
    if (t) t->qp = NULL;
    pthread_mutex_unlock(&a->lock);
    return a->inner->destroy_qp(a->inner, qp);
}

/* The path must lead between the IPv4 addresses of the two ports, with the index as it is now. */
static int check_path(apple *a, const tracked_qp *t, const vb_qp_attr *attr) {
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
    vb_gid own;
    if (memcmp(attr->ah_attr.grh.dgid.raw, mapped, sizeof mapped)) return refuse(a, EINVAL, "the other side's GID is its IPv4 address");
    if (a->inner->query_gid(a->inner, t->context, 1, attr->ah_attr.grh.sgid_index, &own) || memcmp(own.raw, mapped, sizeof mapped))
        return refuse(a, EINVAL, "the GID index is that of the port's IPv4 address, looked up each time");
    return 0;
}

static int modify_qp(cv_verbs *v, vb_qp *qp, vb_qp_attr *attr, int mask) {
    apple *a = SELF(v);
    pthread_mutex_lock(&a->lock);
    tracked_qp *t = qp_of(a, qp);
    int error = 0;
    if (!t || !(mask & VB_QP_STATE)) error = refuse(a, EINVAL, "a queue pair is brought up state by state");
    else if (attr->qp_state == VB_QPS_ERR) error = refuse(a, EINVAL, "a queue pair is destroyed, never moved to the error state");
    else if (attr->qp_state != t->state + 1 || attr->qp_state > VB_QPS_RTS) error = refuse(a, EINVAL, "a queue pair goes from INIT over RTR to RTS");
    else if (attr->qp_state == VB_QPS_RTR) error = check_path(a, t, attr);
    if (!error) error = a->inner->modify_qp(a->inner, qp, attr, mask);
    if (!error) t->state = attr->qp_state;
    pthread_mutex_unlock(&a->lock);
    return error;
}

/* ---- requests ---- */

static int check_request(apple *a, const tracked_qp *t, const vb_sge *list, int n, const void *next) {
    if (!t || t->state != VB_QPS_RTS) return refuse(a, EINVAL, "sends and receives are posted only after RTS");
    if (n != 1 || next) return refuse(a, EINVAL, "a request has one piece of memory, and none inline");
    if (frames_of(list->length) > MOST_FRAMES) return refuse(a, EINVAL, "a message has at most 4095 frames of 4 KiB");
    if (!registered(a, t->pd, list)) return refuse(a, EFAULT, "requests use registered memory of their domain");
    return 0;
}

static int post_send(cv_verbs *v, vb_qp *qp, vb_send_wr *wr) {
    apple *a = SELF(v);
    pthread_mutex_lock(&a->lock);
    tracked_qp *t = qp_of(a, qp);
    int error = check_request(a, t, wr->sg_list, wr->num_sge, wr->next);
    if (!error && wr->opcode != VB_WR_SEND) error = refuse(a, EOPNOTSUPP, "SEND and RECV are the only operations");
    if (!error && !(wr->send_flags & VB_SEND_SIGNALED)) error = refuse(a, EINVAL, "every send is signaled, or its slot is never known to be free");
    if (!error && (t->sends >= MOST_OUTSTANDING || t->sends_frames + frames_of(wr->sg_list->length) > MOST_FRAMES)) error = refuse(a, ENOMEM, "a queue holds 32 requests and 4095 frames");
    if (!error) error = a->inner->post_send(a->inner, qp, wr);
    if (!error) {
        t->sends++;
        t->sends_frames += frames_of(wr->sg_list->length);
    }
    pthread_mutex_unlock(&a->lock);
    return error;
}

static int post_recv(cv_verbs *v, vb_qp *qp, vb_recv_wr *wr) {
    apple *a = SELF(v);
    pthread_mutex_lock(&a->lock);
    tracked_qp *t = qp_of(a, qp);
    int error = check_request(a, t, wr->sg_list, wr->num_sge, wr->next);
    if (!error && t->recvs >= MOST_OUTSTANDING) error = refuse(a, ENOMEM, "a queue holds 32 requests and 4095 frames");
    if (!error) error = a->inner->post_recv(a->inner, qp, wr);
    if (!error) t->recv_frames[(t->first + t->recvs++) % MOST_OUTSTANDING] = frames_of(wr->sg_list->length);
    pthread_mutex_unlock(&a->lock);
    return error;
}

/* What arrived must span as many frames as the receive that it met. */
static int take_completion(apple *a, const vb_cq *cq, const vb_wc *wc) {
    if (wc->status != VB_WC_SUCCESS) return 0;
    for (size_t i = 0; i < TRACKED; i++) {
        tracked_qp *t = &a->qps[i];
        if (!t->qp || t->cq != cq || t->number != wc->qp_num) continue; /* numbers are a device's own */
        if (!(wc->opcode & VB_WC_RECV)) {
            if (t->sends) t->sends_frames -= t->sends_frames / t->sends--; /* all of a queue's sends have one size */
            return 0;
        }
        if (!t->recvs) return 0;
        uint32_t frames = t->recv_frames[t->first % MOST_OUTSTANDING];
        t->first++;
        t->recvs--;
        if (frames_of(wc->byte_len) != frames) return refuse(a, EPROTO, "a SEND and its RECV span the same number of 4 KiB frames");
        return 0;
    }
    return 0;
}

static int poll_cq(cv_verbs *v, vb_cq *cq, int n, vb_wc *out) {
    apple *a = SELF(v);
    pthread_mutex_lock(&a->lock);
    int got = a->inner->poll_cq(a->inner, cq, n, out);
    for (int i = 0; i < got; i++)
        if (take_completion(a, cq, &out[i])) {
            got = -1;
            break;
        }
    pthread_mutex_unlock(&a->lock);
    return got;
}

/* ---- passed through ---- */

static vb_device **get_device_list(cv_verbs *v, int *n) { return INNER(v)->get_device_list(INNER(v), n); }
static void free_device_list(cv_verbs *v, vb_device **l) { INNER(v)->free_device_list(INNER(v), l); }
static const char *device_name(cv_verbs *v, vb_device *d) { return INNER(v)->device_name(INNER(v), d); }
static vb_context *open_device(cv_verbs *v, vb_device *d) { return INNER(v)->open_device(INNER(v), d); }
static int close_device(cv_verbs *v, vb_context *c) { return INNER(v)->close_device(INNER(v), c); }
static vb_pd *alloc_pd(cv_verbs *v, vb_context *c) { return INNER(v)->alloc_pd(INNER(v), c); }
static int dealloc_pd(cv_verbs *v, vb_pd *pd) { return INNER(v)->dealloc_pd(INNER(v), pd); }
static vb_cq *create_cq(cv_verbs *v, vb_context *c, int n) { return INNER(v)->create_cq(INNER(v), c, n); }
static int destroy_cq(cv_verbs *v, vb_cq *cq) { return INNER(v)->destroy_cq(INNER(v), cq); }
static int query_port(cv_verbs *v, vb_context *c, uint8_t p, vb_port_attr *out) { return INNER(v)->query_port(INNER(v), c, p, out); }
static int query_gid(cv_verbs *v, vb_context *c, uint8_t p, int i, vb_gid *out) { return INNER(v)->query_gid(INNER(v), c, p, i, out); }
static const char *status_text(cv_verbs *v, int status) { return INNER(v)->status_text(INNER(v), status); }

static void release(cv_verbs *v) {
    INNER(v)->release(INNER(v));
    pthread_mutex_destroy(&SELF(v)->lock);
    free(v);
}

cv_verbs *cv_apple_rules(cv_verbs *inner, char *broken, size_t size) {
    apple *a = calloc(1, sizeof *a);
    if (!a) return NULL;
    a->inner = inner;
    a->broken = broken;
    a->broken_size = size;
    pthread_mutex_init(&a->lock, NULL);
    a->table = (cv_verbs){get_device_list, free_device_list, device_name, open_device, close_device, alloc_pd, dealloc_pd, reg_mr, dereg_mr, create_cq, destroy_cq,
                          create_qp, destroy_qp, modify_qp, query_port, query_gid, post_send, post_recv, poll_cq, status_text, release};
    return &a->table;
}
