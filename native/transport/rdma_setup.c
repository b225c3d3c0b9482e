/* rdma_setup.c — brings queue pairs between all ranks up over the devices that rdma_devices.c chose: memory, queue pairs, receives, a first
 * heartbeat on every lane. All ranks take every step together and hear of each other's reasons, so that all fall back when one cannot.
 * Follows what is known of Apple's devices (docs/transport.md): one memory region a device, receives only after RTS, the GID looked up
 * each time, queue pairs destroyed before their memory and never moved to the error state. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rdma.h"

#define PING_NS (2000 * CV_MS)
#define PROBE_NS (4000 * CV_MS)

/* Where a peer finds this rank's queue pairs. */
typedef struct {
    uint32_t works, n;
    struct {
        uint8_t gid[16];
        uint32_t qpn[CV_LANES], psn[CV_LANES], mtu;
        uint32_t lid;
    } to[CV_MAX_RANKS];
    char why[CV_RDMA_WHY_BYTES];
} directions;

/* ---- memory and queue pairs ---- */

static size_t link_bytes(void) {
    size_t n = 2 * ((size_t)CV_SMALL_RING * CV_SMALL_SLOT + (size_t)CV_LARGE_RING * CV_LARGE_SLOT);
    return (n + CV_RDMA_ALIGN - 1) / CV_RDMA_ALIGN * CV_RDMA_ALIGN;
}

/* One region for all links of a device: about 100 regions is all that Apple's devices have. */
static bool prepare_device(cv_rdma *s, cv_rdma_device *d, size_t links, char *why, size_t why_size) {
    cv_verbs *v = s->verbs;
    d->bytes = links * link_bytes();
    void *memory = NULL;
    if (posix_memalign(&memory, CV_RDMA_ALIGN, d->bytes)) {
        snprintf(why, why_size, "no memory for %zu bytes of buffers", d->bytes);
        return false;
    }
    memset(memory, 0, d->bytes);
    d->memory = memory;
    d->pd = v->alloc_pd(v, d->context);
    if (!d->pd) {
        snprintf(why, why_size, "%s gives no protection domain (is its port down?)", d->name);
        return false;
    }
    d->mr = v->reg_mr(v, d->pd, d->memory, d->bytes, VB_ACCESS_LOCAL_WRITE | VB_ACCESS_REMOTE_READ | VB_ACCESS_REMOTE_WRITE);
    if (!d->mr) d->mr = v->reg_mr(v, d->pd, d->memory, d->bytes, VB_ACCESS_LOCAL_WRITE);
    if (!d->mr) snprintf(why, why_size, "%s does not register %zu bytes of memory: %s", d->name, d->bytes, cv_rdma_explain(errno));
    return d->mr != NULL;
}

static bool make_link(cv_rdma *s, cv_rdma_link *l, uint8_t *memory, char *why, size_t why_size) {
    cv_verbs *v = s->verbs;
    cv_rdma_device *d = l->device;
    l->cq = v->create_cq(v, d->context, 2 * (CV_SMALL_RING + CV_LARGE_RING) + 8);
    if (!l->cq) {
        snprintf(why, why_size, "%s gives no completion queue: %s", d->name, cv_rdma_explain(errno));
        return false;
    }
    for (uint32_t k = 0; k < CV_LANES; k++) {
        cv_lane *a = &l->lanes[k];
        a->slot = k == CV_LANE_SMALL ? CV_SMALL_SLOT : CV_LARGE_SLOT;
        a->ring = k == CV_LANE_SMALL ? CV_SMALL_RING : CV_LARGE_RING;
        a->send_memory = memory;
        a->recv_memory = memory + (size_t)a->ring * a->slot;
        memory += 2 * (size_t)a->ring * a->slot;
        vb_qp_init_attr attr = {.send_cq = l->cq, .recv_cq = l->cq, .qp_type = s->reliable ? VB_QPT_RC : VB_QPT_UC, .cap = {a->ring, a->ring, 1, 1, 0}};
        a->qp = v->create_qp(v, d->pd, &attr);
        if (!a->qp) {
            snprintf(why, why_size, "%s gives no %s queue pair: %s", d->name, s->reliable ? "reliable" : "unreliable", cv_rdma_explain(errno));
            return false;
        }
        if (cv_random_fill(&a->psn, sizeof a->psn)) a->psn = 7;
        a->psn &= 0xffffff;
        vb_qp_attr init = {.qp_state = VB_QPS_INIT, .port_num = 1, .qp_access_flags = VB_ACCESS_LOCAL_WRITE | VB_ACCESS_REMOTE_READ | VB_ACCESS_REMOTE_WRITE};
        int error = v->modify_qp(v, a->qp, &init, VB_QP_STATE | VB_QP_PKEY_INDEX | VB_QP_PORT | VB_QP_ACCESS_FLAGS);
        if (error) {
            snprintf(why, why_size, "a queue pair of %s cannot be initialized: %s", d->name, cv_rdma_explain(error));
            return false;
        }
    }
    return true;
}

/* Every peer's device, memory and queue pairs. */
static bool prepare(cv_group *g, cv_rdma *s, const cv_rdma_survey *all, directions *mine, char *why, size_t why_size) {
    size_t links[CV_MAX_RANKS] = {0}, used[CV_MAX_RANKS] = {0};
    for (uint32_t r = 0; r < g->size; r++) {
        if (r == g->rank) continue;
        cv_rdma_device *d = cv_rdma_choose_device(g, s, r, all);
        if (!d) {
            char want[64];
            cv_rdma_name_for(g, r, want);
            snprintf(why, why_size, "no RDMA device %s towards rank %u: %.80s", want, r, all[g->rank].why);
            return false;
        }
        s->links[r].device = d;
        links[d - s->devices]++;
    }
    for (uint32_t i = 0; i < s->n_devices; i++)
        if (links[i] && !prepare_device(s, &s->devices[i], links[i], why, why_size)) return false;
    for (uint32_t r = 0; r < g->size; r++) {
        if (r == g->rank) continue;
        cv_rdma_link *l = &s->links[r];
        size_t i = (size_t)(l->device - s->devices);
        if (!make_link(s, l, l->device->memory + used[i]++ * link_bytes(), why, why_size)) return false;
        memcpy(mine->to[r].gid, l->device->gid.raw, 16);
        mine->to[r].mtu = l->device->mtu;
        mine->to[r].lid = l->device->lid;
        for (uint32_t k = 0; k < CV_LANES; k++) {
            mine->to[r].qpn[k] = l->lanes[k].qp->qp_num;
            mine->to[r].psn[k] = l->lanes[k].psn;
        }
    }
    return true;
}

/* Connects one lane with the peer's and posts its receives. */
static bool bring_up(cv_group *g, cv_rdma *s, uint32_t peer, uint32_t k, const directions *theirs, char *why, size_t why_size) {
    cv_verbs *v = s->verbs;
    cv_rdma_link *l = &s->links[peer];
    cv_lane *a = &l->lanes[k];
    uint32_t mtu = theirs->to[g->rank].mtu < l->device->mtu ? theirs->to[g->rank].mtu : l->device->mtu;
    vb_qp_attr rtr = {.qp_state = VB_QPS_RTR, .path_mtu = mtu, .rq_psn = theirs->to[g->rank].psn[k], .dest_qp_num = theirs->to[g->rank].qpn[k], .max_dest_rd_atomic = 1, .min_rnr_timer = 1,
                      .ah_attr = {.dlid = (uint16_t)theirs->to[g->rank].lid, .port_num = 1, .is_global = 1, .grh = {.sgid_index = (uint8_t)l->device->gid_index, .hop_limit = 1}}};
    memcpy(rtr.ah_attr.grh.dgid.raw, theirs->to[g->rank].gid, 16);
    int mask = VB_QP_STATE | VB_QP_AV | VB_QP_PATH_MTU | VB_QP_DEST_QPN | VB_QP_RQ_PSN | (s->reliable ? VB_QP_MAX_DEST_RD_ATOMIC | VB_QP_MIN_RNR_TIMER : 0);
    int error = v->modify_qp(v, a->qp, &rtr, mask);
    if (!error) {
        /* Reliable: seven attempts of 67 ms each, then the completion says so. */
        vb_qp_attr rts = {.qp_state = VB_QPS_RTS, .sq_psn = a->psn, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1};
        mask = VB_QP_STATE | VB_QP_SQ_PSN | (s->reliable ? VB_QP_TIMEOUT | VB_QP_RETRY_CNT | VB_QP_RNR_RETRY | VB_QP_MAX_QP_RD_ATOMIC : 0);
        error = v->modify_qp(v, a->qp, &rts, mask);
    }
    if (error) {
        snprintf(why, why_size, "%s cannot be connected with rank %u: %s", l->device->name, peer, cv_rdma_explain(error));
        return false;
    }
    for (uint32_t i = 0; i < a->ring; i++) {
        error = cv_rdma_post_recv(s, l, k);
        if (!error) continue;
        snprintf(why, why_size, "%s takes no receives: %s", l->device->name, cv_rdma_explain(error));
        return false;
    }
    a->credit = a->told = a->ring; /* both sides post the whole ring */
    return true;
}

/* A heartbeat over every lane in both directions: only what arrives proves the path. */
static bool ping_all(cv_group *g, cv_rdma *s, uint64_t until_ns, char *why, size_t why_size) {
    uint64_t until = cv_now() + PING_NS < until_ns ? cv_now() + PING_NS : until_ns;
    for (uint32_t r = 0; r < g->size; r++)
        for (uint32_t k = 0; s->links[r].used && k < CV_LANES; k++)
            if (cv_rdma_beat(g, s, r, k) != 1) {
                snprintf(why, why_size, "nothing can be sent to rank %u: %.120s", r, s->links[r].why);
                return false;
            }
    for (;;) {
        uint32_t missing = CV_MAX_RANKS;
        for (uint32_t r = 0; r < g->size; r++) {
            cv_rdma_link *l = &s->links[r];
            if (!l->used || l->beats_heard == (1u << CV_LANES) - 1) continue;
            if (cv_rdma_poll(g, s, r, NULL) < 0) {
                snprintf(why, why_size, "the path to rank %u failed: %.120s", r, l->why);
                return false;
            }
            missing = r;
        }
        if (missing == CV_MAX_RANKS) return true;
        if (cv_now() >= until || atomic_load(&g->code) != CV_OK) {
            snprintf(why, why_size, "nothing arrives from rank %u over %s", missing, s->links[missing].device->name);
            return false;
        }
        struct timespec nap = {0, 100000};
        nanosleep(&nap, NULL);
    }
}

void cv_rdma_free(cv_group *g, cv_rdma *s) {
    (void)g;
    cv_verbs *v = s->verbs;
    for (uint32_t r = 0; r < CV_MAX_RANKS; r++) {
        cv_rdma_link *l = &s->links[r];
        for (uint32_t k = 0; k < CV_LANES; k++)
            if (l->lanes[k].qp) v->destroy_qp(v, l->lanes[k].qp);
        if (l->cq) v->destroy_cq(v, l->cq);
        for (uint32_t ch = 0; ch < CV_CHANNEL_COUNT; ch++)
            for (cv_stashed *n = l->stash[ch], *next; n; n = next) {
                next = n->next;
                free(n);
            }
        pthread_mutex_destroy(&l->lock);
    }
    for (uint32_t i = 0; i < s->n_devices; i++) {
        cv_rdma_device *d = &s->devices[i];
        if (d->mr) v->dereg_mr(v, d->mr);
        if (d->pd) v->dealloc_pd(v, d->pd);
        if (d->context) v->close_device(v, d->context);
        free(d->memory);
    }
    if (v) v->release(v);
    free(s);
}

/* ---- all ranks together ---- */

static void load(cv_group *g, cv_rdma *s, cv_rdma_survey *mine) {
    uint32_t flags = g->options.rdma_flags;
#if defined(__APPLE__)
    s->reliable = (flags & CV_RDMA_RC) != 0;
#else
    s->reliable = (flags & CV_RDMA_UC) == 0;
#endif
    mine->flags = flags;
    s->verbs = cv_verbs_load(mine->why, sizeof mine->why);
    if (s->verbs && (flags & CV_RDMA_APPLE_RULES)) s->verbs = cv_apple_rules(s->verbs, s->broken_rule, sizeof s->broken_rule);
    if (s->verbs) cv_rdma_look(g, s, mine);
}

/* A wedged port lets the first call into the library hang for ever, so it happens in a thread that may be left behind. */
enum { PROBE_RUNS, PROBE_DONE, PROBE_LEFT };
typedef struct {
    cv_group *g; /* a shadow: options, rank and size only */
    cv_rdma *s;
    cv_rdma_survey found;
    atomic_int state;
} probe;

static cv_rdma *new_rdma(void) {
    cv_rdma *s = calloc(1, sizeof *s);
    for (uint32_t r = 0; s && r < CV_MAX_RANKS; r++) pthread_mutex_init(&s->links[r].lock, NULL);
    return s;
}

static void free_probe(probe *p) {
    free(p->g);
    free(p);
}

static void *run_probe(void *arg) {
    probe *p = arg;
    load(p->g, p->s, &p->found);
    int runs = PROBE_RUNS;
    if (!atomic_compare_exchange_strong(&p->state, &runs, PROBE_DONE)) {
        cv_rdma_free(p->g, p->s);
        free_probe(p);
    }
    return NULL;
}

/* What load finds, or that it does not come back: the memory is then the thread's. NULL with the reason in mine. */
static cv_rdma *load_in_time(cv_group *g, uint64_t until_ns, cv_rdma_survey *mine) {
    probe *p = calloc(1, sizeof *p);
    cv_group *shadow = calloc(1, sizeof *shadow);
    cv_rdma *s = new_rdma();
    pthread_t thread;
    snprintf(mine->why, sizeof mine->why, "%s", g->options.no_rdma[0] ? g->options.no_rdma : "no memory");
    if (p && shadow && s && !g->options.no_rdma[0]) {
        shadow->options = g->options;
        shadow->rank = g->rank;
        shadow->size = g->size;
        p->g = shadow;
        p->s = s;
        if (pthread_create(&thread, NULL, run_probe, p) == 0) {
            pthread_detach(thread);
            uint64_t until = cv_now() + PROBE_NS < until_ns ? cv_now() + PROBE_NS : until_ns;
            struct timespec nap = {0, 200000};
            while (atomic_load(&p->state) == PROBE_RUNS && cv_now() < until && atomic_load(&g->code) == CV_OK) nanosleep(&nap, NULL);
            int runs = PROBE_RUNS;
            if (atomic_compare_exchange_strong(&p->state, &runs, PROBE_LEFT)) {
                snprintf(mine->why, sizeof mine->why, "the RDMA library does not answer (a port may be wedged: restart the machine)");
                return NULL;
            }
            *mine = p->found;
            free_probe(p);
            return s;
        }
    }
    free(p);
    free(shadow);
    if (s) cv_rdma_free(g, s);
    return NULL;
}

/* Steps with a gather between them; 1 works, 0 not here or not there (why is empty when only others cannot), or the group's code. */
static int set_up(cv_group *g, cv_rdma **out, cv_rdma_survey *surveys, directions *all, uint64_t until_ns, char *why, size_t why_size) {
    cv_rdma_survey *mine = &surveys[g->size]; /* the arrays have one more element */
    cv_rdma *s = *out = load_in_time(g, until_ns, mine);
    int code = cv_gather(g, mine, sizeof *mine, surveys, until_ns);
    if (code != CV_OK) return code;
    for (uint32_t r = 0; r < g->size; r++) {
        if (surveys[r].works && surveys[r].flags == surveys[0].flags) continue;
        if (!mine->works) snprintf(why, why_size, "%s", mine->why);
        else if (surveys[r].works) snprintf(why, why_size, "the ranks were told to use different queue pairs");
        return 0;
    }
    directions *me = &all[g->size];
    me->works = prepare(g, s, surveys, me, me->why, sizeof me->why);
    code = cv_gather(g, me, sizeof *me, all, until_ns);
    if (code != CV_OK) return code;
    for (uint32_t r = 0; r < g->size; r++) {
        if (all[r].works) continue;
        if (!me->works) snprintf(why, why_size, "%s", me->why);
        return 0;
    }
    uint32_t up = 1, others_up[CV_MAX_RANKS];
    for (uint32_t r = 0; r < g->size && up; r++)
        for (uint32_t k = 0; r != g->rank && k < CV_LANES && up; k++) up = bring_up(g, s, r, k, &all[r], why, why_size);
    code = cv_gather(g, &up, sizeof up, others_up, until_ns); /* nobody sends before all have posted their receives */
    if (code != CV_OK) return code;
    for (uint32_t r = 0; r < g->size; r++)
        if (!others_up[r]) return 0;
    uint64_t now = cv_now();
    s->last_beat = now;
    for (uint32_t r = 0; r < g->size; r++)
        if (r != g->rank) {
            s->links[r].used = true;
            s->links[r].heard_ns = now;
        }
    return ping_all(g, s, until_ns, why, why_size) ? 1 : 0;
}

int cv_rdma_try(cv_group *g, uint64_t until_ns, char *why, size_t why_size) {
    cv_rdma *s = NULL;
    cv_rdma_survey *surveys = calloc(g->size + 1, sizeof *surveys);
    directions *all = calloc(g->size + 1, sizeof *all);
    int r = surveys && all ? set_up(g, &s, surveys, all, until_ns, why, why_size) : cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u has no memory to connect", g->rank);
    if (r == 0 && s && s->broken_rule[0]) snprintf(why, why_size, "%s", s->broken_rule); /* says more than the error value */
    free(surveys);
    free(all);
    if (r != 1) {
        if (s) cv_rdma_free(g, s);
        return r;
    }
    uint64_t now = cv_now();
    for (uint32_t k = 0; k < g->size; k++) s->links[k].heard_ns = now;
    pthread_mutex_lock(&g->lock);
    g->wire_state = s;
    g->wire = &cv_rdma_wire;
    pthread_mutex_unlock(&g->lock);
    return 1;
}
