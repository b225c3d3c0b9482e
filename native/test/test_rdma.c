/* test_rdma.c — groups over real verbs calls. Alone it checks what needs no device: votes that say why there is no RDMA, and the wrapper that
 * enforces Apple's rules (over a table of fakes). With `guest` it runs in the virtual machine of test/rdma, where rank a's
 * software device towards rank b is m<a>_<b> and a cable can be pulled; `compare NAME ONE.npy OTHER.npy` compares logits there. */
#if defined(__linux__)
#include <sys/mount.h>
#endif

#include "apple_cases.h"
#include "transport_cases.h"

static rank_world *rdma_world(uint32_t size, uint32_t flags) {
    rank_world *w = ranks_new(size, CV_TRANSPORT_RDMA);
    w->rdma_flags = flags;
    w->largest = 300000;
    w->connect_ms = 20000;
    w->limit_ms = 60000;
    snprintf(w->rdma_device, sizeof w->rdma_device, "m%%r_%%p");
    return w;
}

#if defined(__linux__)
static bool shell(const char *command) { return system(command) == 0; }

/* ---- in the guest ---- */

static void sums_and_messages(cv_checks *c) {
    for (uint32_t size = 2; size <= 4; size += 2) {
        works_in(c, "unreliable queue pairs under Apple's rules: sums have the bits of a sum in rank order", body_sums, rdma_world(size, CV_RDMA_UC | CV_RDMA_APPLE_RULES));
        works_in(c, "reliable queue pairs: sums have the bits of a sum in rank order", body_sums, rdma_world(size, CV_RDMA_RC));
    }
    works_in(c, "unreliable queue pairs: messages of all sizes arrive whole and in order", body_messages, rdma_world(3, CV_RDMA_UC | CV_RDMA_APPLE_RULES));
    works_in(c, "reliable queue pairs: messages of all sizes arrive whole and in order", body_messages, rdma_world(2, CV_RDMA_RC));
    works_in(c, "unreliable queue pairs: channels run at the same time", body_channels, rdma_world(3, CV_RDMA_UC | CV_RDMA_APPLE_RULES));
    rank_world *w = rdma_world(2, CV_RDMA_UC | CV_RDMA_APPLE_RULES);
    works_in(c, "round trip and bandwidth of a cable are measured", body_measure, w);
    w = rdma_world(3, CV_RDMA_UC);
    w->rdma_device[0] = 0;
    works_in(c, "devices whose addresses are nearest to each other are found without names", body_sums, w);
}

/* A cable is pulled while all ranks reduce: both its ends must end, and the third rank with them. */
static void cable_pulled(cv_checks *c, uint32_t flags) {
    cv_case(c, flags & CV_RDMA_RC ? "a pulled cable ends all ranks in time (reliable)" : "a pulled cable ends all ranks in time (unreliable)");
    rank_world *w = rdma_world(3, flags);
    ranks_start(w, body_busy);
    cv_check(c, ranks_await(&w->count, 3, 30000), "the ranks did not begin: %s", w->rank[0].text);
    cv_check(c, shell("ip link set vm0_1 down"), "the cable cannot be pulled");
    atomic_store(&w->stamp_ns, cv_now()); /* not before: an emulated shell takes its time */
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    for (uint32_t r = 0; r < 3; r++) check_fault(c, w, r, CV_E_GROUP, "rank ", 2.0);
    shell("ip link set vm0_1 up");
    ranks_free(w);
    cv_end_case(c);
}

static void loss(cv_checks *c, uint32_t flags) {
    cv_case(c, flags & CV_RDMA_RC ? "reliable queue pairs get through 2 % loss" : "unreliable queue pairs notice a lost frame");
    rank_world *w = rdma_world(2, flags);
    cv_check(c, shell("tc qdisc add dev vm0_1 root netem loss 2%"), "no netem");
    ranks_start(w, flags & CV_RDMA_RC ? body_sums : body_busy);
    cv_check(c, ranks_finish(w), "a rank did not end in time, or badly");
    shell("tc qdisc del dev vm0_1 root");
    for (uint32_t r = 0; r < 2; r++) {
        const rank_report *a = &w->rank[r];
        if (flags & CV_RDMA_RC) cv_check(c, a->code == CV_OK && a->transport == CV_TRANSPORT_RDMA, "rank %u: %d %s", r, a->code, a->text);
        else cv_check(c, a->code == CV_E_GROUP && a->text[0], "rank %u: %d %s", r, a->code, a->text);
    }
    ranks_free(w);
    cv_end_case(c);
}

/* Without shared memory and with a cable out, everybody takes TCP and can say why. */
static void falls_back(cv_checks *c) {
    cv_case(c, "without a cable between two ranks all of them fall back to TCP, and say why");
    cv_check(c, mount(NULL, "/dev/shm", NULL, MS_REMOUNT | MS_RDONLY, NULL) == 0, "/dev/shm cannot be made read-only");
    cv_check(c, shell("ip link set vm0_1 down"), "the cable cannot be pulled");
    rank_world *w = rdma_world(3, CV_RDMA_UC);
    w->transport = CV_TRANSPORT_AUTO;
    ranks_start(w, body_sums);
    check_all(c, w, CV_OK);
    for (uint32_t r = 0; r < 3; r++)
        cv_check(c, w->rank[r].transport == CV_TRANSPORT_TCP && strstr(w->rank[r].note, "no RDMA: "), "rank %u: transport %u, \"%s\"", r, w->rank[r].transport, w->rank[r].note);
    printf("# %s\n", w->rank[0].note);
    shell("ip link set vm0_1 up");
    ranks_free(w);
    cv_end_case(c);

    cv_case(c, "with all cables in, RDMA is chosen by itself where memory cannot be shared");
    w = rdma_world(3, CV_RDMA_UC);
    w->transport = CV_TRANSPORT_AUTO;
    ranks_start(w, body_sums);
    check_all(c, w, CV_OK);
    for (uint32_t r = 0; r < 3; r++) cv_check(c, w->rank[r].transport == CV_TRANSPORT_RDMA, "rank %u: transport %u, \"%s\"", r, w->rank[r].transport, w->rank[r].note);
    ranks_free(w);
    cv_end_case(c);
}

static void in_guest(cv_checks *c) {
    sums_and_messages(c);
    fault_in(c, "a killed rank ends the others' sums within 1 s", body_busy, rdma_world(3, CV_RDMA_UC), SIGKILL, 1.0);
    fault_in(c, "a stopped rank is noticed while the others work", body_busy, rdma_world(3, CV_RDMA_RC), SIGSTOP, 2.0);
    cable_pulled(c, CV_RDMA_UC);
    cable_pulled(c, CV_RDMA_RC);
    loss(c, CV_RDMA_UC);
    loss(c, CV_RDMA_RC);
    falls_back(c);
}

#endif

/* ---- anywhere ---- */

static int body_none(cv_group *g, uint32_t rank, rank_world *w) {
    (void)rank, (void)w;
    return cv_group_barrier(g, 5000);
}

static void without_device(cv_checks *c) {
    cv_case(c, "RDMA that is forced where there is none is refused with the reason, on every rank");
    rank_world *w = rdma_world(2, CV_RDMA_UC);
    snprintf(w->rdma_device, sizeof w->rdma_device, "no_such_device");
    ranks_start(w, body_none);
    check_all(c, w, CV_E_GROUP);
    for (uint32_t r = 0; r < 2; r++) cv_check(c, strstr(w->rank[r].text, "the ranks cannot be connected by RDMA: no RDMA: "), "%s", w->rank[r].text);
    ranks_free(w);
    cv_end_case(c);

    cv_case(c, "a rank that may not use RDMA says why, and nobody looks for devices");
    w = rdma_world(2, CV_RDMA_UC);
    snprintf(w->no_rdma, sizeof w->no_rdma, "it is turned off here");
    ranks_start(w, body_none);
    check_all(c, w, CV_E_GROUP);
    for (uint32_t r = 0; r < 2; r++) cv_check(c, strstr(w->rank[r].text, "no RDMA: it is turned off here (rank 0)"), "%s", w->rank[r].text);
    ranks_free(w);
    cv_end_case(c);
}

/* Whatever this machine has: a line with four fields for each device, or the reason why none can be listed. */
static void devices_listed(cv_checks *c) {
    cv_case(c, "devices are listed, or why they cannot be");
    char out[4096] = "x", err[200] = "";
    int code = cv_rdma_devices(out, sizeof out, err, sizeof err);
    if (code == CV_E_UNSUPPORTED) cv_check(c, err[0] && !out[0], "no reason, or a list all the same: %s", out);
    else cv_check(c, code == CV_OK, "%d %s", code, err);
    size_t tabs = 0, lines = 0;
    for (char *p = out; *p; p++) tabs += *p == '\t', lines += *p == '\n';
    cv_check(c, tabs == 3 * lines, "%zu tabs in %zu lines", tabs, lines);
    cv_check(c, cv_rdma_devices(NULL, 0, err, sizeof err) == CV_E_ARGUMENT, "no room is no mistake");
    cv_end_case(c);
}

/* ---- logits ---- */

typedef struct {
    float *values;
    size_t rows, columns;
} logits;

/* A version 1 .npy file of float32 [rows, columns]. */
static bool read_npy(const char *path, logits *out) {
    FILE *f = fopen(path, "rb");
    unsigned char head[10];
    char text[1024] = "";
    if (!f || fread(head, 1, sizeof head, f) != sizeof head || memcmp(head, "\x93NUMPY\x01", 7)) return false;
    size_t n = (size_t)(head[8] | head[9] << 8);
    const char *shape;
    bool ok = n < sizeof text && fread(text, 1, n, f) == n && strstr(text, "<f4") && (shape = strstr(text, "'shape': (")) && sscanf(shape + 10, "%zu, %zu", &out->rows, &out->columns) == 2;
    size_t count = ok ? out->rows * out->columns : 0;
    out->values = malloc(count * sizeof(float) + 1);
    ok = ok && count > 0 && fread(out->values, sizeof(float), count, f) == count;
    fclose(f);
    return ok;
}

static size_t best(const float *row, size_t n) {
    size_t at = 0;
    for (size_t i = 1; i < n; i++)
        if (row[i] > row[at]) at = i;
    return at;
}

/* The same token at each position, and no logit farther away than 2e-4. */
static int compare(const char *name, const char *one_path, const char *other_path) {
    logits one, other;
    if (!read_npy(one_path, &one) || !read_npy(other_path, &other) || one.rows != other.rows || one.columns != other.columns) {
        printf("not ok - %s: %s or %s cannot be read, or they differ in shape\n", name, one_path, other_path);
        return 1;
    }
    double farthest = 0;
    size_t tokens = 0;
    for (size_t r = 0; r < one.rows; r++) {
        const float *a = one.values + r * one.columns, *b = other.values + r * one.columns;
        tokens += best(a, one.columns) != best(b, one.columns);
        for (size_t i = 0; i < one.columns; i++) {
            double d = a[i] > b[i] ? a[i] - b[i] : b[i] - a[i];
            if (!(d <= farthest)) farthest = d;
        }
    }
    bool same = tokens == 0 && farthest <= 2e-4;
    printf("%s - %s: %zu positions, farthest logit %.1e, other tokens at %zu\n", same ? "ok" : "not ok", name, one.rows, farthest, tokens);
    free(one.values);
    free(other.values);
    return !same;
}

int main(int argc, char **argv) {
    cv_checks c = {0};
    setvbuf(stdout, NULL, _IOLBF, 0);
#if defined(__linux__)
    if (argc > 1 && strcmp(argv[1], "guest") == 0) {
        in_guest(&c);
        return cv_report(&c);
    }
#endif
    if (argc == 5 && strcmp(argv[1], "compare") == 0) return compare(argv[2], argv[3], argv[4]);
    without_device(&c);
    devices_listed(&c);
    apple_cases(&c);
    return cv_report(&c);
}
