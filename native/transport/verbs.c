/* verbs.c — the system's verbs library behind dlopen: libibverbs on Linux, librdma on macOS (in the loader's cache only, hence never linked).
 * See verbs.h. */
#include "verbs.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__has_include)
#if __has_include(<infiniband/verbs.h>)
#define HAVE_SYSTEM_VERBS 1
#include <infiniband/verbs.h>
#endif
#endif

/* Whether verbs_abi.h describes the system's header. A build without the header believes it on Linux, where the layout is stable. */
static bool layout_known(void) {
#if HAVE_SYSTEM_VERBS
#define SIZE(t) (sizeof(vb_##t) == sizeof(struct ibv_##t))
#define AT(t, f) (offsetof(vb_##t, f) == offsetof(struct ibv_##t, f))
#define SAME(a) ((int)VB_##a == (int)IBV_##a)
    return SIZE(pd) && SIZE(mr) && SIZE(sge) && SIZE(send_wr) && SIZE(recv_wr) && SIZE(wc) && SIZE(qp_cap) && SIZE(qp_init_attr) && SIZE(global_route) && SIZE(ah_attr) && SIZE(qp_attr) &&
           sizeof(vb_port_attr) >= sizeof(struct ibv_port_attr) && sizeof(vb_gid) == sizeof(union ibv_gid) && AT(mr, lkey) && AT(qp, pd) && AT(qp, qp_num) && AT(send_wr, next) &&
           AT(send_wr, sg_list) && AT(send_wr, num_sge) && AT(send_wr, opcode) && AT(send_wr, send_flags) && AT(recv_wr, sg_list) && AT(recv_wr, num_sge) && AT(wc, status) && AT(wc, opcode) &&
           AT(wc, byte_len) && AT(wc, qp_num) && AT(wc, wc_flags) && AT(qp_init_attr, send_cq) && AT(qp_init_attr, cap) && AT(qp_init_attr, qp_type) && AT(qp_init_attr, sq_sig_all) &&
           AT(ah_attr, dlid) && AT(ah_attr, is_global) && AT(ah_attr, port_num) && AT(global_route, sgid_index) && AT(global_route, hop_limit) && AT(qp_attr, path_mtu) && AT(qp_attr, rq_psn) &&
           AT(qp_attr, sq_psn) && AT(qp_attr, dest_qp_num) && AT(qp_attr, qp_access_flags) && AT(qp_attr, ah_attr) && AT(qp_attr, pkey_index) && AT(qp_attr, max_rd_atomic) &&
           AT(qp_attr, max_dest_rd_atomic) && AT(qp_attr, min_rnr_timer) && AT(qp_attr, port_num) && AT(qp_attr, timeout) && AT(qp_attr, retry_cnt) && AT(qp_attr, rnr_retry) && AT(port_attr, state) &&
           AT(port_attr, active_mtu) && AT(port_attr, gid_tbl_len) && AT(port_attr, lid) && AT(context, ops) && AT(context, ops.poll_cq) && AT(context, ops.post_send) && AT(context, ops.post_recv) &&
           SAME(QPT_RC) && SAME(QPT_UC) && SAME(QPS_INIT) && SAME(QPS_RTR) && SAME(QPS_RTS) && SAME(QP_STATE) && SAME(QP_ACCESS_FLAGS) && SAME(QP_PKEY_INDEX) && SAME(QP_PORT) && SAME(QP_AV) &&
           SAME(QP_PATH_MTU) && SAME(QP_TIMEOUT) && SAME(QP_RETRY_CNT) && SAME(QP_RNR_RETRY) && SAME(QP_RQ_PSN) && SAME(QP_MAX_QP_RD_ATOMIC) && SAME(QP_MIN_RNR_TIMER) && SAME(QP_SQ_PSN) &&
           SAME(QP_MAX_DEST_RD_ATOMIC) && SAME(QP_DEST_QPN) && SAME(ACCESS_LOCAL_WRITE) && SAME(ACCESS_REMOTE_WRITE) && SAME(ACCESS_REMOTE_READ) && SAME(WR_SEND) && SAME(SEND_SIGNALED) &&
           SAME(WC_SUCCESS) && SAME(WC_RECV) && SAME(PORT_ACTIVE);
#elif defined(__APPLE__)
    return false;
#else
    return true;
#endif
}

typedef struct {
    cv_verbs table;
    void *library;
    vb_device **(*get_device_list)(int *);
    void (*free_device_list)(vb_device **);
    const char *(*get_device_name)(vb_device *);
    vb_context *(*open_device)(vb_device *);
    int (*close_device)(vb_context *);
    vb_pd *(*alloc_pd)(vb_context *);
    int (*dealloc_pd)(vb_pd *);
    vb_mr *(*reg_mr)(vb_pd *, void *, size_t, int);
    int (*dereg_mr)(vb_mr *);
    vb_cq *(*create_cq)(vb_context *, int, void *, void *, int);
    int (*destroy_cq)(vb_cq *);
    vb_qp *(*create_qp)(vb_pd *, vb_qp_init_attr *);
    int (*destroy_qp)(vb_qp *);
    int (*modify_qp)(vb_qp *, vb_qp_attr *, int);
    int (*query_port)(vb_context *, uint8_t, vb_port_attr *);
    int (*query_gid)(vb_context *, uint8_t, int, vb_gid *);
    const char *(*wc_status_str)(int);
} system_verbs;

#define REAL(v) ((system_verbs *)(v))

static vb_device **get_device_list(cv_verbs *v, int *n) { return REAL(v)->get_device_list(n); }
static void free_device_list(cv_verbs *v, vb_device **l) { REAL(v)->free_device_list(l); }
static const char *device_name(cv_verbs *v, vb_device *d) { return REAL(v)->get_device_name(d); }
static vb_context *open_device(cv_verbs *v, vb_device *d) { return REAL(v)->open_device(d); }
static int close_device(cv_verbs *v, vb_context *c) { return REAL(v)->close_device(c); }
static vb_pd *alloc_pd(cv_verbs *v, vb_context *c) { return REAL(v)->alloc_pd(c); }
static int dealloc_pd(cv_verbs *v, vb_pd *pd) { return REAL(v)->dealloc_pd(pd); }
static vb_mr *reg_mr(cv_verbs *v, vb_pd *pd, void *m, size_t n, int access) { return REAL(v)->reg_mr(pd, m, n, access); }
static int dereg_mr(cv_verbs *v, vb_mr *mr) { return REAL(v)->dereg_mr(mr); }
static vb_cq *create_cq(cv_verbs *v, vb_context *c, int n) { return REAL(v)->create_cq(c, n, NULL, NULL, 0); }
static int destroy_cq(cv_verbs *v, vb_cq *cq) { return REAL(v)->destroy_cq(cq); }
static vb_qp *create_qp(cv_verbs *v, vb_pd *pd, vb_qp_init_attr *a) { return REAL(v)->create_qp(pd, a); }
static int destroy_qp(cv_verbs *v, vb_qp *qp) { return REAL(v)->destroy_qp(qp); }
static int modify_qp(cv_verbs *v, vb_qp *qp, vb_qp_attr *a, int mask) { return REAL(v)->modify_qp(qp, a, mask); }

static int query_port(cv_verbs *v, vb_context *c, uint8_t port, vb_port_attr *out) {
    memset(out, 0, sizeof *out); /* the exported function fills an older, shorter structure */
    return REAL(v)->query_port(c, port, out);
}

static int query_gid(cv_verbs *v, vb_context *c, uint8_t port, int i, vb_gid *out) { return REAL(v)->query_gid(c, port, i, out); }

/* Static inline functions of the header: they call through the context. */
static int post_send(cv_verbs *v, vb_qp *qp, vb_send_wr *wr) {
    (void)v;
    vb_send_wr *bad;
    return qp->context->ops.post_send(qp, wr, &bad);
}

static int post_recv(cv_verbs *v, vb_qp *qp, vb_recv_wr *wr) {
    (void)v;
    vb_recv_wr *bad;
    return qp->context->ops.post_recv(qp, wr, &bad);
}

static int poll_cq(cv_verbs *v, vb_cq *cq, int n, vb_wc *out) {
    (void)v;
    return cq->context->ops.poll_cq(cq, n, out);
}

static const char *status_text(cv_verbs *v, int status) { return REAL(v)->wc_status_str(status); }

static void release(cv_verbs *v) {
    dlclose(REAL(v)->library);
    free(v);
}

static bool find(system_verbs *s, const char *name, void *where, char *why, size_t why_size) {
    void *symbol = dlsym(s->library, name);
    if (!symbol) snprintf(why, why_size, "the RDMA library has no %s", name);
    memcpy(where, &symbol, sizeof symbol);
    return symbol != NULL;
}

static bool find_all(system_verbs *s, char *why, size_t n) {
#define FIND(f) find(s, "ibv_" #f, &s->f, why, n)
    return FIND(get_device_list) && FIND(free_device_list) && FIND(get_device_name) && FIND(open_device) && FIND(close_device) && FIND(alloc_pd) && FIND(dealloc_pd) && FIND(reg_mr) &&
           FIND(dereg_mr) && FIND(create_cq) && FIND(destroy_cq) && FIND(create_qp) && FIND(destroy_qp) && FIND(modify_qp) && FIND(query_port) && FIND(query_gid) && FIND(wc_status_str);
}

cv_verbs *cv_verbs_load(char *why, size_t why_size) {
#if defined(__APPLE__)
    const char *name = "/usr/lib/librdma.dylib", *hint = "macOS 26.2 or later has it";
#else
    const char *name = "libibverbs.so.1", *hint = "package libibverbs1 or rdma-core";
#endif
    if (!layout_known()) {
        snprintf(why, why_size, "this build does not know the layout of the system's verbs (build with an SDK of macOS 26.2 or later)");
        return NULL;
    }
    system_verbs *s = calloc(1, sizeof *s);
    if (!s) {
        snprintf(why, why_size, "no memory");
        return NULL;
    }
    s->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!s->library) snprintf(why, why_size, "%s is not on this system (%s)", name, hint);
    else if (!find_all(s, why, why_size)) dlclose(s->library);
    else {
        s->table = (cv_verbs){get_device_list, free_device_list, device_name, open_device, close_device, alloc_pd, dealloc_pd, reg_mr, dereg_mr, create_cq, destroy_cq,
                              create_qp, destroy_qp, modify_qp, query_port, query_gid, post_send, post_recv, poll_cq, status_text, release};
        return &s->table;
    }
    free(s);
    return NULL;
}
