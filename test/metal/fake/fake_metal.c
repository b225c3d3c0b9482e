/* fake_metal.c — the methods of Foundation and Metal that the host uses, with the checks of Metal's validation layer.
 *
 * Members of `object` by class:
 *   NSString, NSError        memory: text
 *   MTLBuffer                memory, size; extra: the allocation (NULL when not copied)
 *   MTLLibrary               extra: fake_library
 *   MTLFunction              memory: name; first: library; extra: fake_constants
 *   MTLFunctionConstantValues extra: fake_constants
 *   MTLComputePipelineState  first: function
 *   MTLCommandQueue          extra: its thread; second: residency set
 *   MTLCommandBuffer         first: queue; second: error; extra: command_list; size: 1 while an encoder is open
 *   MTLComputeCommandEncoder first: command buffer; extra: command; state 1: ended
 *   MTLSharedEvent           size: value
 *   MTLResidencySet          memory, size: buffers; state: of the buffers, how many were requested (first ones)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fake_archive.h"
#include "fake_gpu.h"

typedef unsigned long NSUInteger;
typedef struct { NSUInteger width, height, depth; } MTLSize;

#define UNUSED(x) (void)(x)

void fake_dispose(object *o) {
    const char *c = o->isa->name;
    if (fake_archive_dispose(o)) return;
    if (!strcmp(c, "MTLBuffer")) free(o->extra);
    if (!strcmp(c, "MTLCommandQueue")) {
        fake_queue_close(o);
        fake_release(o->second);
    }
    if (!strcmp(c, "MTLFunction") || !strcmp(c, "MTLComputePipelineState")) fake_release(o->first);
    if (!strcmp(c, "MTLCommandBuffer")) {
        if (o->state == NOT_ENQUEUED && o->size) fake_misuse("a command buffer is freed with an open encoder");
        fake_release(o->first);
        fake_release(o->second);
    }
    if (!strcmp(c, "MTLResidencySet"))
        for (size_t i = 0; i < o->size; i++) fake_release(((object **)o->memory)[i]);
}

/* ---- Foundation ---- */

static object *string_of(const char *text) {
    object *o = fake_new("NSString");
    o->memory = strdup(text);
    return fake_autorelease(o);
}
static object *string_utf8(fake_class *c, SEL s, const char *text) { UNUSED(c), UNUSED(s); return string_of(text); }
static const char *string_get(object *o, SEL s) { UNUSED(s); return o->memory; }
static object *error_text(object *o, SEL s) { UNUSED(s); return string_of(o->memory); }

/* ---- the system ---- */

/* macOS of the version FAKEMETAL_MACOS; residency sets came with 15, bfloat with 14. */
static const char *macos_version(void) {
    const char *version = getenv("FAKEMETAL_MACOS");
    return version && *version ? version : "15.1";
}

bool fake_lacks(const char *selector) {
    if (getenv("FAKEMETAL_NO_ARCHIVES") && !strcmp(selector, "newBinaryArchiveWithDescriptor:error:")) return true;
    return atoi(macos_version()) < 15 && !strcmp(selector, "newResidencySetWithDescriptor:error:");
}

const char *fake_build(void) {
    const char *build = getenv("FAKEMETAL_BUILD");
    return build && *build ? build : "24B83";
}

API int sysctlbyname(const char *name, void *out, size_t *size, void *new_value, size_t new_size) {
    UNUSED(new_value), UNUSED(new_size);
    const char *value = !strcmp(name, "kern.osproductversion") ? macos_version() : !strcmp(name, "kern.osversion") ? fake_build() : NULL;
    if (!value || strlen(value) + 1 > *size) return -1;
    *size = strlen(value) + 1;
    memcpy(out, value, *size);
    return 0;
}

/* ---- device ---- */

static object *device_name(object *o, SEL s) { UNUSED(o), UNUSED(s); return string_of("Fake Metal on a CPU"); }
static uint64_t device_working_set(object *o, SEL s) { UNUSED(o), UNUSED(s); return fake_setting("FAKEMETAL_WORKING_SET", 1ull << 40); }
static NSUInteger device_max_buffer(object *o, SEL s) { UNUSED(o), UNUSED(s); return fake_setting("FAKEMETAL_MAX_BUFFER", 1ull << 39); }
static bool device_unified(object *o, SEL s) { UNUSED(o), UNUSED(s); return true; }
static object *device_queue(object *o, SEL s) {
    UNUSED(o), UNUSED(s);
    object *q = fake_new("MTLCommandQueue");
    fake_queue_open(q);
    return q;
}
static object *device_event(object *o, SEL s) { UNUSED(o), UNUSED(s); return getenv("FAKEMETAL_NO_EVENTS") ? NULL : fake_new("MTLSharedEvent"); }

static object *new_buffer(void *memory, size_t n, void *allocation) {
    object *b = fake_new("MTLBuffer");
    b->memory = memory;
    b->size = n;
    b->extra = allocation;
    __atomic_add_fetch(&fake_count.allocations, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&fake_count.allocated_bytes, n, __ATOMIC_SEQ_CST);
    return b;
}
static object *device_buffer(object *o, SEL s, NSUInteger n, NSUInteger options) {
    UNUSED(options);
    if (!n || n > device_max_buffer(o, s)) return NULL;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *p = aligned_alloc(page, (n + page - 1) / page * page);
    if (!p) return NULL;
    memset(p, 0, n);
    return new_buffer(p, n, p);
}
static object *device_buffer_no_copy(object *o, SEL s, void *p, NSUInteger n, NSUInteger options, void *deallocator) {
    UNUSED(options), UNUSED(deallocator);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if ((size_t)p % page || n % page || !n) fake_misuse("newBufferWithBytesNoCopy: pointer and length must be multiples of the page size");
    return n > device_max_buffer(o, s) ? NULL : new_buffer(p, n, NULL);
}

/* ---- libraries ---- */

static void set_error(object **e, const char *text) {
    if (e) *e = fake_autorelease(fake_error(text));
}

/* The source with what FAKEMETAL_EDIT says ("text=>other text") done to it where it has the text: a fault for a test. To be freed. */
static char *edited(const char *source) {
    const char *edit = getenv("FAKEMETAL_EDIT"), *arrow = edit ? strstr(edit, "=>") : NULL;
    char *from = arrow ? strndup(edit, (size_t)(arrow - edit)) : NULL;
    const char *at = from ? strstr(source, from) : NULL;
    char *out = NULL;
    if (at && asprintf(&out, "%.*s%s%s", (int)(at - source), source, arrow + 2, at + strlen(from)) < 0) fake_misuse("no memory");
    free(from);
    return out ? out : strdup(source);
}

/* Renamed into place: another rank may compile the same source at the same time, and must never read half of it. */
static void write_source(const char *file, const char *before, const char *text) {
    char temporary[1100];
    snprintf(temporary, sizeof temporary, "%s.XXXXXX", file);
    int descriptor = mkstemp(temporary);
    FILE *f = descriptor < 0 ? NULL : fdopen(descriptor, "w");
    if (!f) fake_misuse("cannot write %s", temporary);
    fputs(before, f);
    fputs(text, f);
    if (fclose(f) != 0 || rename(temporary, file) != 0) fake_misuse("cannot write %s", file);
}

/* Compiles with $MSLC (the words of a command) into the folder $MSL_CACHE, by hash of the source. */
static object *device_library(object *o, SEL s, object *source, object *options, object **e) {
    UNUSED(o), UNUSED(s), UNUSED(options);
    int version = atoi(macos_version());
    bool asks = strstr(source->memory, "__METAL_VERSION__") != NULL; /* else one compiled library does for several versions */
    const char *before = version < 14 ? "#undef __HAVE_BFLOAT__\n#undef __METAL_VERSION__\n#define __METAL_VERSION__ 300\n" : version < 15 && asks ? "#undef __METAL_VERSION__\n#define __METAL_VERSION__ 310\n" : "";
    const char *compiler = getenv("MSLC"), *folder = getenv("MSL_CACHE");
    if (!compiler || !folder) fake_misuse("MSLC (the compiler) and MSL_CACHE (a folder) must be set");
    bool checked = getenv("FAKEMETAL_CHECKED"), fast = getenv("FAKEMETAL_FAST_MATH");
    uint64_t hash = 1469598103934665603u;
    for (const char *p = before; *p; p++) hash = (hash ^ (unsigned char)*p) * 1099511628211u;
    char *text = edited(source->memory);
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) hash = (hash ^ *p) * 1099511628211u;
    char file[1024], library[1024], line[4096], out[8192];
    snprintf(file, sizeof file, "%s/%016llx.metal", folder, (unsigned long long)hash);
    snprintf(library, sizeof library, "%s/%016llx%s%s.so", folder, (unsigned long long)hash, checked ? ".checked" : "", fast ? ".fast" : "");
    struct stat st;
    if (stat(library, &st)) {
        write_source(file, before, text);
        snprintf(line, sizeof line, "%s build %s -o %s%s%s 2>&1", compiler, file, library, checked ? " --checked" : "", fast ? " --fast-math" : "");
        FILE *p = popen(line, "r");
        size_t n = p ? fread(out, 1, sizeof out - 1, p) : 0;
        out[n] = 0;
        if (!p || pclose(p)) return set_error(e, out), NULL;
    }
    free(text);
    void *h = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!h) return set_error(e, dlerror()), NULL;
    fake_library *l = calloc(1, sizeof *l);
    *(void **)&l->run = dlsym(h, "msl_run");
    *(void **)&l->set_constant = dlsym(h, "msl_set_constant");
    *(void **)&l->clear_constants = dlsym(h, "msl_clear_constants");
    *(void **)&l->kernel_name = dlsym(h, "msl_kernel_name");
    l->path = strdup(library);
    __atomic_add_fetch(&fake_count.libraries, 1, __ATOMIC_SEQ_CST);
    object *r = fake_new("MTLLibrary");
    r->extra = l;
    return r;
}
static object *library_function(object *o, SEL s, object *name) {
    UNUSED(s);
    const fake_library *l = o->extra;
    const char *n;
    for (int i = 0; (n = l->kernel_name(i, NULL)); i++)
        if (!strcmp(n, name->memory)) {
            object *f = fake_new("MTLFunction");
            f->memory = strdup(n);
            f->first = fake_retain(o);
            return f;
        }
    return NULL;
}
static void options_fast_math(object *o, SEL s, bool on) { UNUSED(o), UNUSED(s), UNUSED(on); }
static object *constants_init(object *o, SEL s) {
    UNUSED(s);
    o->extra = calloc(1, sizeof(fake_constants));
    return o;
}
/* type: MTLDataTypeBool 53, Float 3, Int 29, UInt 33. */
static void constants_set(object *o, SEL s, const void *value, NSUInteger type, NSUInteger index) {
    UNUSED(s);
    fake_constants *c = o->extra;
    size_t size = type == 53 ? 1 : type == 3 || type == 29 || type == 33 ? 4 : 0;
    if (!size || c->n == 32) fake_misuse("setConstantValue:type:atIndex: type %lu, %d constants", type, c->n);
    fake_constant *next = &c->all[c->n++];
    *next = (fake_constant){.index = (int)index, .size = size};
    memcpy(next->value, value, size);
}
static object *library_function_constants(object *o, SEL s, object *name, object *values, object **e) {
    object *f = library_function(o, s, name);
    if (!f) return set_error(e, "the library has no such function"), NULL;
    fake_constants *c = malloc(sizeof *c);
    memcpy(c, values->extra, sizeof *c);
    f->extra = c;
    return f;
}
static object *device_pipeline(object *o, SEL s, object *function, object **e) {
    UNUSED(o), UNUSED(s), UNUSED(e);
    if (!function) fake_misuse("newComputePipelineStateWithFunction: function must not be nil");
    object *p = fake_new("MTLComputePipelineState");
    p->first = fake_retain(function);
    __atomic_add_fetch(&fake_count.pipelines, 1, __ATOMIC_SEQ_CST);
    return p;
}
static NSUInteger pipeline_max_threads(object *o, SEL s) { UNUSED(o), UNUSED(s); return fake_setting("FAKEMETAL_MAX_THREADS", 1024); }
static NSUInteger pipeline_width(object *o, SEL s) { UNUSED(o), UNUSED(s); return 32; }

/* ---- buffers, events, residency ---- */

static void *buffer_contents(object *o, SEL s) { UNUSED(s); return o->memory; }
static NSUInteger buffer_length(object *o, SEL s) { UNUSED(s); return o->size; }
static uint64_t event_value(object *o, SEL s) { UNUSED(s); return fake_event_value(o); }
static void event_set_value(object *o, SEL s, uint64_t v) {
    UNUSED(s);
    if (v < fake_event_value(o)) fake_misuse("setSignaledValue: to %llu, the event has reached %llu", (unsigned long long)v, (unsigned long long)fake_event_value(o));
    fake_event_set(o, v);
}

static object *device_residency(object *o, SEL s, object *descriptor, object **e) {
    UNUSED(o), UNUSED(s), UNUSED(e);
    if (!descriptor) fake_misuse("newResidencySetWithDescriptor: descriptor must not be nil");
    return fake_new("MTLResidencySet");
}
static void residency_add(object *o, SEL s, object *buffer) {
    UNUSED(s);
    object **list = realloc(o->memory, (o->size + 1) * sizeof *list);
    if (!list) fake_misuse("no memory");
    list[o->size++] = fake_retain(buffer);
    o->memory = list;
}
static void residency_remove(object *o, SEL s, object *buffer) {
    UNUSED(s);
    object **list = o->memory;
    for (size_t i = 0; i < o->size; i++)
        if (list[i] == buffer) {
            if (i < (size_t)o->state) list[i] = list[--o->state], list[o->state] = list[--o->size];
            else list[i] = list[--o->size];
            fake_release(buffer);
            return;
        }
}
static void residency_request(object *o, SEL s) { UNUSED(s); o->state = (int)o->size; }
static void residency_nothing(object *o, SEL s) { UNUSED(o), UNUSED(s); }
static void queue_add_residency(object *o, SEL s, object *set) {
    UNUSED(s);
    if (o->second) fake_misuse("this fake has one residency set a queue");
    o->second = fake_retain(set);
}

/* ---- command buffers and encoders ---- */

static object *queue_command_buffer(object *o, SEL s) {
    UNUSED(s);
    object *c = fake_new("MTLCommandBuffer");
    c->first = fake_retain(o);
    c->extra = calloc(1, sizeof(command_list));
    return fake_autorelease(c);
}
static void need_open(const object *command_buffer, const char *doing) {
    if (command_buffer->size) fake_misuse("%s while an encoder is open", doing);
    if (__atomic_load_n(&command_buffer->state, __ATOMIC_SEQ_CST) != NOT_ENQUEUED) fake_misuse("%s after commit", doing);
}
static object *command_buffer_encoder(object *o, SEL s) {
    UNUSED(s);
    need_open(o, "computeCommandEncoder");
    object *e = fake_new("MTLComputeCommandEncoder");
    e->first = o;
    e->extra = calloc(1, sizeof(command));
    o->size = 1;
    return fake_autorelease(e);
}
static command *append(object *command_buffer) {
    command_list *l = command_buffer->extra;
    if (l->n == l->capacity) {
        l->capacity = l->capacity * 2 + 16;
        l->all = realloc(l->all, sizeof *l->all * (size_t)l->capacity);
        if (!l->all) fake_misuse("no memory");
    }
    return &l->all[l->n++];
}
static void command_buffer_event(object *o, object *event, uint64_t value, command_kind kind) {
    need_open(o, "an event");
    fake_check_alive(event, "encoding of");
    *append(o) = (command){.kind = kind, .event = fake_retain(event), .value = value};
}
static void command_buffer_signal(object *o, SEL s, object *event, uint64_t value) { UNUSED(s); command_buffer_event(o, event, value, SIGNAL); }
static void command_buffer_wait_event(object *o, SEL s, object *event, uint64_t value) { UNUSED(s); command_buffer_event(o, event, value, WAIT); }
static void command_buffer_commit(object *o, SEL s) {
    UNUSED(s);
    need_open(o, "commit");
    fake_commit(o);
}
static void command_buffer_wait(object *o, SEL s) {
    UNUSED(s);
    if (__atomic_load_n(&o->state, __ATOMIC_SEQ_CST) < COMMITTED) fake_misuse("waitUntilCompleted before commit");
    fake_wait(o);
}
static NSUInteger command_buffer_status(object *o, SEL s) { UNUSED(s); return (NSUInteger)__atomic_load_n(&o->state, __ATOMIC_SEQ_CST); }
static object *command_buffer_error(object *o, SEL s) { UNUSED(s); return o->second; }

static command *encoding(object *encoder) {
    if (encoder->state) fake_misuse("an encoder is used after endEncoding");
    fake_check_alive(encoder->first, "encoding into");
    return encoder->extra;
}
static size_t binding(NSUInteger index) {
    if (index >= MSL_BUFFERS) fake_misuse("buffer index %lu is above 30", index);
    return index;
}
static void encoder_pipeline(object *o, SEL s, object *pipeline) {
    UNUSED(s);
    if (!pipeline) fake_misuse("setComputePipelineState: nil");
    encoding(o)->pipeline = pipeline;
}
static void drop_bytes(command *c, size_t i) {
    free(c->bytes[i]);
    c->bytes[i] = NULL;
}
static void encoder_buffer(object *o, SEL s, object *buffer, NSUInteger offset, NSUInteger index) {
    UNUSED(s);
    command *c = encoding(o);
    size_t i = binding(index);
    fake_check_alive(buffer, "setBuffer: of");
    if (buffer && offset >= buffer->size) fake_misuse("setBuffer: offset %lu of a buffer of %zu bytes", offset, buffer->size);
    drop_bytes(c, i);
    c->buffers[i] = buffer;
    c->offsets[i] = offset;
}
static void encoder_bytes(object *o, SEL s, const void *p, NSUInteger n, NSUInteger index) {
    UNUSED(s);
    command *c = encoding(o);
    size_t i = binding(index);
    if (n > 4096 || !n) fake_misuse("setBytes: of %lu bytes: 1 to 4096 are allowed", n);
    drop_bytes(c, i);
    c->buffers[i] = NULL;
    c->bytes[i] = memcpy(malloc(n), p, n);
    c->bytes_length[i] = n;
}
static void encoder_threadgroup_length(object *o, SEL s, NSUInteger n, NSUInteger index) {
    UNUSED(s);
    if (n % 16) fake_misuse("setThreadgroupMemoryLength: %lu is not a multiple of 16", n);
    encoding(o)->threadgroup_lengths[binding(index)] = n;
}
static void record(object *encoder, MTLSize groups, MTLSize threads, bool exact) {
    command *c = encoding(encoder);
    NSUInteger a_group = threads.width * threads.height * threads.depth;
    if (!c->pipeline) fake_misuse("a dispatch without a pipeline");
    fake_check_alive(c->pipeline, "dispatch with");
    if (!a_group || a_group > pipeline_max_threads(c->pipeline, "")) fake_misuse("%lu threads a threadgroup, the pipeline allows %lu", a_group, pipeline_max_threads(c->pipeline, ""));
    if (!groups.width || !groups.height || !groups.depth) fake_misuse("a dispatch of no threadgroups");
    command next = *c;
    next.kind = DISPATCH;
    const NSUInteger g[3] = {groups.width, groups.height, groups.depth}, t[3] = {threads.width, threads.height, threads.depth};
    for (int k = 0; k < 3; k++) {
        next.threads[k] = (uint32_t)t[k];
        next.groups[k] = (uint32_t)(exact ? (g[k] + t[k] - 1) / t[k] : g[k]);
        next.grid[k] = exact ? (uint32_t)g[k] : 0;
    }
    fake_retain(next.pipeline);
    for (int i = 0; i < MSL_BUFFERS; i++) {
        fake_check_alive(next.buffers[i], "dispatch with");
        fake_retain(next.buffers[i]);
        if (next.bytes[i]) next.bytes[i] = memcpy(malloc(next.bytes_length[i]), next.bytes[i], next.bytes_length[i]);
    }
    *append(encoder->first) = next;
}
static void encoder_dispatch_groups(object *o, SEL s, MTLSize groups, MTLSize threads) { UNUSED(s); record(o, groups, threads, false); }
static void encoder_dispatch_threads(object *o, SEL s, MTLSize grid, MTLSize threads) { UNUSED(s); record(o, grid, threads, true); }
static void encoder_barrier(object *o, SEL s, NSUInteger scope) { UNUSED(s), UNUSED(scope); encoding(o); }
static void encoder_end(object *o, SEL s) {
    UNUSED(s);
    command *c = encoding(o);
    for (size_t i = 0; i < MSL_BUFFERS; i++) drop_bytes(c, i);
    o->state = 1;
    o->first->size = 0;
}

#define METHOD(c, s, f) {c, s, (void *)f}
const fake_method fake_methods[] = {
    METHOD("+NSString", "stringWithUTF8String:", string_utf8),
    METHOD("NSString", "UTF8String", string_get),
    METHOD("NSError", "localizedDescription", error_text),
    METHOD("MTLDevice", "name", device_name),
    METHOD("MTLDevice", "hasUnifiedMemory", device_unified),
    METHOD("MTLDevice", "recommendedMaxWorkingSetSize", device_working_set),
    METHOD("MTLDevice", "maxBufferLength", device_max_buffer),
    METHOD("MTLDevice", "newCommandQueue", device_queue),
    METHOD("MTLDevice", "newSharedEvent", device_event),
    METHOD("MTLDevice", "newBufferWithLength:options:", device_buffer),
    METHOD("MTLDevice", "newBufferWithBytesNoCopy:length:options:deallocator:", device_buffer_no_copy),
    METHOD("MTLDevice", "newLibraryWithSource:options:error:", device_library),
    METHOD("MTLDevice", "newComputePipelineStateWithFunction:error:", device_pipeline),
    METHOD("MTLDevice", "newResidencySetWithDescriptor:error:", device_residency),
    METHOD("MTLCompileOptions", "setFastMathEnabled:", options_fast_math),
    METHOD("MTLLibrary", "newFunctionWithName:", library_function),
    METHOD("MTLLibrary", "newFunctionWithName:constantValues:error:", library_function_constants),
    METHOD("MTLFunctionConstantValues", "init", constants_init),
    METHOD("MTLFunctionConstantValues", "setConstantValue:type:atIndex:", constants_set),
    METHOD("MTLComputePipelineState", "maxTotalThreadsPerThreadgroup", pipeline_max_threads),
    METHOD("MTLComputePipelineState", "threadExecutionWidth", pipeline_width),
    METHOD("MTLBuffer", "contents", buffer_contents),
    METHOD("MTLBuffer", "length", buffer_length),
    METHOD("MTLSharedEvent", "signaledValue", event_value),
    METHOD("MTLSharedEvent", "setSignaledValue:", event_set_value),
    METHOD("MTLResidencySet", "addAllocation:", residency_add),
    METHOD("MTLResidencySet", "removeAllocation:", residency_remove),
    METHOD("MTLResidencySet", "commit", residency_nothing),
    METHOD("MTLResidencySet", "requestResidency", residency_request),
    METHOD("MTLResidencySet", "endResidency", residency_nothing),
    METHOD("MTLCommandQueue", "addResidencySet:", queue_add_residency),
    METHOD("MTLCommandQueue", "commandBuffer", queue_command_buffer),
    METHOD("MTLCommandBuffer", "computeCommandEncoder", command_buffer_encoder),
    METHOD("MTLCommandBuffer", "encodeSignalEvent:value:", command_buffer_signal),
    METHOD("MTLCommandBuffer", "encodeWaitForEvent:value:", command_buffer_wait_event),
    METHOD("MTLCommandBuffer", "commit", command_buffer_commit),
    METHOD("MTLCommandBuffer", "waitUntilCompleted", command_buffer_wait),
    METHOD("MTLCommandBuffer", "status", command_buffer_status),
    METHOD("MTLCommandBuffer", "error", command_buffer_error),
    METHOD("MTLComputeCommandEncoder", "setComputePipelineState:", encoder_pipeline),
    METHOD("MTLComputeCommandEncoder", "setBuffer:offset:atIndex:", encoder_buffer),
    METHOD("MTLComputeCommandEncoder", "setBytes:length:atIndex:", encoder_bytes),
    METHOD("MTLComputeCommandEncoder", "setThreadgroupMemoryLength:atIndex:", encoder_threadgroup_length),
    METHOD("MTLComputeCommandEncoder", "dispatchThreadgroups:threadsPerThreadgroup:", encoder_dispatch_groups),
    METHOD("MTLComputeCommandEncoder", "dispatchThreads:threadsPerThreadgroup:", encoder_dispatch_threads),
    METHOD("MTLComputeCommandEncoder", "memoryBarrierWithScope:", encoder_barrier),
    METHOD("MTLComputeCommandEncoder", "endEncoding", encoder_end),
    {NULL, NULL, NULL},
};
const char *const fake_known_classes[] = {"NSString", "NSError", "MTLCompileOptions", "MTLFunctionConstantValues", "MTLResidencySetDescriptor", "NSURL", "NSArray", "MTLBinaryArchiveDescriptor", "MTLComputePipelineDescriptor", NULL};

API void *MTLCreateSystemDefaultDevice(void) { return fake_new("MTLDevice"); }
