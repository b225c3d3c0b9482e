/* group.h — the inside of a group: what its files share. group.c owns the life cycle and the first error, mesh.c connects sockets,
 * connect.c votes on a transport, monitor.c listens for signs of life, exchange.c moves messages and collectives.c adds.
 * The transports (tcp.c, shm.c, rdma.c) are cv_wire tables.
 *
 * Every pair of ranks keeps one TCP connection for control, whatever the transport: heartbeats, aborts and goodbyes. A killed
 * process closes it at once, a vanished host falls silent on it, and so no transport has to find out by itself. */
#ifndef CV_TRANSPORT_GROUP_H
#define CV_TRANSPORT_GROUP_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/socket.h>

#include "../engine/error.h"
#include "clock.h"
#include "conn.h"
#include "transport.h"

#define CV_MAX_RANKS 64
#define CV_CHANNEL_CONTROL CV_CHANNEL_COUNT
#define CV_ERROR_BYTES 512
#define CV_ADDRESS_BYTES 4096
#define CV_DEFAULT_SILENCE_MS 1000
#define CV_DEFAULT_MAX_MESSAGE (64u << 20)

/* A transport. progress: 1 when something moved, 0 when nothing could, or the group's error code. */
typedef struct {
    uint32_t kind; /* CV_TRANSPORT_* */
    int (*progress)(cv_group *g, cv_transfer *t);
    /* Sleeps until one of the transfers may move, the group fails or until_ns. May return early. idle_ns: nothing has moved for so long. */
    void (*wait)(cv_group *g, cv_transfer *transfers, size_t n, uint64_t until_ns, uint64_t idle_ns);
    void (*wake)(cv_group *g);  /* wakes all sleepers of this rank; NULL when g->wake is enough */
    void (*beat)(cv_group *g);  /* called by the monitor a few times within the silence; may be NULL */
    void (*close)(cv_group *g); /* frees what the transport holds; no other call runs */
    size_t one_shot_bytes;      /* all-reduces up to this size send whole vectors to everybody */
    bool adds;                  /* takes transfers with `behind` */
} cv_wire;

typedef struct {
    cv_conn control;
    atomic_bool left;               /* said goodbye: what it sent before is still valid */
    atomic_uint_fast64_t left_ns;
} cv_peer;

/* What cv_group_open puts into a rank's address. */
typedef struct {
    uint32_t magic, version, rank, size;
    uint64_t epoch;
    uint8_t instance[16];
    uint8_t ip[16];
    uint32_t family; /* 4 or 6 */
    uint32_t port;
    char host_id[64]; /* of the running system: ranks with equal ids may share memory */
} cv_address;

struct cv_group {
    cv_group_options options;
    uint32_t rank, size;
    cv_address self;
    cv_address addresses[CV_MAX_RANKS];
    int listener;
    atomic_uint_fast64_t strangers; /* connections that were turned away */
    cv_peer peers[CV_MAX_RANKS];

    /* The first error. */
    pthread_mutex_t lock;
    atomic_int code;        /* CV_OK or the first error */
    char error[CV_ERROR_BYTES];
    int culprit;        /* rank that is to blame, -1 unknown */
    int wake[2];        /* a pipe: readable for ever after the first error */

    /* Connecting. */
    atomic_int state; /* CV_GROUP_* below */
    pthread_t connector;
    bool connector_running;
    atomic_bool connect_ended;
    int connect_code;
    char note[CV_ERROR_BYTES]; /* why a faster transport was not taken */
    uint64_t connect_until;

    /* The transport that was voted for. */
    const cv_wire *wire;
    void *wire_state;

    pthread_t monitor;
    bool monitor_running;
    int monitor_wake[2];     /* a pipe: look at the group now */
    atomic_bool closing;     /* say goodbye and end */
    atomic_int waiting;      /* calls with a deadline that are running */
    atomic_int calls;        /* all calls that are running */

    float *scratch; /* of all-reduces; taken with scratch_lock */
    size_t scratch_floats;
    pthread_mutex_t scratch_lock;

    atomic_uint_fast64_t reduces, reduce_ns, reduce_bytes, messages, message_bytes, mac_ns;
    atomic_uint round_trip_us;
};

enum { CV_GROUP_OPEN = 0, CV_GROUP_CONNECTING = 1, CV_GROUP_READY = 2, CV_GROUP_OVER = 3 };

/* group.c: the first error wins; all calls of this rank end with it and the other ranks are told. culprit: -1 when unknown. Returns the
 * group's code. */
int cv_group_fail(cv_group *g, int code, int culprit, const char *format, ...) __attribute__((format(printf, 4, 5)));
/* The connection to a peer failed: waits a moment for the reason, which the control connection may bring, before failing. */
int cv_group_suspect(cv_group *g, uint32_t peer, const char *why);

/* mesh.c: one authenticated connection with every other rank for each channel of [first, last], put into conns[peer][channel - first]. */
int cv_mesh_connect(cv_group *g, uint32_t first, uint32_t last, cv_conn *const *conns, uint64_t until_ns);
/* listen.c: listens for the other ranks at g->self, whose port is filled in. prepare: for every socket of a group. address: of a rank, its size. */
int cv_listen(cv_group *g, cv_err err);
void cv_socket_prepare(int fd);
socklen_t cv_socket_address(const cv_address *a, struct sockaddr_storage *out);

/* connect.c */
int cv_connect_all(cv_group *g, uint64_t until_ns);
/* Every rank's `bytes` bytes over the control connections, by rank: all [size][bytes]. While connecting only. */
int cv_gather(cv_group *g, const void *mine, size_t bytes, void *all, uint64_t until_ns);

/* monitor.c: the thread of the control connections. look: wakes it. tell_all: sends the first error to all ranks without a monitor. */
int cv_monitor_start(cv_group *g);
void cv_monitor_look(cv_group *g);
void cv_monitor_tell_all(cv_group *g);

/* What control connections carry. */
enum { CV_CONTROL_GATHER = 1, CV_CONTROL_BEAT = 2, CV_CONTROL_ABORT = 3, CV_CONTROL_BYE = 4, CV_CONTROL_BYE_SEEN = 5 };
typedef struct {
    uint32_t kind;
    int32_t culprit; /* CV_CONTROL_ABORT: rank to blame, -1 unknown */
} cv_control_head;   /* then CV_CONTROL_GATHER: bytes; CV_CONTROL_ABORT: text */
#define CV_CONTROL_MOST (64u << 10)

/* exchange.c: runs transfers to their end. until_ns CV_NEVER: no deadline. `what` names the call in messages. */
int cv_run(cv_group *g, const cv_wire *wire, cv_transfer *transfers, size_t n, uint64_t until_ns, const char *what);
/* CV_OK when a call on this group may start, else the code that it has to return. */
int cv_begin(cv_group *g);
void cv_end(cv_group *g);

/* The transports. *_try: 1 connected, 0 not possible with the reason in why, or the group's error code. All ranks call it together. */
extern const cv_wire cv_control_wire; /* the control connections, while connecting */
/* Sleeps until one of the connections can move (conn_of gives a transfer's), the group fails or until_ns. */
void cv_wait_for_conns(cv_group *g, cv_conn *(*conn_of)(cv_group *, const cv_transfer *), cv_transfer *t, size_t n, uint64_t until_ns);
int cv_tcp_try(cv_group *g, uint64_t until_ns, char *why, size_t why_size);
int cv_shm_try(cv_group *g, uint64_t until_ns, char *why, size_t why_size);
int cv_rdma_try(cv_group *g, uint64_t until_ns, char *why, size_t why_size);

#endif
