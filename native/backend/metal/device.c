/* device.c — see device.h. */
#include "device.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../include/caravan.h"
#include "kernel_source.h"
#include "kernels/params.h"
#include "objc.h"

enum { PIPELINES = 512, OPEN_COMMANDS = 256, TEXT = 1024, LOOK_BACK = 8 };

/* A command buffer with more than this many multiply-adds is committed: a fraction of a second on the slowest M chip. */
static const double MOST_WORK = 2e11;

/* Hand-overs to the host within a step (cv_metal_sync): trials of each way when it is chosen, and how long the host looks at an event before it
 * waits for the command buffer, which says why when the event never comes. */
enum { HAND_OVER_TRIALS = 8, LOOK_NS = 20 * 1000 * 1000 };

/* Memory that a buffer covers. */
typedef struct {
    uintptr_t low, high;
    id buffer;
    bool owned; /* by cv_metal_alloc */
} region;

typedef struct {
    char name[48];
    cv_metal_constants constants;
    id pipeline; /* NULL: a free slot */
    size_t max_threads;
} pipeline;

struct cv_metal_device {
    cv_objc objc;
    id device, queue, residency;
    id event;            /* MTLSharedEvent of hand-overs; NULL: not chosen, or waiting is quicker */
    uint64_t event_value;
    bool hand_over_chosen;
    bool residency_changed;
    id libraries[CV_METAL_FAMILIES];
    pipeline pipelines[PIPELINES]; /* hash table */
    region *regions;               /* by low */
    size_t n_regions, room_regions, used_bytes, working_set, max_buffer;
    /* the step that is being recorded */
    void *pool;
    id commands[OPEN_COMMANDS], encoder; /* committed ones are retained until finish */
    size_t n_commands;
    const pipeline *current;
    double work;
    int code;
    char text[TEXT];
};

static void fail(cv_metal_device *d, int code, const char *what, id error) {
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

static void release(cv_metal_device *d, id o) {
    if (o) CV_SEND0(&d->objc, void, o, release);
}

static id string(cv_metal_device *d, const char *text) { return CV_SEND(&d->objc, id, d->objc.get_class("NSString"), string, (const char *), text); }

static id new_object(cv_metal_device *d, const char *class_name) {
    id c = d->objc.get_class(class_name);
    return c ? CV_SEND0(&d->objc, id, CV_SEND0(&d->objc, id, c, alloc), init) : NULL;
}

/* ---- memory ---- */

/* Residency sets are there from macOS 15 on; before, Metal decides by itself. */
static void open_residency(cv_metal_device *d) {
    if (!CV_SEND(&d->objc, bool, d->device, responds, (SEL), d->objc.sel.new_residency)) return;
    id descriptor = new_object(d, "MTLResidencySetDescriptor"), error = NULL;
    if (!descriptor) return;
    d->residency = CV_SEND(&d->objc, id, d->device, new_residency, (id, id *), descriptor, &error);
    release(d, descriptor);
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
static const region *find_region(const cv_metal_device *d, uintptr_t p, size_t bytes) {
    size_t i = region_after(d, p);
    for (size_t k = 0; k < LOOK_BACK && i-- > 0; k++)
        if (p + bytes <= d->regions[i].high) return &d->regions[i];
    return NULL;
}

static int add_region(cv_metal_device *d, uintptr_t low, size_t bytes, id buffer, bool owned, cv_err err) {
    if (d->n_regions == d->room_regions) {
        size_t room = d->room_regions ? 2 * d->room_regions : 256;
        region *list = realloc(d->regions, room * sizeof *list);
        if (!list) return cv_fail(err, CV_E_MEMORY, "no memory for the table of buffers");
        d->regions = list;
        d->room_regions = room;
    }
    size_t i = region_after(d, low);
    memmove(&d->regions[i + 1], &d->regions[i], (d->n_regions - i) * sizeof *d->regions);
    d->regions[i] = (region){low, low + bytes, buffer, owned};
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
    if (code) release(d, buffer);
    else *out = memset(p, 0, bytes);
    d->objc.pool_pop(pool);
    return code;
}

void cv_metal_free(cv_metal_device *d, void *p) {
    for (size_t i = 0; p && i < d->n_regions; i++) {
        region r = d->regions[i];
        if (!r.owned || r.low != (uintptr_t)p) continue;
        memmove(&d->regions[i], &d->regions[i + 1], (d->n_regions - i - 1) * sizeof r);
        d->n_regions--;
        d->used_bytes -= r.high - r.low;
        if (d->residency) {
            CV_SEND(&d->objc, void, d->residency, remove_allocation, (id), r.buffer);
            d->residency_changed = true;
        }
        release(d, r.buffer);
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
    if (code) release(d, buffer);
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

/* ---- pipelines ---- */

/* Without fast math: it lets the compiler sum in another order in each variant of a kernel, and then a row would have other bits
 * in a batch than alone. The products are fma by fma anyway; where speed needs it, kernels say fast::exp. */
static id library(cv_metal_device *d, const char *kernel) {
    int family = cv_metal_family_of(kernel);
    if (family < 0 || d->libraries[family]) return family < 0 ? NULL : d->libraries[family];
    char *source = cv_metal_source(family);
    if (!source) return NULL;
    id error = NULL, options = new_object(d, "MTLCompileOptions");
    if (options) CV_SEND(&d->objc, void, options, fast_math, (bool), false);
    d->libraries[family] = CV_SEND(&d->objc, id, d->device, new_library, (id, id, id *), string(d, source), options, &error);
    if (!d->libraries[family]) fail(d, CV_E_UNSUPPORTED, "Metal cannot compile the kernels", error);
    release(d, options);
    free(source);
    return d->libraries[family];
}

static id constant_values(cv_metal_device *d, const cv_metal_constants *c) {
    enum { TYPE_UINT = 33, TYPE_BOOL = 53 }; /* MTLDataType */
    const struct { const void *value; NSUInteger type, index; } others[] = {
        {&c->same_formats, TYPE_BOOL, CV_FC_SAME_FORMATS}, {&c->norm, TYPE_BOOL, CV_FC_NORM}, {&c->input_float, TYPE_BOOL, CV_FC_INPUT_FLOAT}, {&c->output, TYPE_UINT, CV_FC_OUTPUT},
        {&c->bias, TYPE_BOOL, CV_FC_BIAS}, {&c->rows, TYPE_BOOL, CV_FC_ROWS}, {&c->swiglu, TYPE_BOOL, CV_FC_SWIGLU}, {&c->experts, TYPE_UINT, CV_FC_EXPERTS}, {&c->layer, TYPE_UINT, CV_FC_LAYER},
    };
    id values = new_object(d, "MTLFunctionConstantValues");
    for (NSUInteger i = 0; values && i < 16; i++) CV_SEND(&d->objc, void, values, set_constant, (const void *, NSUInteger, NSUInteger), &c->formats[i], TYPE_UINT, i);
    for (size_t i = 0; values && i < sizeof others / sizeof others[0]; i++) CV_SEND(&d->objc, void, values, set_constant, (const void *, NSUInteger, NSUInteger), others[i].value, others[i].type, others[i].index);
    return values;
}

static void make_pipeline(cv_metal_device *d, pipeline *p) {
    id lib = library(d, p->name), error = NULL;
    if (!lib) {
        cv_metal_refuse(d, CV_E_UNSUPPORTED, "no such kernel family");
        return;
    }
    id values = constant_values(d, &p->constants);
    id function = CV_SEND(&d->objc, id, lib, new_function, (id, id, id *), string(d, p->name), values, &error);
    if (!function) fail(d, CV_E_UNSUPPORTED, p->name, error);
    else {
        p->pipeline = CV_SEND(&d->objc, id, d->device, new_pipeline, (id, id *), function, &error);
        if (!p->pipeline) fail(d, CV_E_UNSUPPORTED, p->name, error);
        else p->max_threads = CV_SEND0(&d->objc, NSUInteger, p->pipeline, max_threads);
    }
    release(d, function);
    release(d, values);
}

/* The named members: what follows them in memory is not defined. */
static const size_t CONSTANT_BYTES = offsetof(cv_metal_constants, swiglu) + sizeof(bool);

static size_t hash(const char *name, const cv_metal_constants *c) {
    uint64_t h = 1469598103934665603u;
    for (; *name; name++) h = (h ^ (unsigned char)*name) * 1099511628211u;
    for (size_t i = 0; i < CONSTANT_BYTES; i++) h = (h ^ ((const unsigned char *)c)[i]) * 1099511628211u;
    return (size_t)(h % PIPELINES);
}

void cv_metal_use(cv_metal_device *d, const char *kernel, const cv_metal_constants *constants) {
    if (d->code) return;
    size_t at = hash(kernel, constants);
    for (size_t i = 0; i < PIPELINES; i++, at = (at + 1) % PIPELINES) {
        pipeline *p = &d->pipelines[at];
        if (!p->pipeline) {
            snprintf(p->name, sizeof p->name, "%s", kernel);
            p->constants = *constants;
            make_pipeline(d, p);
        } else if (strcmp(p->name, kernel) || memcmp(&p->constants, constants, CONSTANT_BYTES)) continue;
        d->current = p;
        if (!d->code) CV_SEND(&d->objc, void, d->encoder, set_pipeline, (id), p->pipeline);
        return;
    }
    cv_metal_refuse(d, CV_E_UNSUPPORTED, "the model needs more kernel variants than the table has");
}

/* ---- commands ---- */

static void open_commands(cv_metal_device *d) {
    id commands = CV_SEND0(&d->objc, id, d->queue, command_buffer);
    d->encoder = commands ? CV_SEND0(&d->objc, id, commands, encoder) : NULL;
    if (!d->encoder) {
        cv_metal_refuse(d, CV_E_STEP, "the GPU gives no command buffer");
        return;
    }
    d->commands[d->n_commands++] = CV_SEND0(&d->objc, id, commands, retain);
    d->work = 0;
}

/* Memory is made resident before the first command that uses it. */
static void commit(cv_metal_device *d) {
    cv_metal_make_resident(d);
    CV_SEND0(&d->objc, void, d->encoder, end_encoding);
    CV_SEND0(&d->objc, void, d->commands[d->n_commands - 1], commit);
    d->encoder = NULL;
}

int cv_metal_begin(cv_metal_device *d) {
    d->code = CV_OK;
    d->text[0] = 0;
    d->n_commands = 0;
    d->pool = d->objc.pool_push();
    open_commands(d);
    return d->code;
}

void cv_metal_bind(cv_metal_device *d, unsigned index, const void *p, size_t bytes) {
    if (d->code) return;
    const region *r = find_region(d, (uintptr_t)p, bytes);
    if (!r) {
        char text[TEXT / 2] = "";
        int code = cv_metal_share(d, p, bytes, (cv_err){text, sizeof text});
        r = code ? NULL : find_region(d, (uintptr_t)p, bytes);
        if (!r) {
            cv_metal_refuse(d, code ? code : CV_E_MEMORY, code ? text : "the table of buffers has too many overlaps");
            return;
        }
    }
    CV_SEND(&d->objc, void, d->encoder, set_buffer, (id, NSUInteger, NSUInteger), r->buffer, (NSUInteger)((uintptr_t)p - r->low), (NSUInteger)index);
}

void cv_metal_bytes(cv_metal_device *d, unsigned index, const void *p, size_t bytes) {
    if (!d->code) CV_SEND(&d->objc, void, d->encoder, set_bytes, (const void *, NSUInteger, NSUInteger), p, (NSUInteger)bytes, (NSUInteger)index);
}

void cv_metal_dispatch(cv_metal_device *d, const size_t groups[3], size_t threads, double work) {
    if (d->code) return;
    if (threads > d->current->max_threads) {
        snprintf(d->text, sizeof d->text, "%s: this GPU runs at most %zu of its threads in a group, %zu are needed", d->current->name, d->current->max_threads, threads);
        d->code = CV_E_UNSUPPORTED;
        return;
    }
    MTLSize g = {groups[0], groups[1], groups[2]}, t = {threads, 1, 1};
    CV_SEND(&d->objc, void, d->encoder, dispatch, (MTLSize, MTLSize), g, t);
    d->work += work;
    if (d->work < MOST_WORK || d->n_commands == OPEN_COMMANDS) return;
    commit(d);
    open_commands(d);
}

/* Waits for the first `committed` command buffers, looks at how they ended, and lets go of all. */
static void wait_for_commands(cv_metal_device *d, size_t committed) {
    enum { STATUS_COMPLETED = 4 };
    if (committed) CV_SEND0(&d->objc, void, d->commands[committed - 1], wait); /* a queue runs them in order */
    for (size_t i = 0; i < committed; i++)
        if (CV_SEND0(&d->objc, NSUInteger, d->commands[i], status) != STATUS_COMPLETED) fail(d, CV_E_STEP, "the GPU stopped", CV_SEND0(&d->objc, id, d->commands[i], error));
    for (size_t i = 0; i < d->n_commands; i++) release(d, d->commands[i]);
    d->n_commands = 0;
}

/* Commits what is open, waits, and looks at how it ended. */
static void complete(cv_metal_device *d) {
    size_t committed = d->n_commands;
    if (d->code) { /* what has been recorded last is dropped */
        if (d->encoder) CV_SEND0(&d->objc, void, d->encoder, end_encoding);
        if (d->encoder) committed--;
        d->encoder = NULL;
    } else {
        commit(d);
    }
    wait_for_commands(d, committed);
}

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Looks until the GPU has come to the event's value; false when it takes longer than LOOK_NS. */
static bool reaches(cv_metal_device *d, id event, uint64_t value) {
    for (uint64_t start = now_ns(); CV_SEND0(&d->objc, uint64_t, event, signaled) < value;)
        if (now_ns() - start > LOOK_NS) return false;
    return true;
}

/* The quickest of some empty command buffers, until the host knows that it is through. 0: it never came. */
static uint64_t hand_over_ns(cv_metal_device *d, id event, bool look) {
    uint64_t best = 0;
    for (int i = 0; i < HAND_OVER_TRIALS; i++) {
        id commands = CV_SEND0(&d->objc, id, d->queue, command_buffer);
        uint64_t start = now_ns(), value = ++d->event_value;
        CV_SEND(&d->objc, void, commands, signal, (id, uint64_t), event, value);
        CV_SEND0(&d->objc, void, commands, commit);
        bool came = look && reaches(d, event, value);
        if (!came) CV_SEND0(&d->objc, void, commands, wait);
        uint64_t ns = now_ns() - start;
        if (look && !came) return 0;
        if (!best || ns < best) best = ns;
    }
    return best;
}

/* Waiting for a command buffer wakes a thread; looking at an event does not, but holds a core. Which is quicker is measured once.
 * CARAVAN_METAL_HAND_OVER=event or wait decides instead (tests). */
static void choose_hand_over(cv_metal_device *d) {
    const char *asked = getenv("CARAVAN_METAL_HAND_OVER");
    d->hand_over_chosen = true;
    if (asked && !strcmp(asked, "wait")) return;
    id event = CV_SEND0(&d->objc, id, d->device, new_event);
    if (!event) return;
    uint64_t look = hand_over_ns(d, event, true), wait = hand_over_ns(d, event, false);
    if (look && (look < wait || (asked && !strcmp(asked, "event")))) d->event = event;
    else release(d, event);
}

/* A GPU that failed signals nothing: then the command buffers are waited for, and say why. */
int cv_metal_sync(cv_metal_device *d) {
    if (!d->hand_over_chosen) choose_hand_over(d);
    if (!d->code && d->event && d->n_commands + 1 < OPEN_COMMANDS) {
        uint64_t value = ++d->event_value;
        cv_metal_make_resident(d);
        CV_SEND0(&d->objc, void, d->encoder, end_encoding);
        d->encoder = NULL;
        CV_SEND(&d->objc, void, d->commands[d->n_commands - 1], signal, (id, uint64_t), d->event, value);
        CV_SEND0(&d->objc, void, d->commands[d->n_commands - 1], commit);
        if (reaches(d, d->event, value)) {
            open_commands(d);
            return d->code;
        }
        wait_for_commands(d, d->n_commands);
    } else {
        complete(d);
    }
    if (!d->code) open_commands(d);
    return d->code;
}

int cv_metal_finish(cv_metal_device *d, cv_err err) {
    if (!d->pool) return cv_fail(err, CV_E_STEP, "no step was begun");
    complete(d);
    d->objc.pool_pop(d->pool);
    d->pool = NULL;
    return d->code ? cv_fail(err, d->code, "%s", d->text) : CV_OK;
}

/* ---- life ---- */

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
        open_residency(d);
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

void cv_metal_device_close(cv_metal_device *d) {
    if (!d) return;
    void *pool = d->objc.pool_push();
    for (size_t i = 0; i < PIPELINES; i++) release(d, d->pipelines[i].pipeline);
    for (size_t i = 0; i < CV_METAL_FAMILIES; i++) release(d, d->libraries[i]);
    for (size_t i = 0; i < d->n_regions; i++) release(d, d->regions[i].buffer);
    release(d, d->event);
    release(d, d->queue);
    release(d, d->residency);
    release(d, d->device);
    d->objc.pool_pop(pool);
    free(d->regions);
    free(d);
}
