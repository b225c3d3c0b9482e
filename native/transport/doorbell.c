/* doorbell.c — see doorbell.h. */
#include "doorbell.h"

#include <time.h>

#include "clock.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

static void wait_while(_Atomic uint32_t *word, uint32_t value, uint64_t ns) {
    struct timespec limit = {(time_t)(ns / 1000000000ull), (long)(ns % 1000000000ull)};
    syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, NULL, 0);
}

static void wake_all(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, 1 << 20, NULL, NULL, 0); }

#else
#include <dlfcn.h>
#include <stddef.h>

/* macOS: looked up at run time, since older systems lack them. Flag 1: the word is shared between processes; clock 32: Mach time. */
typedef int (*wait_function)(void *address, uint64_t value, size_t size, uint32_t flags, uint32_t clock, uint64_t timeout_ns);
typedef int (*wake_function)(void *address, size_t size, uint32_t flags);

static void wait_while(_Atomic uint32_t *word, uint32_t value, uint64_t ns) {
    wait_function wait_on = (wait_function)dlsym(RTLD_DEFAULT, "os_sync_wait_on_address_with_timeout");
    if (wait_on) {
        wait_on((void *)word, value, sizeof *word, 1, 32, ns);
        return;
    }
    struct timespec nap = {0, 200000};
    nanosleep(&nap, NULL);
}

static void wake_all(_Atomic uint32_t *word) {
    wake_function wake = (wake_function)dlsym(RTLD_DEFAULT, "os_sync_wake_by_address_all");
    if (wake) wake((void *)word, sizeof *word, 1);
}
#endif

void cv_doorbell_ring(cv_doorbell *b) {
    /* What the ringer wrote before must be visible before it looks for sleepers: the other half is in lie_down. */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&b->sleepers, memory_order_relaxed) == 0) return;
    atomic_fetch_add(&b->rings, 1);
    wake_all(&b->rings);
}

uint32_t cv_doorbell_lie_down(cv_doorbell *b) {
    uint32_t seen = atomic_load(&b->rings);
    atomic_fetch_add(&b->sleepers, 1);
    atomic_thread_fence(memory_order_seq_cst);
    return seen;
}

void cv_doorbell_sleep(cv_doorbell *b, uint32_t seen, uint64_t until_ns) {
    uint64_t now = cv_now(), ns = until_ns == CV_NEVER ? 1000 * CV_MS : until_ns > now ? until_ns - now : 0;
    if (ns) wait_while(&b->rings, seen, ns);
}

void cv_doorbell_get_up(cv_doorbell *b) { atomic_fetch_sub(&b->sleepers, 1); }
