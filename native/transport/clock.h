/* clock.h — the monotonic clock in nanoseconds, deadlines made of it, and the pause of a spinning core. */
#ifndef CV_TRANSPORT_CLOCK_H
#define CV_TRANSPORT_CLOCK_H

#include <stdint.h>
#include <time.h>

#define CV_MS 1000000ull /* nanoseconds a millisecond */
#define CV_NEVER UINT64_MAX

static inline uint64_t cv_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* Milliseconds until `until`, rounded up, at most `most`; 0 when it has passed. */
static inline int cv_ms_until(uint64_t until, int most) {
    if (until == CV_NEVER) return most;
    uint64_t now = cv_now();
    if (now >= until) return 0;
    uint64_t ms = (until - now + CV_MS - 1) / CV_MS;
    return ms > (uint64_t)most ? most : (int)ms;
}

static inline void cv_cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
