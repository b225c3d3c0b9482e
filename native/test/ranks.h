/* ranks.h — a group of ranks as forked processes of one test: each opens its group, exchanges addresses through shared memory,
 * connects, runs a body and reports. Every wait has a limit; what does not end is killed and reported. */
#ifndef CV_TEST_RANKS_H
#define CV_TEST_RANKS_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../transport/clock.h"
#include "../transport/transport.h"

#define RANKS_MOST 8
/* Of waits that a busy machine may make long; a fault is found by other means. */
#define RANKS_PATIENCE_MS 60000

typedef struct {
    atomic_int ready; /* the address is there */
    unsigned char address[4096];
    uint64_t address_size;
    /* report */
    atomic_int ended;
    int code;                  /* of opening, connecting or the body */
    char text[512], note[512]; /* the group's first error; why a transport was not taken */
    uint32_t transport;
    uint64_t ended_ns;
    uint64_t number; /* whatever the body wants to say */
    char words[160];
} rank_report;

typedef struct {
    uint32_t size, transport;
    uint32_t silence_ms, connect_ms, limit_ms;
    uint32_t hold_ms; /* the last rank opens this much later than the others */
    uint32_t largest; /* bytes of the largest message that bodies send; 0 = their own */
    uint32_t rdma_flags;
    char rdma_device[64], no_rdma[64], host[64];
    uint64_t epoch;
    atomic_int go, count; /* for bodies */
    atomic_uint_fast64_t stamp_ns;
    atomic_uint_fast64_t withheld_ns; /* since the stamp: see ranks_metronome */
    atomic_int over;
    pthread_t metronome;
    pid_t pid[RANKS_MOST];
    rank_report rank[RANKS_MOST];
    cv_group_options change; /* rank `changed` uses these instead */
    int changed;
} rank_world;

typedef int (*rank_body)(cv_group *g, uint32_t rank, rank_world *w);

static inline rank_world *ranks_new(uint32_t size, uint32_t transport) {
    rank_world *w = mmap(NULL, sizeof *w, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (w == MAP_FAILED) exit(3);
    w->size = size;
    w->transport = transport;
    w->connect_ms = RANKS_PATIENCE_MS;
    w->limit_ms = 2 * RANKS_PATIENCE_MS;
    w->epoch = 1;
    w->changed = -1;
    return w;
}

/* As ranks_new, where the case is not about silence: on a busy machine nobody is taken for silent. */
static inline rank_world *ranks_patient(uint32_t size, uint32_t transport) {
    rank_world *w = ranks_new(size, transport);
    w->silence_ms = RANKS_PATIENCE_MS;
    return w;
}

static inline void ranks_free(rank_world *w) { munmap(w, sizeof *w); }

static inline cv_group_options ranks_options(const rank_world *w, uint32_t rank) {
    cv_group_options o = {.version = CV_ABI_VERSION, .rank = rank, .size = w->size, .transport = w->transport, .epoch = w->epoch, .silence_ms = w->silence_ms, .rdma_flags = w->rdma_flags};
    memcpy(o.rdma_device, w->rdma_device, sizeof w->rdma_device);
    memcpy(o.no_rdma, w->no_rdma, sizeof w->no_rdma);
    memcpy(o.host, w->host, sizeof w->host);
    for (int i = 0; i < 32; i++) o.key[i] = (unsigned char)(i * 7 + 1);
    for (int i = 0; i < 16; i++) o.instance[i] = (unsigned char)(i + 1);
    return o;
}

/* Waits until a counter reaches `want`; false after limit_ms. */
static inline bool ranks_await(atomic_int *what, int want, uint32_t limit_ms) {
    for (uint64_t until = cv_now() + limit_ms * CV_MS; atomic_load(what) < want;) {
        if (cv_now() > until) return false;
        usleep(500);
    }
    return true;
}

static inline int ranks_connect(rank_world *w, uint32_t rank, cv_group **out, char *text, size_t text_size) {
    cv_group_options o = w->changed == (int)rank ? w->change : ranks_options(w, rank);
    rank_report *me = &w->rank[rank];
    size_t size = sizeof me->address;
    if (w->hold_ms && rank == w->size - 1) usleep(w->hold_ms * 1000);
    int code = cv_group_open(&o, sizeof o, me->address, &size, out, text, text_size);
    if (code != CV_OK) return code;
    me->address_size = size;
    atomic_store(&me->ready, 1);
    unsigned char *all = malloc(w->size * sizeof me->address);
    uint64_t sizes[RANKS_MOST], used = 0;
    for (uint32_t r = 0; r < w->size; r++) {
        if (!ranks_await(&w->rank[r].ready, 1, RANKS_PATIENCE_MS)) return CV_E_IO;
        sizes[r] = w->rank[r].address_size;
        memcpy(all + used, w->rank[r].address, sizes[r]);
        used += sizes[r];
    }
    code = cv_group_connect(*out, all, sizes, w->connect_ms, me->note, sizeof me->note, text, text_size);
    free(all);
    return code;
}

static inline void ranks_child(rank_world *w, uint32_t rank, rank_body body) {
    rank_report *me = &w->rank[rank];
    cv_group *g = NULL;
    me->code = ranks_connect(w, rank, &g, me->text, sizeof me->text);
    if (me->code == CV_OK) {
        cv_group_stats_record s;
        cv_group_stats(g, &s, me->text, sizeof me->text);
        me->transport = s.transport;
        me->code = body(g, rank, w);
        me->ended_ns = cv_now();
        cv_group_error(g, me->text, sizeof me->text);
    }
    cv_group_close(g);
    atomic_store(&me->ended, 1);
}

/* Adds up how much later than asked short naps end since the stamp: the time that other work on the machine takes from a process
 * that is ready to run. */
static inline void *ranks_metronome(void *arg) {
    rank_world *w = arg;
    while (!atomic_load(&w->over)) {
        uint64_t before = cv_now();
        usleep(2000);
        uint64_t now = cv_now(), late = now - before - 2 * CV_MS, stamp = atomic_load(&w->stamp_ns);
        if (stamp && now > stamp && late > 2 * CV_MS) atomic_fetch_add(&w->withheld_ns, late < now - stamp ? late : now - stamp);
    }
    return NULL;
}

/* Seconds by which a limit may be passed: a fault passes through three processes at most, from which the machine withheld so much. */
static inline double ranks_allowance(rank_world *w) { return 3e-9 * (double)atomic_load(&w->withheld_ns); }

static inline void ranks_start(rank_world *w, rank_body body) {
    fflush(stdout);
    for (uint32_t r = 0; r < w->size; r++) {
        pid_t pid = fork();
        if (pid < 0) exit(3);
        if (pid == 0) {
            ranks_child(w, r, body);
            exit(0); /* not _exit: a sanitizer looks for leaks here */
        }
        w->pid[r] = pid; /* by the parent alone: the memory is shared */
    }
    if (pthread_create(&w->metronome, NULL, ranks_metronome, w)) exit(3);
}

/* Waits for all ranks; false when one had to be killed for the time limit or ended badly by itself (a rank that a test killed did not). */
static inline bool ranks_finish(rank_world *w) {
    bool all = true;
    uint64_t until = cv_now() + w->limit_ms * CV_MS;
    for (uint32_t r = 0; r < w->size; r++) {
        int status;
        while (waitpid(w->pid[r], &status, WNOHANG) == 0) {
            if (cv_now() > until) {
                all = false;
                kill(w->pid[r], SIGKILL);
                waitpid(w->pid[r], &status, 0);
                break;
            }
            usleep(1000);
        }
        if (WIFEXITED(status) ? WEXITSTATUS(status) != 0 : WTERMSIG(status) != SIGKILL) all = false;
    }
    if (!atomic_exchange(&w->over, 1)) pthread_join(w->metronome, NULL);
    return all;
}

#endif
