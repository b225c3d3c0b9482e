/* verbs_abi.h — the part of the libibverbs binary interface (symbol version IBVERBS_1.1, 64 bit) that a SEND/RECV transport needs,
 * written down by hand so that nothing but dlopen is needed to build on Linux. Names start with vb_, so that verbs.c can
 * include the system's <infiniband/verbs.h> beside it and compare every size and offset where that header is there. */
#ifndef CV_TRANSPORT_VERBS_ABI_H
#define CV_TRANSPORT_VERBS_ABI_H

#include <stdint.h>
#include <stddef.h>

enum { VB_QPT_RC = 2, VB_QPT_UC = 3 };
enum { VB_QPS_RESET, VB_QPS_INIT, VB_QPS_RTR, VB_QPS_RTS, VB_QPS_SQD, VB_QPS_SQE, VB_QPS_ERR };
enum { VB_QP_STATE = 1 << 0, VB_QP_ACCESS_FLAGS = 1 << 3, VB_QP_PKEY_INDEX = 1 << 4, VB_QP_PORT = 1 << 5, VB_QP_AV = 1 << 7,
       VB_QP_PATH_MTU = 1 << 8, VB_QP_TIMEOUT = 1 << 9, VB_QP_RETRY_CNT = 1 << 10, VB_QP_RNR_RETRY = 1 << 11, VB_QP_RQ_PSN = 1 << 12,
       VB_QP_MAX_QP_RD_ATOMIC = 1 << 13, VB_QP_MIN_RNR_TIMER = 1 << 15, VB_QP_SQ_PSN = 1 << 16, VB_QP_MAX_DEST_RD_ATOMIC = 1 << 17,
       VB_QP_DEST_QPN = 1 << 20 };
enum { VB_ACCESS_LOCAL_WRITE = 1, VB_ACCESS_REMOTE_WRITE = 2, VB_ACCESS_REMOTE_READ = 4 };
enum { VB_WR_SEND = 2, VB_SEND_SIGNALED = 1 << 1, VB_WC_SUCCESS = 0, VB_WC_WR_FLUSH_ERR = 5, VB_WC_RECV = 1 << 7, VB_PORT_ACTIVE = 4 };

typedef union { uint8_t raw[16]; struct { uint64_t subnet_prefix, interface_id; } global; } vb_gid;
typedef struct vb_device vb_device;                       /* opaque: the name comes from ibv_get_device_name */
typedef struct vb_context vb_context;
typedef struct { vb_context *context; uint32_t handle; } vb_pd;
typedef struct { vb_context *context; vb_pd *pd; void *addr; size_t length; uint32_t handle, lkey, rkey; } vb_mr;
typedef struct { vb_context *context; } vb_cq;            /* first member only */
typedef struct { vb_context *context; void *qp_context; vb_pd *pd; vb_cq *send_cq, *recv_cq; void *srq; uint32_t handle, qp_num; } vb_qp; /* prefix only */
typedef struct { uint64_t addr; uint32_t length, lkey; } vb_sge;
typedef struct vb_send_wr { uint64_t wr_id; struct vb_send_wr *next; vb_sge *sg_list; int num_sge; uint32_t opcode, send_flags, imm; uint64_t rest[11]; } vb_send_wr;
typedef struct vb_recv_wr { uint64_t wr_id; struct vb_recv_wr *next; vb_sge *sg_list; int num_sge; } vb_recv_wr;
typedef struct { uint64_t wr_id; uint32_t status, opcode, vendor_err, byte_len, imm, qp_num, src_qp, wc_flags; uint16_t pkey_index, slid; uint8_t sl, dlid_path_bits; } vb_wc;
typedef struct { uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data; } vb_qp_cap;
typedef struct { void *qp_context; vb_cq *send_cq, *recv_cq; void *srq; vb_qp_cap cap; uint32_t qp_type; int sq_sig_all; } vb_qp_init_attr;
typedef struct { vb_gid dgid; uint32_t flow_label; uint8_t sgid_index, hop_limit, traffic_class; } vb_global_route;
typedef struct { vb_global_route grh; uint16_t dlid; uint8_t sl, src_path_bits, static_rate, is_global, port_num; } vb_ah_attr;
typedef struct { uint32_t qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags; vb_qp_cap cap;
  vb_ah_attr ah_attr, alt_ah_attr; uint16_t pkey_index, alt_pkey_index; uint8_t en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic,
  min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout; uint32_t rate_limit; } vb_qp_attr;
typedef struct { uint32_t state, max_mtu, active_mtu; int gid_tbl_len; uint32_t port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr; uint16_t pkey_tbl_len, lid, sm_lid;
  uint8_t lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width, active_speed, phys_state, link_layer, flags; uint16_t port_cap_flags2; uint32_t spare; } vb_port_attr;
/* ibv_post_send, ibv_post_recv and ibv_poll_cq are static inline in verbs.h: they call through the context. */
struct vb_context { vb_device *device;
  struct { void *c0[11]; int (*poll_cq)(vb_cq *, int, vb_wc *); int (*req_notify_cq)(vb_cq *, int); void *c1[12];
           int (*post_send)(vb_qp *, vb_send_wr *, vb_send_wr **); int (*post_recv)(vb_qp *, vb_recv_wr *, vb_recv_wr **); void *c2[5]; } ops;
  int cmd_fd, async_fd, num_comp_vectors; };             /* prefix only */

#endif
