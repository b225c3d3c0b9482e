/* test_transport.c — groups of ranks over every transport: sums with equal bits, messages in order, channels that do not disturb each other,
 * and faults: every wait ends within its limit and names the rank. Ranks are forked processes (ranks.h). */
#include <netinet/in.h>
#include <sys/socket.h>

#include "transport_cases.h"

static int body_nothing(cv_group *g, uint32_t rank, rank_world *w) {
    (void)rank, (void)w;
    return cv_group_barrier(g, RANKS_PATIENCE_MS);
}

/* ---- faults ---- */

/* Rank 1 never takes part in the second reduce. */
static int body_late(cv_group *g, uint32_t rank, rank_world *w) {
    int code = reduce_once(g, (cv_members){0, w->size}, 100, 0);
    if (code != CV_OK) return code;
    if (rank == 0) atomic_store(&w->stamp_ns, cv_now());
    float x[100] = {0};
    if (rank == 1) {
        /* It lives and beats, but computes too long. It hears of the failure all the same. */
        char why[512] = "";
        for (uint64_t until = cv_now() + RANKS_PATIENCE_MS * CV_MS; !why[0] && cv_now() < until; usleep(1000)) cv_group_error(g, why, sizeof why);
    } else {
        code = cv_all_reduce(g, (cv_members){0, w->size}, x, 100, 400);
        if (code == CV_OK) return BAD_CODE;
    }
    int again = cv_all_reduce(g, (cv_members){0, w->size}, x, 100, 400), sent = cv_send(g, (rank + 1) % w->size, 2, x, 4, 400);
    return again == CV_E_GROUP && sent == CV_E_GROUP && cv_group_barrier(g, 1000) == CV_E_GROUP ? CV_E_GROUP : BAD_CODE;
}

static void *abort_soon(void *arg) {
    usleep(100000);
    cv_group_abort(arg, "the operator said so");
    return NULL;
}

static int body_abort(cv_group *g, uint32_t rank, rank_world *w) {
    int code = cv_group_barrier(g, RANKS_PATIENCE_MS);
    if (code != CV_OK) return code;
    if (rank == 0) atomic_store(&w->stamp_ns, cv_now() + 100 * CV_MS);
    pthread_t t;
    if (rank == 0) pthread_create(&t, NULL, abort_soon, g);
    void *data;
    size_t bytes;
    code = cv_recv_any(g, rank ? 0 : 1, CV_CHANNEL_STEP, &data, &bytes, 100, 0);
    if (rank == 0) pthread_join(t, NULL);
    return code;
}

static int body_wrong_size(cv_group *g, uint32_t rank, rank_world *w) {
    (void)w;
    char x[64] = {0};
    if (rank == 0) {
        cv_send(g, 1, CV_CHANNEL_STEP, x, 10, RANKS_PATIENCE_MS);
        return cv_recv(g, 1, CV_CHANNEL_STEP, x, 10, RANKS_PATIENCE_MS);
    }
    return cv_recv(g, 0, CV_CHANNEL_STEP, x, 11, RANKS_PATIENCE_MS);
}

/* Rank 0 sends its last message and leaves; the others read it much later. */
static int body_goodbye(cv_group *g, uint32_t rank, rank_world *w) {
    int code = cv_group_barrier(g, RANKS_PATIENCE_MS);
    if (code != CV_OK || rank == 0) {
        for (uint32_t r = 1; r < w->size && code == CV_OK; r++) code = cv_send(g, r, CV_CHANNEL_STEP, "end", 4, RANKS_PATIENCE_MS);
        return code;
    }
    if (!ranks_await(&w->rank[0].ended, 1, RANKS_PATIENCE_MS)) return LATE;
    usleep(50000);
    char said[4];
    code = cv_recv(g, 0, CV_CHANNEL_STEP, said, 4, RANKS_PATIENCE_MS);
    if (code != CV_OK || strcmp(said, "end")) return BAD_BYTES;
    void *data;
    size_t bytes;
    atomic_store(&w->stamp_ns, cv_now());
    return cv_recv_any(g, 0, CV_CHANNEL_STEP, &data, &bytes, 100, 0);
}

static void goodbye(cv_checks *c, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "what a rank sent before it left is still delivered, then the others hear that it left (%s)", kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_patient(2, kind);
    ranks_start(w, body_goodbye);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    cv_check(c, w->rank[0].code == CV_OK, "rank 0: %d %s", w->rank[0].code, w->rank[0].text);
    check_fault(c, w, 1, CV_E_GROUP, "rank 0 left the group", 1.0);
    ranks_free(w);
    cv_end_case(c);
}

static void late(cv_checks *c, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "a rank that does not answer in time is named, and the group stays over for all (%s)", kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_patient(3, kind);
    ranks_start(w, body_late);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    for (uint32_t r = 0; r < 3; r++) check_fault(c, w, r, CV_E_GROUP, "rank 1 did not answer within", 1.5);
    ranks_free(w);
    cv_end_case(c);
}

static void aborted(cv_checks *c, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "an abort from another thread ends every rank (%s)", kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_patient(3, kind);
    ranks_start(w, body_abort);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    check_fault(c, w, 0, CV_E_ABORTED, "the operator said so", 0.5);
    for (uint32_t r = 1; r < 3; r++) check_fault(c, w, r, CV_E_GROUP, "rank 0 aborted: the operator said so", 0.7);
    ranks_free(w);
    cv_end_case(c);
}

static void wrong_size(cv_checks *c, uint32_t kind) {
    char name[120];
    snprintf(name, sizeof name, "a message of another size than expected is an error (%s)", kind_name(kind));
    cv_case(c, name);
    rank_world *w = ranks_patient(2, kind);
    atomic_store(&w->stamp_ns, cv_now());
    ranks_start(w, body_wrong_size);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    for (uint32_t r = 0; r < 2; r++) check_fault(c, w, r, CV_E_GROUP, "a message of 10 bytes where 11 were expected", 3);
    ranks_free(w);
    cv_end_case(c);
}

/* ---- connecting ---- */

static void new_epoch(cv_checks *c) {
    cv_case(c, "after a failure the next epoch starts clean, on the same host");
    for (uint64_t epoch = 1; epoch <= 3; epoch++) {
        rank_world *w = ranks_patient(3, epoch == 2 ? CV_TRANSPORT_TCP : CV_TRANSPORT_AUTO);
        w->epoch = epoch;
        ranks_start(w, epoch == 3 ? body_sums : body_busy);
        if (epoch < 3) {
            cv_check(c, ranks_await(&w->count, 3, RANKS_PATIENCE_MS), "the ranks did not begin");
            kill(w->pid[1], SIGKILL);
            ranks_finish(w);
        } else check_all(c, w, CV_OK);
        ranks_free(w);
    }
    cv_end_case(c);
}

static void votes(cv_checks *c) {
    cv_case(c, "ranks of one host choose shared memory by themselves");
    rank_world *w = ranks_patient(3, CV_TRANSPORT_AUTO);
    ranks_start(w, body_nothing);
    check_all(c, w, CV_OK);
    for (uint32_t r = 0; r < 3; r++) cv_check(c, w->rank[r].transport == CV_TRANSPORT_SHM && !w->rank[r].note[0], "rank %u: transport %u, \"%s\"", r, w->rank[r].transport, w->rank[r].note);
    ranks_free(w);
    cv_end_case(c);

    cv_case(c, "what is forced on one rank is forced on all");
    w = ranks_patient(3, CV_TRANSPORT_AUTO);
    w->change = ranks_options(w, 2);
    w->change.transport = CV_TRANSPORT_TCP;
    w->changed = 2;
    ranks_start(w, body_nothing);
    check_all(c, w, CV_OK);
    for (uint32_t r = 0; r < 3; r++) cv_check(c, w->rank[r].transport == CV_TRANSPORT_TCP, "rank %u: transport %u", r, w->rank[r].transport);
    ranks_free(w);
    cv_end_case(c);

    cv_case(c, "ranks that are told to use different transports refuse, and say who was told what");
    w = ranks_patient(2, CV_TRANSPORT_SHM);
    w->change = ranks_options(w, 1);
    w->change.transport = CV_TRANSPORT_TCP;
    w->changed = 1;
    ranks_start(w, body_nothing);
    check_all(c, w, CV_E_GROUP);
    for (uint32_t r = 0; r < 2; r++) cv_check(c, strstr(w->rank[r].text, "rank 0 was told to use shared memory, rank 1 TCP"), "%s", w->rank[r].text);
    ranks_free(w);
    cv_end_case(c);
}

static bool has_ipv6(void) {
    struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    bool works = fd >= 0 && bind(fd, (struct sockaddr *)&at, sizeof at) == 0;
    if (fd >= 0) close(fd);
    return works;
}

static void addresses(cv_checks *c) {
    if (has_ipv6()) {
        cv_case(c, "ranks connect over IPv6");
        rank_world *w = ranks_patient(3, CV_TRANSPORT_TCP);
        snprintf(w->host, sizeof w->host, "::1");
        ranks_start(w, body_nothing);
        check_all(c, w, CV_OK);
        ranks_free(w);
        cv_end_case(c);
    } else printf("skipped: ranks over IPv6 (this machine has none)\n");

    cv_case(c, "a host name is refused, since resolving it may block for ever");
    rank_world *w = ranks_patient(1, CV_TRANSPORT_TCP);
    snprintf(w->host, sizeof w->host, "localhost");
    ranks_start(w, body_nothing);
    check_all(c, w, CV_E_ARGUMENT);
    cv_check(c, strstr(w->rank[0].text, "localhost is no IPv4 or IPv6 address"), "%s", w->rank[0].text);
    ranks_free(w);
    cv_end_case(c);
}

static void connecting(cv_checks *c) {
    cv_case(c, "a rank that never connects is named at the deadline");
    rank_world *w = ranks_patient(3, CV_TRANSPORT_AUTO);
    w->connect_ms = 700;
    w->change = ranks_options(w, 2);
    w->change.key[0] ^= 1; /* rank 2 is there, but with another key */
    w->changed = 2;
    atomic_store(&w->stamp_ns, cv_now());
    ranks_start(w, body_nothing);
    check_all(c, w, CV_E_GROUP);
    for (uint32_t r = 0; r < 2; r++) cv_check(c, strstr(w->rank[r].text, "rank 2 did not connect in time"), "rank %u: %s", r, w->rank[r].text);
    cv_check(c, (double)(cv_now() - atomic_load(&w->stamp_ns)) * 1e-9 < 3 + ranks_allowance(w), "connecting took too long");
    ranks_free(w);
    cv_end_case(c);

    cv_case(c, "an address of another epoch is refused with both epochs");
    w = ranks_patient(2, CV_TRANSPORT_AUTO);
    w->connect_ms = 700;
    w->change = ranks_options(w, 1);
    w->change.epoch = 9;
    w->changed = 1;
    ranks_start(w, body_nothing);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    cv_check(c, w->rank[0].code == CV_E_ARGUMENT && strstr(w->rank[0].text, "epoch (9, here 1)"), "%d %s", w->rank[0].code, w->rank[0].text);
    ranks_free(w);
    cv_end_case(c);
}

int main(void) {
    cv_checks c = {0};
    setvbuf(stdout, NULL, _IOLBF, 0);
    static const uint32_t kinds[] = {CV_TRANSPORT_SHM, CV_TRANSPORT_TCP};
    for (size_t k = 0; k < 2; k++) {
        uint32_t kind = kinds[k];
        for (uint32_t size = k ? 2 : 1; size <= 4; size++) works(&c, "sums have the bits of a sum in rank order", body_sums, size, kind);
        works(&c, "messages of all sizes arrive whole and in order", body_messages, 2, kind);
        works(&c, "messages of all sizes arrive whole and in order", body_messages, 4, kind);
        works(&c, "channels run at the same time without disturbing each other", body_channels, 3, kind);
        works(&c, "round trip and bandwidth of two ranks are measured", body_measure, 2, kind);
        late(&c, kind);
        aborted(&c, kind);
        wrong_size(&c, kind);
        goodbye(&c, kind);
        fault(&c, "a killed rank ends the others' sums within 1 s", body_busy, 3, kind, SIGKILL, 1.0);
        fault(&c, "a killed rank ends the others' waiting within 2 s", body_idle, 4, kind, SIGKILL, 2.0);
        fault(&c, "a stopped rank is noticed within its silence while the others work", body_busy, 4, kind, SIGSTOP, 1.5);
        fault(&c, "a stopped rank is noticed within two silences while nobody works", body_idle, 3, kind, SIGSTOP, 2.5);
    }
    new_epoch(&c);
    votes(&c);
    addresses(&c);
    connecting(&c);
    return cv_report(&c);
}
