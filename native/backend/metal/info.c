/* info.c — what Metal would run on, without opening a model: cv_metal_info of caravan.h. */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "../../include/caravan.h"
#include "objc.h"

static int describe(const cv_objc *o, id device, char *out, size_t size, cv_err err) {
    char macos[32], build[32];
    cv_objc_setting(o, "kern.osproductversion", macos, sizeof macos);
    cv_objc_setting(o, "kern.osversion", build, sizeof build);
    id name = CV_SEND0(o, id, device, name);
    const char *text = name ? CV_SEND0(o, const char *, name, utf8) : NULL;
    bool residency = CV_SEND(o, bool, device, responds, (SEL), o->sel.new_residency);
    uint64_t working_set = CV_SEND0(o, uint64_t, device, working_set), max_buffer = CV_SEND0(o, NSUInteger, device, max_buffer);
    int n = snprintf(out, size, "name=%s\nworking_set=%llu\nmax_buffer=%llu\nmacos=%s\nbuild=%s\nresidency=%d\n", text ? text : "unknown", (unsigned long long)working_set,
                     (unsigned long long)max_buffer, macos, build, residency);
    return n > 0 && (size_t)n < size ? CV_OK : cv_fail(err, CV_E_BUFFER, "the description of the GPU does not fit into %zu bytes", size);
}

int cv_metal_info(char *out, size_t out_size, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    cv_objc o;
    if (!out || !out_size) return cv_fail(err, CV_E_ARGUMENT, "nowhere to put the description of the GPU");
    int code = cv_objc_open(&o, err);
    if (code) return code;
    void *pool = o.pool_push();
    id device = o.create_device();
    code = device ? describe(&o, device, out, out_size, err) : cv_fail(err, CV_E_UNSUPPORTED, "this system has no Metal device");
    if (device) CV_SEND0(&o, void, device, release);
    o.pool_pop(pool);
    return code;
}
