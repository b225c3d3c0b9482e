/* rdma.h — the RDMA transport's records: two queue pairs ("lanes") for each other rank, one with small and one with large slots, because on
 * Apple's devices a SEND and the RECV that it meets must span the same number of 4 KiB frames. rdma_devices.c finds the devices, rdma_setup.c
 * makes the queue pairs, rdma.c moves frames over them. */
#ifndef CV_TRANSPORT_RDMA_H
#define CV_TRANSPORT_RDMA_H

#include "group.h"
#include "verbs.h"

enum { CV_LANE_SMALL = 0, CV_LANE_LARGE = 1, CV_LANES };

/* One 4 KiB frame for sums of a token and everything short; eight for the rest. */
#define CV_SMALL_SLOT 4096u
#define CV_LARGE_SLOT 32768u
#define CV_SMALL_RING 16u
#define CV_LARGE_RING 8u
#define CV_RESERVED_CREDITS 2u /* of the small lane: for credits and heartbeats when data has used up the others */
#define CV_RDMA_ALIGN 16384u   /* pages of Apple's machines */
#define CV_STASH_MOST (64u << 20)
#define CV_RDMA_LISTED 8       /* devices of a rank that are looked at */
#define CV_RDMA_WHY_BYTES 200

/* Frames that carry no channel's data. */
#define CV_RDMA_BEAT 0xfff0u

typedef struct {
    uint32_t magic;
    uint16_t channel, reserved;
    uint32_t length;             /* payload bytes behind this header; the rest of the slot is whatever was there */
    uint32_t lane_seq;           /* frames of this lane so far */
    uint32_t credit[CV_LANES];   /* receives that the sender has posted so far */
    uint64_t channel_seq;        /* data frames of this channel so far, over both lanes */
    uint64_t message_bytes, message_offset;
    uint64_t epoch;
    uint64_t check;              /* of this header with check = 0, and of the payload */
} cv_rdma_header; /* 64 bytes */

/* A frame that came before anybody asked for it. */
typedef struct cv_stashed {
    struct cv_stashed *next;
    cv_rdma_header head;
    uint8_t payload[];
} cv_stashed;

typedef struct {
    vb_qp *qp;
    uint32_t slot, ring, psn;
    uint8_t *send_memory, *recv_memory; /* [ring][slot], in the device's one region */
    uint32_t sent, sent_done;           /* frames posted and completed */
    uint32_t received, posted, told;    /* frames taken; receives posted; of them, told to the peer */
    uint32_t credit;                    /* receives that the peer has posted so far */
} cv_lane;

typedef struct {
    char name[64];
    vb_context *context;
    vb_pd *pd;
    vb_mr *mr;
    uint8_t *memory;
    size_t bytes;
    uint32_t port_state; /* VB_PORT_ACTIVE or another one */
    int gid_index;
    vb_gid gid;
    uint16_t lid;
    uint32_t mtu;
} cv_rdma_device;

typedef struct {
    bool used;
    pthread_mutex_t lock;
    cv_rdma_device *device;
    vb_cq *cq;
    cv_lane lanes[CV_LANES];
    uint64_t send_seq[CV_CHANNEL_COUNT], recv_seq[CV_CHANNEL_COUNT];
    cv_stashed *stash[CV_CHANNEL_COUNT], *stash_end[CV_CHANNEL_COUNT];
    size_t stash_bytes;
    uint64_t heard_ns, said_ns, beats_heard;
    char why[320]; /* after a failure */
} cv_rdma_link;

typedef struct {
    cv_verbs *verbs;
    bool reliable;
    char broken_rule[160]; /* with CV_RDMA_APPLE_RULES */
    cv_rdma_device devices[CV_MAX_RANKS];
    uint32_t n_devices;
    cv_rdma_link links[CV_MAX_RANKS];
    uint64_t last_beat;
} cv_rdma;

/* What a rank says of its devices, before any is opened for good. */
typedef struct {
    uint32_t works, flags, n;
    uint8_t ip[CV_RDMA_LISTED][4]; /* of the devices' IPv4-mapped GIDs */
    char why[CV_RDMA_WHY_BYTES];
} cv_rdma_survey;

/* rdma_devices.c. look: opens the devices that this rank may need, with the reason in mine->why where there is none. name_for: the device's
 * name for a peer as the options give it, "" = whichever is nearest. choose_device: the device towards a peer, NULL where the named one is
 * not there. explain: what an errno value of the library means for people. */
void cv_rdma_look(const cv_group *g, cv_rdma *s, cv_rdma_survey *mine);
void cv_rdma_name_for(const cv_group *g, uint32_t peer, char out[64]);
cv_rdma_device *cv_rdma_choose_device(const cv_group *g, cv_rdma *s, uint32_t peer, const cv_rdma_survey *all);
const char *cv_rdma_explain(int error);

/* rdma.c */
extern const cv_wire cv_rdma_wire;
/* Posts one receive of a lane. 0 or errno. */
int cv_rdma_post_recv(cv_rdma *s, cv_rdma_link *l, uint32_t lane);
/* Takes what has arrived; the caller holds the link's lock. 0, 1 when something did, or negative with l->why. */
int cv_rdma_poll(cv_group *g, cv_rdma *s, uint32_t peer, cv_transfer *wanted);
/* Sends a heartbeat on a lane if it has room. 1 sent, 0 no room, negative with l->why. */
int cv_rdma_beat(cv_group *g, cv_rdma *s, uint32_t peer, uint32_t lane);

/* rdma_setup.c: undoes what there is of the set up. */
void cv_rdma_free(cv_group *g, cv_rdma *s);

#endif
