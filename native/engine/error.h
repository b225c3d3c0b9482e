/* error.h — writes an error sentence into a caller's buffer and returns the code, so that a failing line reads
 * `return cv_fail(err, CV_E_PLAN, "…")`. */
#ifndef CV_ENGINE_ERROR_H
#define CV_ENGINE_ERROR_H

#include <stddef.h>

typedef struct {
    char *text; /* may be NULL */
    size_t size;
} cv_err;

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
int cv_fail(cv_err err, int code, const char *format, ...);

#endif
