/* measure.c — what this machine can do at most: bytes read a second, int8 multiply-adds a second. Bench prints measured
 * speeds beside these ceilings. Both take the best of several passes, since anything else that runs only slows them.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../../engine/memory.h"
#include "kernels.h"
#include "threads.h"

#if defined(__x86_64__)
#include "x86/cpu_features.h"
#include "x86/tiles.h"
#include "x86/vnni.h"
#elif defined(__aarch64__)
#include <arm_neon.h>

#include "arm/neon.h"
#endif

enum { BLOCK = 1 << 20, STREAMS = 4, READ_PASSES = 6, MULTIPLY_PASSES = 5, MULTIPLY_LOOPS = 2000000 };

static double now_s(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t *bytes; /* [n_blocks * BLOCK] */
    uint64_t *sums; /* [n_threads * 8] kept so that no read is optimized away */
} reader;

/* Four runs through a block at once, as decode kernels read several rows of weights. */
static inline __attribute__((always_inline)) uint64_t read_block(const uint8_t *block) {
    typedef uint64_t lanes __attribute__((vector_size(64), may_alias));
    lanes sum[STREAMS] = {{0}};
    for (size_t i = 0; i < BLOCK / STREAMS; i += sizeof(lanes))
        for (size_t s = 0; s < STREAMS; s++) sum[s] ^= *(const lanes *)(const void *)(block + s * (BLOCK / STREAMS) + i);
    uint64_t all = 0;
    for (size_t s = 0; s < STREAMS; s++)
        for (size_t i = 0; i < 8; i++) all ^= sum[s][i];
    return all;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static uint64_t read_block_avx512(const uint8_t *block) { return read_block(block); }
__attribute__((target("avx2"))) static uint64_t read_block_avx2(const uint8_t *block) { return read_block(block); }
#endif

static void read_task(void *context, size_t task, size_t thread) {
    reader *r = context;
    const uint8_t *block = r->bytes + task * BLOCK;
    uint64_t sum;
#if defined(__x86_64__)
    cv_x86_features f = cv_x86_detect();
    sum = f.avx512 ? read_block_avx512(block) : f.avx2 ? read_block_avx2(block) : read_block(block);
#else
    sum = read_block(block);
#endif
    r->sums[thread * 8] ^= sum;
}

static void fill_task(void *context, size_t task, size_t thread) {
    (void)thread;
    reader *r = context;
    memset(r->bytes + task * BLOCK, (int)(task % 251 + 1), BLOCK);
}

int cv_measure_bandwidth(uint64_t bytes, uint32_t n_threads, double *bytes_per_second) {
    size_t blocks = (size_t)(bytes / BLOCK);
    if (!bytes_per_second || !blocks || blocks > 1 << 19 || !n_threads || n_threads > 256) return CV_E_ARGUMENT;
    reader r = {NULL, calloc(n_threads, 8 * sizeof(uint64_t))};
    void *memory = NULL;
    cv_threads *threads = cv_threads_open(n_threads);
    int code = r.sums && threads && !posix_memalign(&memory, CV_HUGE_PAGE, blocks * BLOCK) ? CV_OK : CV_E_MEMORY;
    if (!code) {
        cv_want_huge_pages(memory, blocks * BLOCK); /* as weights lie */
        double best = 0;
        r.bytes = memory;
        cv_threads_run(threads, blocks, fill_task, &r);
        for (int pass = 0; pass < READ_PASSES; pass++) {
            double start = now_s();
            cv_threads_run(threads, blocks, read_task, &r);
            double rate = (double)blocks * BLOCK / (now_s() - start);
            if (rate > best) best = rate;
        }
        *bytes_per_second = best;
    }
    cv_threads_close(threads);
    free(memory);
    free(r.sums);
    return code;
}

/* ---- int8 multiply-adds ------------------------------------------------------------------------------------------- */

/* Each loop body starts twelve independent multiply-adds, more than any pipeline's depth times width, and gives the
 * number of products that it summed in all. */
typedef double (*multiply_fn)(size_t loops);

#define TWELVE(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)

#if defined(__x86_64__)
CV_TARGET_VNNI static double multiply_vnni(size_t loops) {
    __m512i a[12], x = _mm512_set1_epi8(1);
    for (int i = 0; i < 12; i++) a[i] = _mm512_setzero_si512();
    for (size_t n = 0; n < loops; n++) {
#define DOT(i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(a[i]) : "v"(x));
        TWELVE(DOT)
#undef DOT
    }
    return (double)loops * 12 * 64;
}

/* A product of tiles takes as long as 16 vpdpbusd at most. */
static double multiply_amx(size_t loops) {
    enum { SHARE = 16 };
    cv_tile_config whole = {.palette = CV_TILE_PALETTE};
    for (size_t t = 0; t < CV_TILES; t++) {
        whole.rows[t] = CV_TILE_ROWS;
        whole.row_bytes[t] = CV_TILE_ROW_BYTES;
    }
    cv_tiles_configure(&whole);
    for (size_t n = 0; n < loops / SHARE; n++) {
#define DOT(i) cv_tile_dot(0, 4, 6); cv_tile_dot(1, 4, 7); cv_tile_dot(2, 5, 6); cv_tile_dot(3, 5, 7);
        DOT(0) DOT(1) DOT(2)
#undef DOT
    }
    cv_tiles_release();
    return (double)(loops / SHARE) * 12 * CV_TILE_ROWS * CV_TILE_ROWS * CV_TILE_ROW_BYTES;
}

/* As the AVX2 and AVX-512 sets multiply: pairs to 16 bits, pairs to 32, add. */
__attribute__((target("avx512f,avx512bw"))) static double multiply_avx512(size_t loops) {
    __m512i a[12], x = _mm512_set1_epi8(1), ones = _mm512_set1_epi16(1);
    for (int i = 0; i < 12; i++) a[i] = _mm512_setzero_si512();
    for (size_t n = 0; n < loops; n++) {
#define DOT(i) { __m512i p; __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0" : "+v"(a[i]), "=&v"(p) : "v"(x), "v"(ones)); }
        TWELVE(DOT)
#undef DOT
    }
    return (double)loops * 12 * 64;
}

__attribute__((target("avx2"))) static double multiply_avx2(size_t loops) {
    __m256i a[12], x = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 12; i++) a[i] = _mm256_setzero_si256();
    for (size_t n = 0; n < loops; n++) {
#define DOT(i) { __m256i p; __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0" : "+x"(a[i]), "=&x"(p) : "x"(x), "x"(ones)); }
        TWELVE(DOT)
#undef DOT
    }
    return (double)loops * 12 * 32;
}
#elif defined(__aarch64__)
CV_TARGET_DOT static double multiply_dot(size_t loops) {
    int32x4_t a[12];
    int8x16_t x = vdupq_n_s8(1);
    for (int i = 0; i < 12; i++) a[i] = vdupq_n_s32(0);
    for (size_t n = 0; n < loops; n++) {
#define DOT(i) __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(a[i]) : "w"(x));
        TWELVE(DOT)
#undef DOT
    }
    return (double)loops * 12 * 16;
}

CV_TARGET_I8MM static double multiply_i8mm(size_t loops) {
    int32x4_t a[12];
    int8x16_t x = vdupq_n_s8(1);
    for (int i = 0; i < 12; i++) a[i] = vdupq_n_s32(0);
    for (size_t n = 0; n < loops; n++) {
#define DOT(i) __asm__ volatile("smmla %0.4s, %1.16b, %1.16b" : "+w"(a[i]) : "w"(x));
        TWELVE(DOT)
#undef DOT
    }
    return (double)loops * 12 * 32;
}

static double multiply_neon(size_t loops) {
    int32x4_t a[12];
    int8x8_t x = vdup_n_s8(1);
    for (int i = 0; i < 12; i++) a[i] = vdupq_n_s32(0);
    for (size_t n = 0; n < loops; n++) {
#define DOT(i) { int16x8_t p; __asm__ volatile("smull %1.8h, %2.8b, %2.8b\n\tsadalp %0.4s, %1.8h" : "+w"(a[i]), "=&w"(p) : "w"(x)); }
        TWELVE(DOT)
#undef DOT
    }
    return (double)loops * 12 * 8;
}
#endif

/* NULL: the set has no int8 instruction of its own. */
static multiply_fn multiply_of(uint32_t level) {
    switch (level) {
#if defined(__x86_64__)
    case CV_CPU_AMX: return multiply_amx;
    case CV_CPU_AVX512_VNNI: return multiply_vnni;
    case CV_CPU_AVX512: return multiply_avx512;
    case CV_CPU_AVX2: return multiply_avx2;
#elif defined(__aarch64__)
    case CV_CPU_NEON_I8MM: return multiply_i8mm;
    case CV_CPU_NEON_DOT: return multiply_dot;
    case CV_CPU_NEON: return multiply_neon;
#endif
    default: return NULL;
    }
}

typedef struct {
    multiply_fn fn;
    double *products; /* [n_threads * 8] */
} multiplier;

static void multiply_task(void *context, size_t task, size_t thread) {
    (void)thread;
    multiplier *m = context;
    m->products[task * 8] = m->fn(MULTIPLY_LOOPS);
}

int cv_measure_int8(uint32_t level, uint32_t n_threads, double *multiply_adds_per_second) {
    if (!multiply_adds_per_second || !n_threads || n_threads > 256) return CV_E_ARGUMENT;
    const cv_cpu_kernels *set = cv_kernels_pick(level);
    multiplier m = {multiply_of(set->level), calloc(n_threads, 8 * sizeof(double))};
    if (level && set->level != level) m.fn = NULL;
    cv_threads *threads = cv_threads_open(n_threads);
    int code = !m.fn ? CV_E_UNSUPPORTED : m.products && threads ? CV_OK : CV_E_MEMORY;
    if (!code) {
        double best = 0;
        for (int pass = 0; pass < MULTIPLY_PASSES; pass++) {
            double start = now_s(), products = 0;
            cv_threads_run(threads, n_threads, multiply_task, &m);
            double time = now_s() - start;
            for (size_t i = 0; i < n_threads; i++) products += m.products[i * 8];
            if (products / time > best) best = products / time;
        }
        *multiply_adds_per_second = best;
    }
    cv_threads_close(threads);
    free(m.products);
    return code;
}
