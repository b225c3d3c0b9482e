/* apple_cases.h — the wrapper that enforces Apple's rules (native/transport/apple_rules.c), over a table of fakes that accept everything: correct
 * use passes, and each rule that is broken on purpose is refused with its own sentence. */
#ifndef CV_TEST_APPLE_CASES_H
#define CV_TEST_APPLE_CASES_H

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../transport/verbs.h"
#include "check.h"

typedef struct {
    cv_verbs table;
    uint32_t made;
    vb_wc next; /* what poll_cq gives */
    int has_next;
} fakes;

static inline vb_mr *fake_reg(cv_verbs *v, vb_pd *pd, void *m, size_t n, int access) {
    (void)access;
    vb_mr *mr = calloc(1, sizeof *mr);
    *mr = (vb_mr){.context = pd->context, .pd = pd, .addr = m, .length = n, .lkey = ++((fakes *)v)->made};
    return mr;
}
static inline int fake_dereg(cv_verbs *v, vb_mr *mr) {
    (void)v;
    free(mr);
    return 0;
}
static inline vb_qp *fake_qp(cv_verbs *v, vb_pd *pd, vb_qp_init_attr *a) {
    (void)a;
    vb_qp *qp = calloc(1, sizeof *qp);
    *qp = (vb_qp){.context = pd->context, .pd = pd, .qp_num = ++((fakes *)v)->made};
    return qp;
}
static inline int fake_destroy(cv_verbs *v, vb_qp *qp) {
    (void)v;
    free(qp);
    return 0;
}
static inline int fake_modify(cv_verbs *v, vb_qp *qp, vb_qp_attr *a, int mask) { return (void)v, (void)qp, (void)a, (void)mask, 0; }
static inline int fake_gid(cv_verbs *v, vb_context *c, uint8_t port, int i, vb_gid *out) {
    (void)v, (void)c, (void)port;
    memset(out, 0, sizeof *out);
    if (i == 1) out->raw[10] = out->raw[11] = 0xff; /* index 1 is the IPv4 address */
    return 0;
}
static inline int fake_send(cv_verbs *v, vb_qp *qp, vb_send_wr *wr) { return (void)v, (void)qp, (void)wr, 0; }
static inline int fake_recv(cv_verbs *v, vb_qp *qp, vb_recv_wr *wr) { return (void)v, (void)qp, (void)wr, 0; }
static inline int fake_poll(cv_verbs *v, vb_cq *cq, int n, vb_wc *out) {
    (void)cq, (void)n;
    fakes *f = (fakes *)v;
    if (!f->has_next) return 0;
    f->has_next = 0;
    *out = f->next;
    return 1;
}
static inline void fake_release(cv_verbs *v) { (void)v; }

typedef struct {
    fakes f;
    cv_verbs *v;
    char broken[200];
    vb_pd pd;
    uint8_t *memory;
    vb_mr *mr;
    vb_qp *qp;
} bench;

/* A queue pair in RTS over the wrapper, with 64 KiB of registered memory. */
static inline void bench_open(bench *b) {
    memset(b, 0, sizeof *b);
    b->f.table = (cv_verbs){.reg_mr = fake_reg, .dereg_mr = fake_dereg, .create_qp = fake_qp, .destroy_qp = fake_destroy, .modify_qp = fake_modify, .query_gid = fake_gid,
                            .post_send = fake_send, .post_recv = fake_recv, .poll_cq = fake_poll, .release = fake_release};
    b->v = cv_apple_rules(&b->f.table, b->broken, sizeof b->broken);
    void *memory = NULL;
    if (!b->v || posix_memalign(&memory, 16384, 65536)) exit(3);
    b->memory = memory;
    b->mr = b->v->reg_mr(b->v, &b->pd, b->memory, 65536, VB_ACCESS_LOCAL_WRITE);
    vb_qp_init_attr attr = {.qp_type = VB_QPT_UC, .cap = {16, 16, 1, 1, 0}};
    b->qp = b->v->create_qp(b->v, &b->pd, &attr);
}

static inline int move_qp(bench *b, uint32_t state) {
    vb_qp_attr a = {.qp_state = state, .ah_attr = {.grh = {.sgid_index = 1}}};
    a.ah_attr.grh.dgid.raw[10] = a.ah_attr.grh.dgid.raw[11] = 0xff;
    return b->v->modify_qp(b->v, b->qp, &a, VB_QP_STATE);
}

static inline void to_rts(bench *b) {
    for (uint32_t s = VB_QPS_INIT; s <= VB_QPS_RTS; s++)
        if (move_qp(b, s)) exit(3);
}

static inline int send_bytes(bench *b, uint32_t bytes, uint32_t opcode, uint32_t flags) {
    vb_sge s = {(uintptr_t)b->memory, bytes, b->mr->lkey};
    vb_send_wr wr = {.sg_list = &s, .num_sge = 1, .opcode = opcode, .send_flags = flags};
    return b->v->post_send(b->v, b->qp, &wr);
}

static inline int receive_bytes(bench *b, uint32_t bytes) {
    vb_sge s = {(uintptr_t)b->memory, bytes, b->mr->lkey};
    vb_recv_wr wr = {.sg_list = &s, .num_sge = 1};
    return b->v->post_recv(b->v, b->qp, &wr);
}

static inline int arrive(bench *b, uint32_t bytes) {
    vb_wc wc;
    b->f.next = (vb_wc){.opcode = VB_WC_RECV, .byte_len = bytes, .qp_num = b->qp->qp_num};
    b->f.has_next = 1;
    return b->v->poll_cq(b->v, NULL, 1, &wc);
}

static inline void bench_close(bench *b) {
    if (b->qp) b->v->destroy_qp(b->v, b->qp);
    if (b->mr) b->v->dereg_mr(b->v, b->mr);
    b->v->release(b->v);
    free(b->memory);
}

/* Breaks rule number `k`; true when there is such a rule. *refused: the call failed; *name: what was done. */
static inline bool break_rule(bench *b, int k, bool *refused, const char **name) {
    vb_qp_init_attr attr = {.qp_type = VB_QPT_UC, .cap = {16, 16, 1, 1, 0}};
    vb_qp_attr a = {.qp_state = VB_QPS_RTR, .ah_attr = {.grh = {.sgid_index = 1}}};
    switch (k) {
    case 0: *name = "a reliable queue pair"; attr.qp_type = VB_QPT_RC; *refused = !b->v->create_qp(b->v, &b->pd, &attr) && errno == EOPNOTSUPP; return true;
    case 1: {
        *name = "an eleventh queue pair";
        vb_qp *more[10] = {0};
        for (int i = 0; i < 9; i++) more[i] = b->v->create_qp(b->v, &b->pd, &attr);
        *refused = more[8] && !(more[9] = b->v->create_qp(b->v, &b->pd, &attr)) && errno == EBUSY;
        for (int i = 0; i < 10; i++)
            if (more[i]) b->v->destroy_qp(b->v, more[i]);
        return true;
    }
    case 2: *name = "memory that begins inside a page"; *refused = !b->v->reg_mr(b->v, &b->pd, b->memory + 4096, 4096, 1); return true;
    case 3: {
        *name = "a region more than a device has";
        vb_mr *more[100] = {0};
        for (int i = 0; i < 99; i++) more[i] = b->v->reg_mr(b->v, &b->pd, b->memory, 16384, 1);
        *refused = more[98] && !(more[99] = b->v->reg_mr(b->v, &b->pd, b->memory, 16384, 1));
        b->v->destroy_qp(b->v, b->qp);
        b->qp = NULL;
        for (int i = 0; i < 100; i++)
            if (more[i]) b->v->dereg_mr(b->v, more[i]);
        return true;
    }
    case 4: *name = "a receive before RTS"; move_qp(b, VB_QPS_INIT); move_qp(b, VB_QPS_RTR); *refused = receive_bytes(b, 4096) != 0; return true;
    case 5: *name = "a step over RTR"; move_qp(b, VB_QPS_INIT); *refused = move_qp(b, VB_QPS_RTS) != 0; return true;
    case 6: *name = "the error state"; to_rts(b); *refused = move_qp(b, VB_QPS_ERR) != 0; return true;
    case 7: *name = "memory deregistered before its queue pair is destroyed"; to_rts(b); *refused = b->v->dereg_mr(b->v, b->mr) != 0; return true;
    case 8: *name = "an RDMA write"; to_rts(b); *refused = send_bytes(b, 4096, 0, VB_SEND_SIGNALED) != 0; return true;
    case 9: *name = "a send that nobody hears of"; to_rts(b); *refused = send_bytes(b, 4096, VB_WR_SEND, 0) != 0; return true;
    case 10: *name = "memory outside the region"; to_rts(b); *refused = send_bytes(b, 65537, VB_WR_SEND, VB_SEND_SIGNALED) != 0; return true;
    case 11: *name = "a 33rd send"; to_rts(b); *refused = true; for (int i = 0; i < 33; i++) *refused = (send_bytes(b, 4096, VB_WR_SEND, VB_SEND_SIGNALED) != 0) == (i == 32) && *refused; return true;
    case 12: *name = "a 33rd receive"; to_rts(b); *refused = true; for (int i = 0; i < 33; i++) *refused = (receive_bytes(b, 4096) != 0) == (i == 32) && *refused; return true;
    case 13: *name = "a short send into a long receive"; to_rts(b); receive_bytes(b, 32768); *refused = arrive(b, 4096) < 0; return true;
    case 14: *name = "a GID that is no IPv4 address"; move_qp(b, VB_QPS_INIT); *refused = b->v->modify_qp(b->v, b->qp, &a, VB_QP_STATE) != 0; return true;
    case 15:
        *name = "a GID index that was assumed";
        move_qp(b, VB_QPS_INIT);
        a.ah_attr.grh.dgid.raw[10] = a.ah_attr.grh.dgid.raw[11] = 0xff;
        a.ah_attr.grh.sgid_index = 0;
        *refused = b->v->modify_qp(b->v, b->qp, &a, VB_QP_STATE) != 0;
        return true;
    default: return false;
    }
}

static inline void apple_cases(cv_checks *c) {
    cv_case(c, "the wrapper of Apple's rules lets correct use pass");
    bench b;
    bench_open(&b);
    to_rts(&b);
    for (int i = 0; i < 100; i++) {
        cv_check(c, receive_bytes(&b, 4096) == 0 && arrive(&b, 4000) == 1, "receive %d: %s", i, b.broken);
        b.f.next = (vb_wc){.opcode = 0, .qp_num = b.qp->qp_num};
        cv_check(c, send_bytes(&b, 4096, VB_WR_SEND, VB_SEND_SIGNALED) == 0, "send %d: %s", i, b.broken);
        b.f.has_next = 1;
        vb_wc wc;
        cv_check(c, b.v->poll_cq(b.v, NULL, 1, &wc) == 1, "poll %d: %s", i, b.broken);
    }
    cv_check(c, !b.broken[0], "%s", b.broken);
    bench_close(&b);
    cv_end_case(c);
    bool refused = false;
    const char *name = "";
    for (int k = 0;; k++) {
        bench_open(&b);
        bool there = break_rule(&b, k, &refused, &name);
        char title[120];
        snprintf(title, sizeof title, "the wrapper of Apple's rules refuses %s", name);
        if (there) {
            cv_case(c, title);
            cv_check(c, refused && strstr(b.broken, "Apple's rules: ") == b.broken, "refused %d: %s", refused, b.broken);
            cv_end_case(c);
        }
        bench_close(&b);
        if (!there) return;
    }
}

#endif
