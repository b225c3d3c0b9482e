/* bench_transport.c — what an all-reduce costs between processes of this machine: medians and spread for each transport, number of ranks and
 * size (20 KB: a token's sum at hidden size 5120; 2.5 MB: a prefill piece of 128 tokens), and what of it are MACs and checksums.
 *   bench_transport [shm|tcp|rdma] [RANKS] */
#include "ranks.h"

#define MOST_TURNS 1000

static const size_t bench_floats[] = {1, 5120, 655360};

static int by_time(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int body_bench(cv_group *g, uint32_t rank, rank_world *w) {
    static uint64_t times[MOST_TURNS];
    for (size_t k = 0; k < sizeof bench_floats / sizeof *bench_floats; k++) {
        size_t n = bench_floats[k], turns = n > 100000 ? 60 : MOST_TURNS;
        float *x = calloc(n, sizeof *x);
        cv_group_stats_record before, after;
        int code = cv_group_barrier(g, 30000);
        cv_group_stats(g, &before, NULL, 0);
        for (size_t i = 0; i < turns && code == CV_OK; i++) {
            uint64_t start = cv_now();
            code = cv_all_reduce(g, (cv_members){0, w->size}, x, n, 30000);
            times[i] = cv_now() - start;
        }
        cv_group_stats(g, &after, NULL, 0);
        free(x);
        if (code != CV_OK) return code;
        if (rank) continue;
        qsort(times, turns, sizeof *times, by_time);
        static const char *const names[] = {"-", "shm", "rdma", "tcp"};
        printf("%-4s %u ranks %8zu B: median %9.1f us, p10 %9.1f, p90 %9.1f, MACs and checksums %8.1f us of each\n", names[after.transport], w->size, n * sizeof *x, (double)times[turns / 2] / 1e3,
               (double)times[turns / 10] / 1e3, (double)times[turns * 9 / 10] / 1e3, (double)(after.mac_ns - before.mac_ns) / 1e3 / (double)turns);
    }
    return CV_OK;
}

static int bench(uint32_t kind, uint32_t size) {
    rank_world *w = ranks_new(size, kind);
    w->limit_ms = 120000;
    w->silence_ms = 10000;
    ranks_start(w, body_bench);
    bool ended = ranks_finish(w);
    int failed = !ended;
    for (uint32_t r = 0; r < size; r++)
        if (w->rank[r].code != CV_OK) {
            printf("rank %u: %d %s %s\n", r, w->rank[r].code, w->rank[r].text, w->rank[r].note);
            failed = 1;
        }
    ranks_free(w);
    return failed;
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint32_t only = 0, size = argc > 2 ? (uint32_t)atoi(argv[2]) : 0;
    if (argc > 1) only = strcmp(argv[1], "tcp") == 0 ? CV_TRANSPORT_TCP : strcmp(argv[1], "rdma") == 0 ? CV_TRANSPORT_RDMA : CV_TRANSPORT_SHM;
    if (size > RANKS_MOST) return 2;
    int failed = 0;
    for (uint32_t kind = CV_TRANSPORT_SHM; kind <= CV_TRANSPORT_TCP; kind++) {
        if (only ? kind != only : kind == CV_TRANSPORT_RDMA) continue; /* RDMA only where it is asked for */
        for (uint32_t n = 2; n <= 4; n += 2)
            if (!size || n == size) failed |= bench(kind, n);
    }
    return failed;
}
