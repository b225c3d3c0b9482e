/* connect.c — how the ranks come together: control connections, then a vote. All ranks try the same transports in the same order, fastest
 * first, and tell each other how it went; one is taken when it works on all of them, so nobody is left behind on another one. */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "group.h"

#define PINGS 9
#define WHY_BYTES 200

/* ---- control connections while connecting ---- */

static cv_conn *control_of(cv_group *g, const cv_transfer *t) { return &g->peers[t->peer].control; }

static int control_progress(cv_group *g, cv_transfer *t) {
    cv_conn *c = control_of(g, t);
    int r = cv_conn_progress(c, t);
    if (r >= 0) return r;
    return cv_group_fail(g, CV_E_GROUP, (int)t->peer, "rank %u %s while the group connected: %s", t->peer, r == CV_CONN_BROKEN ? "broke the protocol" : "ended", c->why);
}

static void control_wait(cv_group *g, cv_transfer *t, size_t n, uint64_t until_ns, uint64_t idle_ns) {
    (void)idle_ns;
    cv_wait_for_conns(g, control_of, t, n, until_ns);
}

const cv_wire cv_control_wire = {.progress = control_progress, .wait = control_wait};

void cv_wait_for_conns(cv_group *g, cv_conn *(*conn_of)(cv_group *, const cv_transfer *), cv_transfer *t, size_t n, uint64_t until_ns) {
    struct pollfd fds[2 * CV_MAX_RANKS + 1];
    nfds_t k = 0;
    fds[k++] = (struct pollfd){.fd = g->wake[0], .events = POLLIN};
    for (size_t i = 0; i < n && k < 2 * CV_MAX_RANKS + 1; i++)
        if (!t[i].finished) fds[k++] = (struct pollfd){.fd = conn_of(g, &t[i])->fd, .events = t[i].sending ? POLLOUT : POLLIN};
    poll(fds, k, cv_ms_until(until_ns, 1000));
}

/* Unpacks what a rank sent: its bytes, or the reason why it gave up. */
static int take_gathered(cv_group *g, uint32_t r, const cv_transfer *t, size_t bytes, uint8_t *out) {
    cv_control_head head = {0, -1};
    if (t->bytes >= sizeof head) memcpy(&head, t->data, sizeof head);
    if (head.kind == CV_CONTROL_ABORT)
        return cv_group_fail(g, CV_E_GROUP, head.culprit, "%.*s", (int)(t->bytes - sizeof head), (const char *)t->data + sizeof head);
    if (head.kind != CV_CONTROL_GATHER || t->bytes != sizeof head + bytes)
        return cv_group_fail(g, CV_E_GROUP, (int)r, "rank %u broke the protocol while the group connected: a message of kind %u, %zu bytes", r, head.kind, t->bytes);
    memcpy(out, t->data + sizeof head, bytes);
    return CV_OK;
}

int cv_gather(cv_group *g, const void *mine, size_t bytes, void *all, uint64_t until_ns) {
    cv_transfer t[2 * CV_MAX_RANKS];
    size_t n = 0, whole = sizeof(cv_control_head) + bytes;
    uint8_t *out = all, *message = malloc(whole);
    if (!message || whole > CV_CONTROL_MOST) {
        free(message);
        return cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u has no memory to connect", g->rank);
    }
    cv_control_head head = {CV_CONTROL_GATHER, -1};
    memcpy(message, &head, sizeof head);
    memcpy(message + sizeof head, mine, bytes);
    memmove(out + g->rank * bytes, mine, bytes);
    for (uint32_t r = 0; r < g->size; r++)
        if (r != g->rank) t[n++] = (cv_transfer){.peer = r, .channel = CV_CHANNEL_CONTROL, .sending = true, .data = message, .bytes = whole};
    size_t receiving = n;
    for (uint32_t r = 0; r < g->size; r++)
        if (r != g->rank) t[n++] = (cv_transfer){.peer = r, .channel = CV_CHANNEL_CONTROL, .any = true, .most = CV_CONTROL_MOST};
    int code = cv_run(g, &cv_control_wire, t, n, until_ns, "connecting");
    for (size_t i = receiving; i < n; i++) {
        if (code == CV_OK) code = take_gathered(g, t[i].peer, &t[i], bytes, out + t[i].peer * bytes);
        free(t[i].data);
    }
    free(message);
    return code;
}

/* ---- the vote ---- */

typedef struct {
    const char *name;
    uint32_t kind;
    int (*attempt)(cv_group *g, uint64_t until_ns, char *why, size_t why_size);
} candidate;

static const candidate candidates[] = {
    {"shared memory", CV_TRANSPORT_SHM, cv_shm_try},
    {"RDMA", CV_TRANSPORT_RDMA, cv_rdma_try},
    {"TCP", CV_TRANSPORT_TCP, cv_tcp_try},
};

static const char *name_of(uint32_t kind) {
    for (size_t i = 0; i < sizeof candidates / sizeof *candidates; i++)
        if (candidates[i].kind == kind) return candidates[i].name;
    return "any transport";
}

static void add_note(cv_group *g, const char *name, const char *why) {
    size_t used = strlen(g->note);
    snprintf(g->note + used, sizeof g->note - used, "%sno %s: %s", used ? "; " : "", name, why);
}

/* What is forced on some rank is forced on all; CV_TRANSPORT_AUTO when nothing is. */
static int agree_on_forced(cv_group *g, uint64_t until_ns, uint32_t *forced) {
    uint32_t wanted[CV_MAX_RANKS];
    int code = cv_gather(g, &g->options.transport, sizeof(uint32_t), wanted, until_ns);
    if (code != CV_OK) return code;
    uint32_t by = 0;
    *forced = CV_TRANSPORT_AUTO;
    for (uint32_t r = 0; r < g->size; r++) {
        if (wanted[r] == CV_TRANSPORT_AUTO || wanted[r] == *forced) continue;
        if (*forced != CV_TRANSPORT_AUTO)
            return cv_group_fail(g, CV_E_GROUP, -1, "rank %u was told to use %s, rank %u %s", by, name_of(*forced), r, name_of(wanted[r]));
        *forced = wanted[r];
        by = r;
    }
    return CV_OK;
}

typedef struct {
    uint32_t works;
    char why[WHY_BYTES];
} outcome;

/* Takes a transport that works here but not everywhere down again. */
static void drop_wire(cv_group *g) {
    const cv_wire *wire = g->wire;
    pthread_mutex_lock(&g->lock);
    g->wire = NULL;
    pthread_mutex_unlock(&g->lock);
    wire->close(g);
}

/* One candidate on all ranks. 1: taken, 0: not, with the reason of the first rank that has one in the note. */
static int try_candidate(cv_group *g, const candidate *c, uint64_t until_ns) {
    outcome mine = {0}, all[CV_MAX_RANKS];
    int r = c->attempt(g, until_ns, mine.why, sizeof mine.why);
    if (r < 0) return r;
    mine.works = r == 1;
    int code = cv_gather(g, &mine, sizeof mine, all, until_ns);
    if (code != CV_OK) return code;
    const outcome *cause = NULL;
    for (uint32_t k = 0; k < g->size; k++)
        if (!all[k].works && (!cause || (!cause->why[0] && all[k].why[0]))) cause = &all[k];
    if (!cause) return 1;
    char why[WHY_BYTES + 32];
    snprintf(why, sizeof why, "%.*s (rank %u)", WHY_BYTES - 1, cause->why, (uint32_t)(cause - all));
    add_note(g, c->name, why);
    if (mine.works) drop_wire(g);
    return 0;
}

static bool one_host(const cv_group *g) {
    for (uint32_t r = 0; r < g->size; r++)
        if (!g->addresses[r].host_id[0] || strcmp(g->addresses[r].host_id, g->addresses[0].host_id)) return false;
    return true;
}

static int vote(cv_group *g, uint64_t until_ns) {
    uint32_t forced;
    int code = agree_on_forced(g, until_ns, &forced);
    if (code != CV_OK) return code;
    for (size_t i = 0; i < sizeof candidates / sizeof *candidates; i++) {
        const candidate *c = &candidates[i];
        if (forced != CV_TRANSPORT_AUTO && forced != c->kind) continue;
        if (c->kind == CV_TRANSPORT_SHM && !one_host(g)) {
            if (forced) add_note(g, c->name, "the ranks are on several hosts");
            continue;
        }
        int r = try_candidate(g, c, until_ns);
        if (r != 0) return r < 0 ? r : CV_OK;
    }
    return cv_group_fail(g, CV_E_GROUP, -1, "the ranks cannot be connected by %s: %s", name_of(forced), g->note);
}

/* ---- how far the others are ---- */

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Pairs ping each other in one order on all ranks, so that nobody waits in a circle. */
static int ping(cv_group *g, uint64_t until_ns) {
    uint32_t farthest = 0;
    for (uint32_t a = 0; a < g->size; a++)
        for (uint32_t b = a + 1; b < g->size; b++) {
            if (g->rank != a && g->rank != b) continue;
            uint32_t us[PINGS + 1] = {0}, peer = g->rank == a ? b : a; /* a learns the times and tells b */
            for (int i = 0; i <= PINGS; i++) {
                uint64_t start = cv_now();
                if (i == PINGS) qsort(us, PINGS, sizeof *us, by_size);
                uint32_t median = us[PINGS / 2], heard;
                cv_transfer out = {.peer = peer, .channel = CV_CHANNEL_REDUCE, .sending = true, .data = (uint8_t *)&median, .bytes = sizeof median};
                cv_transfer in = {.peer = peer, .channel = CV_CHANNEL_REDUCE, .data = (uint8_t *)&heard, .bytes = sizeof heard};
                int code = cv_run(g, g->wire, g->rank == a ? &out : &in, 1, until_ns, "connecting");
                if (code == CV_OK) code = cv_run(g, g->wire, g->rank == a ? &in : &out, 1, until_ns, "connecting");
                if (code != CV_OK) return code;
                if (i < PINGS) us[i] = (uint32_t)((cv_now() - start) / 1000);
                else if (g->rank == b) us[PINGS / 2] = heard;
            }
            if (us[PINGS / 2] > farthest) farthest = us[PINGS / 2];
        }
    atomic_store(&g->round_trip_us, farthest);
    return CV_OK;
}

int cv_connect_all(cv_group *g, uint64_t until_ns) {
    if (g->size > 1) {
        cv_conn *controls[CV_MAX_RANKS];
        for (uint32_t r = 0; r < g->size; r++) controls[r] = &g->peers[r].control;
        int code = cv_mesh_connect(g, CV_CHANNEL_CONTROL, CV_CHANNEL_CONTROL, controls, until_ns);
        if (code == CV_OK) code = vote(g, until_ns);
        if (code == CV_OK) code = cv_monitor_start(g);
        if (code == CV_OK) code = ping(g, until_ns);
        if (code != CV_OK) return code;
    } else g->wire = &cv_control_wire; /* never used: a group of one exchanges nothing */
    close(g->listener);
    g->listener = -1;
    return CV_OK;
}
