/* objc.c — see objc.h. */
#include "objc.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../../include/caravan.h"

/* Older Linux C libraries keep these in a library of their own, which this backend alone is no reason to link. */
#if defined(__linux__)
#pragma weak dlopen
#pragma weak dlsym
#endif

static void *symbol(const cv_objc *o, const char *name) {
    for (size_t i = 0; i < sizeof o->libraries / sizeof o->libraries[0]; i++) {
        void *p = o->libraries[i] ? dlsym(o->libraries[i], name) : NULL;
        if (p) return p;
    }
    return NULL;
}

int cv_objc_open(cv_objc *o, cv_err err) {
    *o = (cv_objc){0};
#if defined(__linux__)
    if (!dlopen || !dlsym) return cv_fail(err, CV_E_UNSUPPORTED, "Metal is not available on this system");
#endif
    const char *other = getenv("CARAVAN_METAL_LIBRARY");
    if (other && *other) {
        o->libraries[0] = dlopen(other, RTLD_NOW);
        if (!o->libraries[0]) return cv_fail(err, CV_E_UNSUPPORTED, "CARAVAN_METAL_LIBRARY: %s", dlerror());
    } else {
        o->libraries[0] = dlopen("/usr/lib/libobjc.A.dylib", RTLD_NOW);
        o->libraries[1] = dlopen("/System/Library/Frameworks/Foundation.framework/Foundation", RTLD_NOW);
        o->libraries[2] = dlopen("/System/Library/Frameworks/Metal.framework/Metal", RTLD_NOW);
        /* A program without it gets no default device: so says the page of MTLCreateSystemDefaultDevice. */
        o->libraries[3] = dlopen("/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics", RTLD_NOW);
    }
    if (!o->libraries[0]) return cv_fail(err, CV_E_UNSUPPORTED, "Metal is not available on this system");
    o->send = symbol(o, "objc_msgSend");
    *(void **)&o->get_class = symbol(o, "objc_getClass");
    *(void **)&o->register_name = symbol(o, "sel_registerName");
    *(void **)&o->pool_push = symbol(o, "objc_autoreleasePoolPush");
    *(void **)&o->pool_pop = symbol(o, "objc_autoreleasePoolPop");
    *(void **)&o->create_device = symbol(o, "MTLCreateSystemDefaultDevice");
    *(void **)&o->sysctl = symbol(o, "sysctlbyname");
    if (!o->send || !o->get_class || !o->register_name || !o->pool_push || !o->pool_pop || !o->create_device)
        return cv_fail(err, CV_E_UNSUPPORTED, "Metal is not available on this system: its libraries lack a function");
#define LOOK_UP(name, text) o->sel.name = o->register_name(text);
    CV_METAL_SELECTORS(LOOK_UP)
    return CV_OK;
}

void cv_objc_setting(const cv_objc *o, const char *name, char *out, size_t size) {
    size_t n = size - 1;
    *out = 0;
    if (!o->sysctl || o->sysctl(name, out, &n, NULL, 0)) n = 0;
    out[n < size ? n : size - 1] = 0;
}
