/* memory.c — buffers: the GPU's own memory, and the host's without copying; which of them are resident. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device_state.h"

enum { LOOK_BACK = 8 };

/* Residency sets are there from macOS 15 on; before, Metal decides by itself. */
void cv_metal_open_residency(cv_metal_device *d) {
    if (!CV_SEND(&d->objc, bool, d->device, responds, (SEL), d->objc.sel.new_residency)) return;
    id descriptor = cv_metal_new(d, "MTLResidencySetDescriptor"), error = NULL;
    if (!descriptor) return;
    d->residency = CV_SEND(&d->objc, id, d->device, new_residency, (id, id *), descriptor, &error);
    cv_metal_release(d, descriptor);
    if (d->residency) CV_SEND(&d->objc, void, d->queue, add_residency, (id), d->residency);
}

/* Index of the first region whose low is above p. */
static size_t region_after(const cv_metal_device *d, uintptr_t p) {
    size_t low = 0, high = d->n_regions;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (d->regions[middle].low <= p) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Regions may share pages at their ends, so the nearest one below p is not always the one that has it. */
const cv_metal_region *cv_metal_find_region(const cv_metal_device *d, uintptr_t p, size_t bytes) {
    size_t i = region_after(d, p);
    for (size_t k = 0; k < LOOK_BACK && i-- > 0; k++)
        if (p + bytes <= d->regions[i].high) return &d->regions[i];
    return NULL;
}

static int add_region(cv_metal_device *d, uintptr_t low, size_t bytes, id buffer, bool owned, cv_err err) {
    if (d->n_regions == d->room_regions) {
        size_t room = d->room_regions ? 2 * d->room_regions : 256;
        cv_metal_region *list = realloc(d->regions, room * sizeof *list);
        if (!list) return cv_fail(err, CV_E_MEMORY, "no memory for the table of buffers");
        d->regions = list;
        d->room_regions = room;
    }
    size_t i = region_after(d, low);
    memmove(&d->regions[i + 1], &d->regions[i], (d->n_regions - i) * sizeof *d->regions);
    d->regions[i] = (cv_metal_region){low, low + bytes, buffer, owned};
    d->n_regions++;
    d->used_bytes += bytes;
    if (d->residency) {
        CV_SEND(&d->objc, void, d->residency, add_allocation, (id), buffer);
        d->residency_changed = true;
    }
    return CV_OK;
}

static int check_size(const cv_metal_device *d, size_t bytes, cv_err err) {
    if (bytes > d->max_buffer) return cv_fail(err, CV_E_MEMORY, "%zu bytes in one piece: this GPU's buffers have at most %zu", bytes, d->max_buffer);
    if (bytes > d->working_set || d->used_bytes > d->working_set - bytes)
        return cv_fail(err, CV_E_MEMORY, "the GPU may use %zu bytes of memory; %zu are in use and %zu more are needed (sysctl iogpu.wired_limit_mb raises the limit)", d->working_set, d->used_bytes, bytes);
    return CV_OK;
}

int cv_metal_alloc(cv_metal_device *d, size_t bytes, void **out, cv_err err) {
    if (!bytes) bytes = 64;
    int code = check_size(d, bytes, err);
    if (code) return code;
    void *pool = d->objc.pool_push();
    id buffer = CV_SEND(&d->objc, id, d->device, new_buffer, (NSUInteger, NSUInteger), bytes, 0ul); /* shared storage */
    void *p = buffer ? CV_SEND0(&d->objc, void *, buffer, contents) : NULL;
    code = p ? add_region(d, (uintptr_t)p, bytes, buffer, true, err) : cv_fail(err, CV_E_MEMORY, "the GPU has no %zu bytes", bytes);
    if (code) cv_metal_release(d, buffer);
    else *out = memset(p, 0, bytes);
    d->objc.pool_pop(pool);
    return code;
}

void cv_metal_free(cv_metal_device *d, void *p) {
    for (size_t i = 0; p && i < d->n_regions; i++) {
        cv_metal_region r = d->regions[i];
        if (!r.owned || r.low != (uintptr_t)p) continue;
        memmove(&d->regions[i], &d->regions[i + 1], (d->n_regions - i - 1) * sizeof r);
        d->n_regions--;
        d->used_bytes -= r.high - r.low;
        if (d->residency) {
            CV_SEND(&d->objc, void, d->residency, remove_allocation, (id), r.buffer);
            d->residency_changed = true;
        }
        cv_metal_release(d, r.buffer);
        return;
    }
}

int cv_metal_share(cv_metal_device *d, const void *p, size_t bytes, cv_err err) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), low = (uintptr_t)p / page * page, high = ((uintptr_t)p + bytes + page - 1) / page * page;
    int code = check_size(d, high - low, err);
    if (code) return code;
    void *pool = d->objc.pool_push();
    id buffer = CV_SEND(&d->objc, id, d->device, new_buffer_over, (void *, NSUInteger, NSUInteger, id), (void *)low, high - low, 0ul, (id)NULL);
    code = buffer ? add_region(d, low, high - low, buffer, false, err) : cv_fail(err, CV_E_MEMORY, "the GPU cannot use %zu bytes at %p", (size_t)(high - low), (void *)low);
    if (code) cv_metal_release(d, buffer);
    d->objc.pool_pop(pool);
    return code;
}

static int by_address(const void *x, const void *y) {
    uintptr_t a = (uintptr_t)((const cv_memory *)x)->memory, b = (uintptr_t)((const cv_memory *)y)->memory;
    return a < b ? -1 : a > b;
}

int cv_metal_share_all(cv_metal_device *d, const cv_memory *pieces, size_t n, cv_err err) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    cv_memory *sorted = malloc((n ? n : 1) * sizeof *sorted);
    if (!sorted) return cv_fail(err, CV_E_MEMORY, "no memory for the list of buffers");
    memcpy(sorted, pieces, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, by_address);
    int code = CV_OK;
    uintptr_t low = 0, high = 0;
    for (size_t i = 0; !code && i <= n; i++) {
        uintptr_t from = i < n ? (uintptr_t)sorted[i].memory / page * page : 0, to = i < n ? ((uintptr_t)sorted[i].memory + sorted[i].bytes + page - 1) / page * page : 0;
        if (i < n && !sorted[i].bytes) continue;
        if (i < n && high > low && from <= high && (to > high ? to : high) - low <= d->max_buffer) {
            if (to > high) high = to;
            continue;
        }
        if (high > low) code = cv_metal_share(d, (const void *)low, high - low, err);
        low = from;
        high = to;
    }
    free(sorted);
    return code;
}

void cv_metal_make_resident(cv_metal_device *d) {
    if (!d->residency || !d->residency_changed) return;
    CV_SEND0(&d->objc, void, d->residency, commit);
    CV_SEND0(&d->objc, void, d->residency, request_residency);
    d->residency_changed = false;
}
