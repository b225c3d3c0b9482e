/* error.c — see error.h. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

int cv_fail(cv_err err, int code, const char *format, ...) {
    if (err.text && err.size) {
        va_list args;
        va_start(args, format);
        vsnprintf(err.text, err.size, format, args);
        va_end(args);
    }
    return code;
}
