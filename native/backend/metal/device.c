/* device.c — see device.h: opens and closes a device, keeps the first failure. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "../../include/caravan.h"
#include "device_state.h"

void cv_metal_fail(cv_metal_device *d, int code, const char *what, id error) {
    if (d->code) return;
    d->code = code;
    id text = error ? CV_SEND0(&d->objc, id, error, description) : NULL;
    const char *reason = text ? CV_SEND0(&d->objc, const char *, text, utf8) : "no reason given";
    snprintf(d->text, sizeof d->text, "%s: %s", what, reason);
}

void cv_metal_refuse(cv_metal_device *d, int code, const char *text) {
    if (d->code) return;
    d->code = code;
    snprintf(d->text, sizeof d->text, "%s", text);
}

int cv_metal_failed(const cv_metal_device *d) { return d->code; }

void cv_metal_release(cv_metal_device *d, id o) {
    if (o) CV_SEND0(&d->objc, void, o, release);
}

id cv_metal_string(cv_metal_device *d, const char *text) { return CV_SEND(&d->objc, id, d->objc.get_class("NSString"), string, (const char *), text); }

id cv_metal_new(cv_metal_device *d, const char *class_name) {
    id c = d->objc.get_class(class_name);
    return c ? CV_SEND0(&d->objc, id, CV_SEND0(&d->objc, id, c, alloc), init) : NULL;
}

uint64_t cv_metal_now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int cv_metal_device_open(cv_metal_device **out, cv_err err) {
    cv_metal_device *d = calloc(1, sizeof *d);
    if (!d) return cv_fail(err, CV_E_MEMORY, "no memory");
    int code = cv_objc_open(&d->objc, err);
    if (code) {
        free(d);
        return code;
    }
    void *pool = d->objc.pool_push();
    d->device = d->objc.create_device();
    d->queue = d->device ? CV_SEND0(&d->objc, id, d->device, new_queue) : NULL;
    if (d->queue) {
        d->working_set = (size_t)CV_SEND0(&d->objc, uint64_t, d->device, working_set);
        d->max_buffer = (size_t)CV_SEND0(&d->objc, NSUInteger, d->device, max_buffer);
        cv_metal_open_residency(d);
    }
    d->objc.pool_pop(pool);
    if (!d->queue) {
        cv_metal_device_close(d);
        return cv_fail(err, CV_E_UNSUPPORTED, "this system has no Metal device");
    }
    *out = d;
    return CV_OK;
}

bool cv_metal_has_bfloat(const cv_metal_device *d) {
    enum { FIRST_MACOS = 14 };
    char macos[32] = "";
    cv_objc_setting(&d->objc, "kern.osproductversion", macos, sizeof macos);
    return !*macos || atoi(macos) >= FIRST_MACOS;
}

void cv_metal_prefer_type(cv_metal_device *d, const char *type) { d->type = cv_metal_type_named(type); }

void cv_metal_device_close(cv_metal_device *d) {
    if (!d) return;
    void *pool = d->objc.pool_push();
    cv_metal_close_hand_overs(d);
    cv_metal_archive_close(d);
    for (size_t i = 0; i < CV_METAL_PIPELINES; i++) cv_metal_release(d, d->pipelines[i].pipeline);
    for (size_t i = 0; i < d->n_libraries; i++) cv_metal_release(d, d->libraries[i].library);
    for (size_t i = 0; i < d->n_regions; i++) cv_metal_release(d, d->regions[i].buffer);
    cv_metal_release(d, d->queue);
    cv_metal_release(d, d->residency);
    cv_metal_release(d, d->device);
    d->objc.pool_pop(pool);
    free(d->regions);
    free(d);
}
