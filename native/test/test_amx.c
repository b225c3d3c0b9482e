/* test_amx.c — the product on AMX's tiles, computed by the software model of the tile instructions (tile_model.h), against scalar.c
 * and the VNNI kernel, bit for bit; the model's faults; and the trial that a machine with AMX must pass before it is used. The kernel
 * unpacks weights and scales sums with AVX-512 VNNI: without it these cases are skipped. */
#if defined(__x86_64__)
#include <signal.h>
#include <stdbool.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tile_model.h"
/* The kernel's source once more, on the model and under another name: the library's speaks to the processor. */
#define cv_amx_tile modelled_product
#define cv_amx_tile_scratch modelled_scratch
#include "../backend/cpu/x86/amx_tile.c"
#undef cv_amx_tile
#undef cv_amx_tile_scratch

#include "check.h"
#include "qmatmul_cases.h"

/* ---- the model itself ---- */

typedef struct {
    cv_tile_config config;
    void (*run)(void);
} faulty;

static void zero_0(void) { cv_tile_zero(0); }
static void load_1(void) { static int8_t rows[1024]; cv_tile_load(1, rows, 64); }
static void store_7(void) { static int8_t rows[1024]; cv_tile_store(7, rows, 64); }
static void dot_012(void) { cv_tile_dot(0, 1, 2); }
static void dot_011(void) { cv_tile_dot(0, 1, 1); }
static void after_release(void) { cv_tiles_release(); cv_tile_zero(0); }

/* Runs in a child, whose message is thrown away; whether it was ended by SIGABRT. */
static bool faults(const faulty *f) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(3);
        cv_tiles_configure(&f->config);
        if (f->run) f->run();
        _exit(0);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

static void model_faults(cv_checks *c) {
    const cv_tile_config good = {.palette = 1, .row_bytes = {64, 64, 64}, .rows = {16, 16, 16}};
    cv_case(c, "the tile model runs what is right and ends the process at every fault of Intel's description");
    cv_check(c, !faults(&(faulty){good, dot_012}), "a whole product faults");
    cv_tile_config b = good;
#define FAULTS(what, change, run) b = good; change; cv_check(c, faults(&(faulty){b, run}), "no fault: %s", what);
    FAULTS("palette 2", b.palette = 2, NULL)
    FAULTS("a start row", b.start_row = 1, NULL)
    FAULTS("a reserved byte", b.reserved[13] = 1, NULL)
    FAULTS("17 rows", b.rows[0] = 17, NULL)
    FAULTS("68 bytes a row", b.row_bytes[0] = 68, NULL)
    FAULTS("rows without bytes", b.row_bytes[2] = 0, NULL)
    FAULTS("bytes without rows", b.rows[2] = 0, NULL)
    FAULTS("a ninth tile's rows", b.rows[8] = 1, NULL)
    FAULTS("a ninth tile's bytes", b.row_bytes[8] = 4, NULL)
    FAULTS("a tile without shape is stored", (void)b, store_7)
    FAULTS("a tile without shape is loaded", b.rows[1] = 0; b.row_bytes[1] = 0, load_1)
    FAULTS("nothing is configured", b = (cv_tile_config){0}, zero_0)
    FAULTS("tiles were released", (void)b, after_release)
    FAULTS("one tile is two factors", (void)b, dot_011)
    FAULTS("the first factor has fewer rows than the sums", b.rows[1] = 15, dot_012)
    FAULTS("the second factor has other columns than the sums", b.row_bytes[2] = 60, dot_012)
    FAULTS("inner sizes differ", b.rows[2] = 8, dot_012)
    FAULTS("rows that four bytes do not divide", b.row_bytes[1] = 62, dot_012)
#undef FAULTS
    cv_end_case(c);
}

/* Against a sum written down once more, with every byte value on both sides and sums that pass 2^31. */
static void model_product(cv_checks *c) {
    cv_case(c, "the tile model multiplies signed by unsigned bytes, modulo 2^32, in the tiles' shapes only");
    static int8_t a[16][64];
    static uint8_t b[16][64];
    static int32_t sums[17][20];
    unsigned long long random = 7;
    const size_t m = 5, k = 7, n = 9;
    for (size_t i = 0; i < sizeof a; i++) ((int8_t *)a)[i] = (int8_t)cv_random(&random);
    for (size_t i = 0; i < sizeof b; i++) ((uint8_t *)b)[i] = (uint8_t)cv_random(&random);
    for (size_t i = 0; i < sizeof sums / 4; i++) ((int32_t *)sums)[i] = i % 3 ? INT32_MAX - (int32_t)(i % 1000) : INT32_MIN;
    int32_t before[17][20];
    memcpy(before, sums, sizeof sums);
    const cv_tile_config config = {.palette = 1, .row_bytes = {4 * n, 4 * k, 4 * n}, .rows = {m, m, k}};
    cv_tiles_configure(&config);
    cv_tile_load(0, sums, sizeof sums[0]);
    cv_tile_load(1, a, 64);
    cv_tile_load(2, b, 64);
    cv_tile_dot(0, 1, 2);
    cv_tile_store(0, sums, sizeof sums[0]);
    cv_tiles_release();
    for (size_t i = 0; i < 17; i++)
        for (size_t j = 0; j < 20; j++) {
            int64_t want = before[i][j];
            if (i < m && j < n)
                for (size_t x = 0; x < 4 * k; x++) want += (int64_t)a[i][x] * b[x / 4][4 * j + x % 4];
            cv_check(c, (uint32_t)want == (uint32_t)sums[i][j], "row %zu, column %zu: %d, not %lld", i, j, (int)sums[i][j], (long long)want);
        }
    cv_end_case(c);
}

/* ---- the kernel on the model ---- */

/* VNNI's set with every quantized product on modelled tiles, also those of few rows. */
static void all_on_tiles(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    modelled_product(w, e, row0, row1, a, out, ldo, scratch);
    if (tile_model.palette) tile_fault("the kernel has left tiles behind");
}

static void kernel_cases(cv_checks *c, const char *name, void (*run)(context *), const cv_cpu_kernels *reference, const cv_cpu_kernels *set) {
    context k = {.scalar = reference, .set = set, .random = 0x2545f4914f6cdd1dull};
    const size_t dots = tile_model.dots;
    cv_case(c, name);
    run(&k);
    cv_check(c, !k.failure[0], "%s", k.failure);
    cv_check(c, tile_model.dots > dots, "no tile was multiplied");
    cv_end_case(c);
}

/* Every number of activation rows and weight rows around the tiles' edges. */
static void edges(context *c) {
    static const size_t activations[] = {1, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 97}, weights[] = {1, 15, 16, 17, 31, 32, 33, 48, 64};
    static const unsigned bits[] = {4, 6, 8};
    for (size_t a = 0; a < sizeof activations / sizeof activations[0]; a++)
        for (size_t w = 0; w < sizeof weights / sizeof weights[0]; w++)
            for (size_t group = 32; group <= 128; group *= 2)
                one_qmatmul(c, bits[(a + w) % 3], group, CV_BF16, 1 + below(c, 9), activations[a], weights[w] + 5, 3, 3 + weights[w], ORDINARY);
}

/* A task of prefill as it is cut: 64 weight rows, 256 activation rows, Scout's hidden width. */
static void prefill(context *c) { one_qmatmul(c, 4, 64, CV_BF16, 80, 256, 64, 0, 64, ORDINARY); }

/* Damaged products, for the trial. */
static void without_a_row(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    modelled_product(w, e, row0, row1, a, out, ldo, scratch);
    out[(a->n - 1) * ldo + row1 - 1] = 0;
}
static void one_bit_off(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    modelled_product(w, e, row0, row1, a, out, ldo, scratch);
    uint32_t bits;
    memcpy(&bits, &out[row0], 4);
    bits ^= 1;
    memcpy(&out[row0], &bits, 4);
}
static void signed_codes(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    cv_weight other = *w; /* 8-bit codes from 128 on, as a product of signed bytes would read them */
    uint8_t *data = need(malloc(w->experts * w->expert_bytes));
    for (size_t i = 0; i < w->experts * w->expert_bytes; i++) data[i] = w->bits == 8 && w->data[i] > 127 ? 0 : w->data[i];
    other.data = data;
    modelled_product(&other, e, row0, row1, a, out, ldo, scratch);
    free(data);
}

static void trial(cv_checks *c) {
    cv_case(c, "the trial passes the right product and none that is off by a result, a bit or a sign");
    cv_check(c, cv_amx_agrees(modelled_product), "the modelled product was found wrong");
    cv_check(c, cv_amx_agrees(cv_vnni_tile), "VNNI differs from itself");
    cv_check(c, !cv_amx_agrees(without_a_row), "a missing result was not seen");
    cv_check(c, !cv_amx_agrees(one_bit_off), "a wrong bit was not seen");
    cv_check(c, !cv_amx_agrees(signed_codes), "signed codes were not seen");
    cv_end_case(c);
}

/* What the library found on this machine, and that the set is there exactly when it is ready. */
static void found(cv_checks *c) {
    const cv_amx_state state = cv_amx_find();
    const cv_cpu_kernels *set = cv_kernels_amx();
    cv_case(c, "the AMX set is there exactly when the processor has it, the system permits it and its products are right");
    cv_check(c, (set != NULL) == (state == CV_AMX_READY), "state %d", (int)state);
    cv_check(c, state != CV_AMX_WRONG, "AMX computes other products than VNNI on this machine");
    cv_check(c, !set || set->level == CV_CPU_AMX, "level");
    cv_check(c, cv_cpu_best() == CV_CPU_AMX || !set, "it is not the best");
    cv_check(c, (cv_cpu_note()[0] != 0) == (state == CV_AMX_REFUSED || state == CV_AMX_WRONG), "note \"%s\", state %d", cv_cpu_note(), (int)state);
    cv_check(c, cv_kernels_pick(CV_CPU_AVX512_VNNI)->level <= CV_CPU_AVX512_VNNI, "a lower set cannot be forced");
    cv_end_case(c);
    if (state != CV_AMX_READY) printf("# skipped here: AMX's real instructions (%s)\n", state == CV_AMX_REFUSED ? "the system gives no permission" : "the processor has none");
}

int main(void) {
    cv_checks c = {0};
    model_faults(&c);
    model_product(&c);
    found(&c);
    const cv_cpu_kernels *vnni = cv_kernels_avx512_vnni(), *scalar = cv_kernels_scalar();
    if (!vnni) {
        puts("# skipped here: the kernel on modelled tiles, which needs AVX-512 VNNI beside them");
        return cv_report(&c);
    }
    cv_cpu_kernels set = *vnni;
    set.qmatmul = all_on_tiles;
    set.scratch_bytes = modelled_scratch;
    kernel_cases(&c, "on modelled tiles 4-bit products have scalar's bits", test_qmatmul_4, scalar, &set);
    kernel_cases(&c, "on modelled tiles 6-bit products have scalar's bits", test_qmatmul_6, scalar, &set);
    kernel_cases(&c, "on modelled tiles 8-bit products have scalar's bits", test_qmatmul_8, scalar, &set);
    kernel_cases(&c, "on modelled tiles the largest codes and activations have scalar's bits", test_qmatmul_extremes, scalar, &set);
    kernel_cases(&c, "on modelled tiles products around the tiles' edges have VNNI's bits", edges, vnni, &set);
    kernel_cases(&c, "on modelled tiles a whole task of prefill has VNNI's bits", prefill, vnni, &set);
    trial(&c);
    return cv_report(&c);
}
#else
#include <stdio.h>
int main(void) {
    puts("# skipped here: AMX is x86-64's");
    puts("1 passed, 0 failed");
    return 0;
}
#endif
