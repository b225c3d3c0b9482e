/* guest.c — a program without a system, for a processor emulator that knows AMX: the tile kernel as it was compiled for the library, run on tile
 * instructions, against scalar.c and the VNNI kernel, bit for bit. boot.S starts it. It writes `ok - …` lines to port 0xe9 and switches off.
 *
 * Bochs 3.0 and 3.1 multiply the bytes of all four tile products as unsigned. Such an emulator is told by one product; then activations lose
 * their signs before they are multiplied, which leaves everything else of the kernel to be seen, and the library's trial must refuse the processor. */
#include "../../native/backend/cpu/x86/amx.h"
#include "../../native/backend/cpu/x86/cpu_features.h"
#include "../../native/backend/cpu/x86/tiles.h"
#include "../../native/backend/cpu/x86/vnni.h"
#include "../../native/test/qmatmul_cases.h"

void start(void);
__attribute__((section(".start"))) void start(void);

static void out8(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }

static void print(const char *text) {
    while (*text) out8(0xe9, (uint8_t)*text++);
}

static void print_number(size_t n) {
    char digits[24];
    size_t at = sizeof digits - 1;
    digits[at] = 0;
    do digits[--at] = (char)('0' + n % 10);
    while (n /= 10);
    print(digits + at);
}

_Noreturn static void switch_off(void) {
    for (const char *word = "Shutdown"; *word; word++) out8(0x8900, (uint8_t)*word);
    for (;;) __asm__ volatile("hlt");
}

/* ---- what the kernels and the cases want of a C library ---- */

enum { HEAP = 16 << 20, HEAP_END = 480 << 20 };
static uintptr_t heap = HEAP;

void *memset(void *to, int value, size_t n) {
    void *all = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
    return all;
}
void *memcpy(void *restrict to, const void *restrict from, size_t n) {
    void *all = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
    return all;
}
int memcmp(const void *a, const void *b, size_t n) {
    const uint8_t *x = a, *y = b;
    for (size_t i = 0; i < n; i++)
        if (x[i] != y[i]) return x[i] < y[i] ? -1 : 1;
    return 0;
}
void *aligned_alloc(size_t align, size_t n) {
    const uintptr_t p = (heap + align - 1) & ~(uintptr_t)(align - 1);
    if (n > HEAP_END - p) return NULL;
    heap = p + n;
    return (void *)p;
}
void *malloc(size_t n) { return aligned_alloc(16, n); }
void free(void *p) { (void)p; } /* a case's memory is given back when it ends */
long syscall(long number, ...) { return number - number; } /* nobody is here to be asked for permission */
__attribute__((target("fma"))) float fmaf(float a, float b, float c) { return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c))); }
__attribute__((target("sse4.1"))) float nearbyintf(float x) { return _mm_cvtss_f32(_mm_round_ss(_mm_setzero_ps(), _mm_set_ss(x), _MM_FROUND_CUR_DIRECTION | _MM_FROUND_NO_EXC)); }
float ldexpf(float x, int exponent) {
    for (; exponent > 0; exponent--) x *= 2.0f;
    for (; exponent < 0; exponent++) x *= 0.5f;
    return x;
}
int vsnprintf(char *restrict to, size_t n, const char *restrict format, va_list args) {
    (void)args;
    size_t i = 0;
    for (; format[i] && i + 1 < n; i++) to[i] = format[i];
    to[i] = 0;
    return (int)i;
}
int snprintf(char *restrict to, size_t n, const char *restrict format, ...) {
    va_list none;
    va_start(none, format);
    const int length = vsnprintf(to, n, format, none);
    va_end(none);
    return length;
}
int fputs(const char *restrict text, FILE *restrict file) {
    (void)file;
    print(text);
    return 0;
}
_Noreturn void exit(int code) {
    print("not ok - the guest has left with ");
    print_number((size_t)code);
    print("\n");
    switch_off();
}
FILE *stderr;

/* ---- cases ---- */

static size_t products;
static bool has_signs;

/* Whether -1 * 1 is -1 on this processor. */
static bool multiplies_signs(void) {
    static const cv_tile_config config = {.palette = CV_TILE_PALETTE, .row_bytes = {4, 4, 4}, .rows = {1, 1, 1}};
    static const int8_t a[4] = {-1, 0, 0, 0};
    static const uint8_t b[4] = {1, 0, 0, 0};
    int32_t sum = 0;
    cv_tiles_configure(&config);
    cv_tile_load(1, a, 4);
    cv_tile_load(2, b, 4);
    cv_tile_zero(0);
    cv_tile_dot(0, 1, 2);
    cv_tile_store(0, &sum, 4);
    cv_tiles_release();
    return sum == -1;
}

static void drop_signs(const cv_qact *a) {
    int8_t *q = (int8_t *)(uintptr_t)a->q;
    for (size_t i = 0; i < a->n * a->q_stride && !has_signs; i++) q[i] = (int8_t)(q[i] < 0 ? -q[i] : q[i]);
}

static void on_tiles(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    drop_signs(a);
    cv_amx_tile(w, e, row0, row1, a, out, ldo, scratch);
    products++;
}
static void by_vnni(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    drop_signs(a);
    cv_vnni_tile(w, e, row0, row1, a, out, ldo, scratch);
}
static void by_definition(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    drop_signs(a);
    cv_kernels_scalar()->qmatmul(w, e, row0, row1, a, out, ldo, scratch);
}

static size_t larger_scratch(size_t cols) { return cv_amx_tile_scratch(cols) + cv_vnni_tile_scratch(cols); }

static const size_t activations[] = {1, 15, 16, 17, 31, 32, 33, 48, 65}, weights[] = {1, 16, 17, 32, 33, 64};
static const uint32_t types[] = {CV_F32, CV_F16, CV_BF16};

static void few_groups(context *c) {
    for (size_t bits = 4; bits <= 8; bits += 2)
        for (size_t group = 32; group <= 128; group *= 2)
            for (size_t i = 0; i < 9; i++) one_qmatmul(c, (unsigned)bits, group, types[i % 3], 1 + below(c, 3), activations[i], weights[(i + bits) % 6] + 5, 3, 3 + weights[(i + bits) % 6], (int)(i % N_KINDS));
}

static void edges(context *c) {
    for (size_t a = 0; a < sizeof activations / sizeof activations[0]; a++)
        for (size_t w = 0; w < sizeof weights / sizeof weights[0]; w++)
            for (size_t group = 32; group <= 128; group *= 2)
                one_qmatmul(c, 4 + 2 * (unsigned)((a + w) % 3), group, types[w % 3], 1 + below(c, 9), activations[a], weights[w] + 5, 3, 3 + weights[w], ORDINARY);
}

static void prefill(context *c) { one_qmatmul(c, 4, 64, CV_BF16, 80, 256, 64, 0, 64, ORDINARY); }

static void run(const char *name, void (*cases)(context *), const cv_cpu_kernels *reference, const cv_cpu_kernels *set) {
    context c = {.scalar = reference, .set = set, .random = 0x9e3779b97f4a7c15ull};
    const size_t before = products;
    heap = HEAP;
    cases(&c);
    print(c.failure[0] ? "not ok - " : "ok - ");
    print(name);
    print(" (");
    print_number(products - before);
    print(c.failure[0] ? " products): " : " products)");
    print(c.failure);
    print("\n");
}

void start(void) {
    const cv_x86_features f = cv_x86_detect();
    print(f.amx_int8 ? "ok - the processor is found to have AMX int8\n" : "not ok - the processor is found to have no AMX int8\n");
    if (!f.amx_int8) switch_off();
    has_signs = multiplies_signs();
    const cv_amx_state state = cv_amx_find();
    if (has_signs) print(state == CV_AMX_READY ? "ok - AMX passes the library's trial against VNNI\n" : "not ok - AMX does not pass the library's trial against VNNI\n");
    else print(state == CV_AMX_WRONG ? "ok - the library's trial refuses this emulator, which multiplies signed bytes as unsigned\n# activations have no signs below\n" : "not ok - the library's trial passes an emulator that multiplies signed bytes as unsigned\n");
    cv_cpu_kernels scalar = *cv_kernels_scalar(), vnni = scalar, amx = scalar;
    scalar.scratch_bytes = vnni.scratch_bytes = amx.scratch_bytes = larger_scratch;
    scalar.qmatmul = by_definition;
    vnni.qmatmul = by_vnni;
    amx.qmatmul = on_tiles;
    run("products on tiles have scalar's bits: 4, 6 and 8 bits, groups of 32, 64 and 128", few_groups, &scalar, &amx);
    run("products on tiles have scalar's bits at the largest codes and activations", test_qmatmul_extremes, &scalar, &amx);
    run("products on tiles have VNNI's bits around the tiles' edges", edges, &vnni, &amx);
    run("a whole task of prefill has VNNI's bits", prefill, &vnni, &amx);
    print("done\n");
    switch_off();
}
