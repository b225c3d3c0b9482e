/* machine.c — what the operating system knows and does for a program that computes: cores, staying awake. */
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

#include "../include/caravan.h"
#include "error.h"

#if defined(__APPLE__)

#include <sys/sysctl.h>

uint32_t cv_performance_cores(void) {
    int32_t n = 0;
    size_t size = sizeof n;
    return sysctlbyname("hw.perflevel0.physicalcpu", &n, &size, NULL, 0) || n < 0 ? 0 : (uint32_t)n;
}

/* IOKit's functions, and CoreFoundation's for their strings, found at run time: the library links neither. */
typedef const void *cf_string;
typedef cf_string (*make_string)(const void *, const char *, uint32_t);
typedef int32_t (*make_assertion)(cf_string, uint32_t, cf_string, uint32_t *);
typedef int32_t (*release_assertion)(uint32_t);
typedef void (*release_object)(const void *);

static void *in_framework(const char *path, const char *name) {
    void *library = dlopen(path, RTLD_NOW);
    return library ? dlsym(library, name) : NULL;
}
#define IOKIT "/System/Library/Frameworks/IOKit.framework/IOKit"
#define CORE_FOUNDATION "/System/Library/Frameworks/CoreFoundation.framework/CoreFoundation"

int cv_stay_awake(const char *why, uint32_t *assertion, char *text, size_t text_size) {
    enum { UTF8 = 0x08000100, ASSERTION_ON = 255 };
    cv_err err = {text, text_size};
    make_string string;
    make_assertion make;
    release_object done;
    *(void **)&string = in_framework(CORE_FOUNDATION, "CFStringCreateWithCString");
    *(void **)&done = in_framework(CORE_FOUNDATION, "CFRelease");
    *(void **)&make = in_framework(IOKIT, "IOPMAssertionCreateWithName");
    if (!why || !assertion) return cv_fail(err, CV_E_ARGUMENT, "no reason to stay awake");
    if (!string || !done || !make) return cv_fail(err, CV_E_UNSUPPORTED, "this system has no power assertions");
    cf_string kind = string(NULL, "PreventUserIdleSystemSleep", UTF8), reason = string(NULL, why, UTF8);
    int32_t code = kind && reason ? make(kind, ASSERTION_ON, reason, assertion) : -1;
    if (kind) done(kind);
    if (reason) done(reason);
    return code ? cv_fail(err, CV_E_IO, "the system refused a power assertion (code %d)", (int)code) : CV_OK;
}

void cv_may_sleep(uint32_t assertion) {
    release_assertion release;
    *(void **)&release = in_framework(IOKIT, "IOPMAssertionRelease");
    if (release) release(assertion);
}

#else

uint32_t cv_performance_cores(void) { return 0; }

int cv_stay_awake(const char *why, uint32_t *assertion, char *text, size_t text_size) {
    (void)why, (void)assertion;
    return cv_fail((cv_err){text, text_size}, CV_E_UNSUPPORTED, "only macOS has power assertions");
}

void cv_may_sleep(uint32_t assertion) { (void)assertion; }

#endif
