/* check.h — the C tests' own small frame: named cases, `ok - NAME` / `not ok - NAME: why` lines, a count at the end. */
#ifndef CV_TEST_CHECK_H
#define CV_TEST_CHECK_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

typedef struct {
    int passed, failed;
    const char *name;
    bool broken;
} cv_checks;

static inline void cv_case(cv_checks *c, const char *name) {
    c->name = name;
    c->broken = false;
}

static inline void cv_end_case(cv_checks *c) {
    if (c->broken) {
        c->failed++;
        return;
    }
    c->passed++;
    printf("ok - %s\n", c->name);
}

/* A case reports its first failure. Returns the condition. */
static inline bool cv_check(cv_checks *c, bool condition, const char *format, ...) {
    if (condition || c->broken) return condition;
    c->broken = true;
    va_list args;
    va_start(args, format);
    printf("not ok - %s: ", c->name);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    return false;
}

static inline int cv_report(const cv_checks *c) {
    printf("%d passed, %d failed\n", c->passed, c->failed);
    return c->failed != 0 || c->passed == 0;
}

/* xorshift64*: the same numbers on every machine. */
static inline unsigned long long cv_random(unsigned long long *state) {
    unsigned long long x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545f4914f6cdd1dull;
}

#endif
