/* verbs.h — the verbs that the RDMA transport calls, as a table: the system's library behind dlopen, or a wrapper around it that refuses
 * what Apple's devices refuse (apple_rules.c). Functions that give int return 0 or an errno value; pointers are NULL with errno set. */
#ifndef CV_TRANSPORT_VERBS_H
#define CV_TRANSPORT_VERBS_H

#include "verbs_abi.h"

typedef struct cv_verbs cv_verbs;
struct cv_verbs {
    vb_device **(*get_device_list)(cv_verbs *v, int *n);
    void (*free_device_list)(cv_verbs *v, vb_device **list);
    const char *(*device_name)(cv_verbs *v, vb_device *d);
    vb_context *(*open_device)(cv_verbs *v, vb_device *d);
    int (*close_device)(cv_verbs *v, vb_context *c);
    vb_pd *(*alloc_pd)(cv_verbs *v, vb_context *c);
    int (*dealloc_pd)(cv_verbs *v, vb_pd *pd);
    vb_mr *(*reg_mr)(cv_verbs *v, vb_pd *pd, void *memory, size_t bytes, int access);
    int (*dereg_mr)(cv_verbs *v, vb_mr *mr);
    vb_cq *(*create_cq)(cv_verbs *v, vb_context *c, int entries);
    int (*destroy_cq)(cv_verbs *v, vb_cq *cq);
    vb_qp *(*create_qp)(cv_verbs *v, vb_pd *pd, vb_qp_init_attr *attr);
    int (*destroy_qp)(cv_verbs *v, vb_qp *qp);
    int (*modify_qp)(cv_verbs *v, vb_qp *qp, vb_qp_attr *attr, int mask);
    int (*query_port)(cv_verbs *v, vb_context *c, uint8_t port, vb_port_attr *out);
    int (*query_gid)(cv_verbs *v, vb_context *c, uint8_t port, int index, vb_gid *out);
    int (*post_send)(cv_verbs *v, vb_qp *qp, vb_send_wr *wr);
    int (*post_recv)(cv_verbs *v, vb_qp *qp, vb_recv_wr *wr);
    int (*poll_cq)(cv_verbs *v, vb_cq *cq, int n, vb_wc *out); /* number of completions, negative on failure */
    const char *(*status_text)(cv_verbs *v, int status);
    void (*release)(cv_verbs *v);
};

/* The system's library, to be released by v->release(v). NULL with the reason in why. */
cv_verbs *cv_verbs_load(char *why, size_t why_size);

/* Takes `inner` over and refuses with errno EPROTO whatever breaks Apple's rules for RDMA over Thunderbolt (docs/transport.md has the list).
 * `broken` [size] receives the first broken rule as a sentence. NULL without memory. */
cv_verbs *cv_apple_rules(cv_verbs *inner, char *broken, size_t size);

#endif
