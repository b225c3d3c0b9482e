/* fake_test.c — the fake runtime itself: host mistakes end the process with a message; command buffers run by themselves from
 * commit on, wait for events, share words with the host, and fail as a GPU fails. */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../../native/backend/metal/device.h"
#include "../../../native/backend/metal/kernels/params.h"
#include "../../../native/backend/metal/objc.h"
#include "../../../native/test/check.h"

static const char SOURCE[] =
    "#include <metal_stdlib>\nusing namespace metal;\n"
    "kernel void copy(device uint* to [[buffer(0)]], device const uint* from [[buffer(1)]], uint i [[thread_position_in_grid]]) { to[i] = from[i]; }\n"
    /* words[0]: the kernel is there; words[1]: the host is there; words[2]: 1 = met, 2 = gave up */
    "kernel void meet(device atomic_uint* words [[buffer(0)]], constant uint& most [[buffer(1)]]) {\n"
    "  atomic_store_explicit(&words[0], 1u, memory_order_relaxed);\n"
    "  for (uint i = 0; i < most; i++)\n"
    "    if (atomic_load_explicit(&words[1], memory_order_relaxed) != 0u) { atomic_store_explicit(&words[2], 1u, memory_order_relaxed); return; }\n"
    "  atomic_store_explicit(&words[2], 2u, memory_order_relaxed);\n"
    "}\n";

typedef struct {
    cv_objc o;
    id device, queue, library, buffers[2], commands, encoder;
    void *pool;
    uint32_t *words[2]; /* contents of buffers, 64 words each */
} rig;

static SEL selector(rig *r, const char *name) { return r->o.register_name(name); }

static void open_rig(rig *r) {
    char err[256] = "";
    if (cv_objc_open(&r->o, (cv_err){err, sizeof err})) {
        fprintf(stderr, "%s\n", err);
        exit(3);
    }
    r->pool = r->o.pool_push();
    r->device = r->o.create_device();
    r->queue = CV_SEND0(&r->o, id, r->device, new_queue);
    for (int i = 0; i < 2; i++) {
        r->buffers[i] = CV_SEND(&r->o, id, r->device, new_buffer, (NSUInteger, NSUInteger), 256ul, 0ul);
        r->words[i] = CV_SEND0(&r->o, void *, r->buffers[i], contents);
    }
    r->commands = CV_SEND0(&r->o, id, r->queue, command_buffer);
    r->encoder = CV_SEND0(&r->o, id, r->commands, encoder);
}

static id pipeline(rig *r, const char *name) {
    id error = NULL, options = NULL;
    if (!r->library) r->library = CV_SEND(&r->o, id, r->device, new_library, (id, id, id *), CV_SEND(&r->o, id, r->o.get_class("NSString"), string, (const char *), SOURCE), options, &error);
    if (!r->library) {
        fprintf(stderr, "%s\n", CV_SEND0(&r->o, const char *, CV_SEND0(&r->o, id, error, description), utf8));
        exit(3);
    }
    id values = CV_SEND0(&r->o, id, CV_SEND0(&r->o, id, r->o.get_class("MTLFunctionConstantValues"), alloc), init);
    id f = CV_SEND(&r->o, id, r->library, new_function, (id, id, id *), CV_SEND(&r->o, id, r->o.get_class("NSString"), string, (const char *), name), values, &error);
    return CV_SEND(&r->o, id, r->device, new_pipeline, (id, id *), f, &error);
}

static void set_buffer(rig *r, id buffer, NSUInteger offset, NSUInteger index) { CV_SEND(&r->o, void, r->encoder, set_buffer, (id, NSUInteger, NSUInteger), buffer, offset, index); }
static void dispatch(rig *r, NSUInteger groups, NSUInteger threads) {
    MTLSize g = {groups, 1, 1}, t = {threads, 1, 1};
    CV_SEND(&r->o, void, r->encoder, dispatch, (MTLSize, MTLSize), g, t);
}
static void encode_copy(rig *r) {
    CV_SEND(&r->o, void, r->encoder, set_pipeline, (id), pipeline(r, "copy"));
    set_buffer(r, r->buffers[0], 0, 0);
    set_buffer(r, r->buffers[1], 0, 1);
    dispatch(r, 1, 64);
}
static void end(rig *r) { CV_SEND0(&r->o, void, r->encoder, end_encoding); }
static void commit(rig *r) { CV_SEND0(&r->o, void, r->commands, commit); }
static void wait_for(rig *r) { CV_SEND0(&r->o, void, r->commands, wait); }
static NSUInteger status(rig *r) { return CV_SEND0(&r->o, NSUInteger, r->commands, status); }
static const char *error_text(rig *r) {
    id e = CV_SEND0(&r->o, id, r->commands, error);
    return e ? CV_SEND0(&r->o, const char *, CV_SEND0(&r->o, id, e, description), utf8) : "";
}

/* ---- mistakes ---- */

static void unknown_selector(rig *r) { ((void (*)(id, SEL))(uintptr_t)r->o.send)(r->device, selector(r, "newBufferWithLenght:")); }
static void over_release(rig *r) {
    CV_SEND0(&r->o, void, r->buffers[0], release);
    CV_SEND0(&r->o, void, r->buffers[0], release);
}
static void freed_buffer(rig *r) {
    CV_SEND0(&r->o, void, r->buffers[0], release);
    set_buffer(r, r->buffers[0], 0, 0);
}
static void unretained_commands(rig *r) { /* the command buffer belongs to the pool, and nobody has retained it */
    end(r);
    r->o.pool_pop(r->pool);
    commit(r);
}
static void no_pool(rig *r) {
    end(r);
    r->o.pool_pop(r->pool);
    CV_SEND0(&r->o, id, r->queue, command_buffer);
}
static void open_encoder(rig *r) { commit(r); }
static void second_encoder(rig *r) { CV_SEND0(&r->o, id, r->commands, encoder); }
static void early_wait(rig *r) {
    end(r);
    wait_for(r);
}
static void ended_encoder(rig *r) {
    end(r);
    set_buffer(r, r->buffers[0], 0, 0);
}
static void committed_twice(rig *r) {
    end(r);
    commit(r);
    commit(r);
}
static void large_bytes(rig *r) {
    static char bytes[5000];
    CV_SEND(&r->o, void, r->encoder, set_bytes, (const void *, NSUInteger, NSUInteger), bytes, 5000ul, 0ul);
}
static void buffer_31(rig *r) { set_buffer(r, r->buffers[0], 0, 31); }
static void offset_outside(rig *r) { set_buffer(r, r->buffers[0], 256, 0); }
static void no_pipeline(rig *r) { dispatch(r, 1, 64); }
static void many_threads(rig *r) {
    CV_SEND(&r->o, void, r->encoder, set_pipeline, (id), pipeline(r, "copy"));
    dispatch(r, 1, 1025);
}
static void no_groups(rig *r) {
    CV_SEND(&r->o, void, r->encoder, set_pipeline, (id), pipeline(r, "copy"));
    dispatch(r, 0, 64);
}
static void unaligned_memory(rig *r) { CV_SEND(&r->o, id, r->device, new_buffer_over, (void *, NSUInteger, NSUInteger, id), (char *)r->words[0] + 64, 4096ul, 0ul, (id)NULL); }

typedef struct {
    const char *name, *message;
    void (*run)(rig *);
} mistake;

static const mistake mistakes[] = {
    {"a selector that nobody has", "unrecognized selector", unknown_selector},
    {"one release too many", "to a freed MTLBuffer", over_release},
    {"a freed buffer", "freed MTLBuffer", freed_buffer},
    {"a command buffer that nobody retained", "freed MTLCommandBuffer", unretained_commands},
    {"an autoreleased object without a pool", "without a pool", no_pool},
    {"commit with an open encoder", "encoder is open", open_encoder},
    {"a second encoder", "encoder is open", second_encoder},
    {"waiting before commit", "before commit", early_wait},
    {"an encoder after its end", "after endEncoding", ended_encoder},
    {"commit twice", "after commit", committed_twice},
    {"setBytes of more than 4096", "setBytes: of 5000", large_bytes},
    {"buffer index 31", "above 30", buffer_31},
    {"an offset behind the buffer", "offset 256", offset_outside},
    {"a dispatch without a pipeline", "without a pipeline", no_pipeline},
    {"too many threads", "1025 threads", many_threads},
    {"no threadgroups", "no threadgroups", no_groups},
    {"a no-copy buffer inside a page", "page size", unaligned_memory},
};

/* Runs fn in a process of its own; its stderr in `text`. True when it aborted. */
static bool aborts(void (*fn)(rig *), char *text, size_t size) {
    int ends[2];
    if (pipe(ends)) return false;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        rig r = {0};
        open_rig(&r);
        fn(&r);
        _exit(0);
    }
    close(ends[1]);
    size_t n = 0;
    for (ssize_t got; n + 1 < size && (got = read(ends[0], text + n, size - 1 - n)) > 0;) n += (size_t)got;
    text[n] = 0;
    close(ends[0]);
    int how = 0;
    waitpid(child, &how, 0);
    return WIFSIGNALED(how);
}

/* ---- behaviour ---- */

static bool becomes(const uint32_t *word, uint32_t value) {
    const struct timespec pause = {0, 1000000};
    for (int i = 0; i < 10000; i++) {
        if (atomic_load((const _Atomic uint32_t *)word) == value) return true;
        nanosleep(&pause, NULL);
    }
    return false;
}

static void runs_from_commit(cv_checks *c, rig *r) {
    r->words[1][63] = 7;
    encode_copy(r);
    end(r);
    cv_check(c, r->words[0][63] == 0, "it ran when it was encoded");
    r->words[1][63] = 9; /* commands read what is there when they run */
    commit(r);
    cv_check(c, becomes(&r->words[0][63], 9), "word is %u", r->words[0][63]);
}

static void waits_for_event(cv_checks *c, rig *r) {
    id event = ((id(*)(id, SEL))(uintptr_t)r->o.send)(r->device, selector(r, "newSharedEvent"));
    end(r);
    ((void (*)(id, SEL, id, uint64_t))(uintptr_t)r->o.send)(r->commands, selector(r, "encodeWaitForEvent:value:"), event, 3);
    r->encoder = CV_SEND0(&r->o, id, r->commands, encoder);
    encode_copy(r);
    end(r);
    ((void (*)(id, SEL, id, uint64_t))(uintptr_t)r->o.send)(r->commands, selector(r, "encodeSignalEvent:value:"), event, 4);
    commit(r);
    r->words[1][0] = 5; /* after commit, before the event */
    ((void (*)(id, SEL, uint64_t))(uintptr_t)r->o.send)(event, selector(r, "setSignaledValue:"), 3);
    wait_for(r);
    cv_check(c, status(r) == 4 && r->words[0][0] == 5, "status %lu, word %u", status(r), r->words[0][0]);
    cv_check(c, ((uint64_t(*)(id, SEL))(uintptr_t)r->o.send)(event, selector(r, "signaledValue")) == 4, "the event was not signalled");
}

static void gives_up_on_event(cv_checks *c, rig *r) {
    setenv("FAKEMETAL_TIMEOUT_SECONDS", "1", 1);
    id event = ((id(*)(id, SEL))(uintptr_t)r->o.send)(r->device, selector(r, "newSharedEvent"));
    end(r);
    ((void (*)(id, SEL, id, uint64_t))(uintptr_t)r->o.send)(r->commands, selector(r, "encodeWaitForEvent:value:"), event, 3);
    commit(r);
    wait_for(r);
    cv_check(c, status(r) == 5 && strstr(error_text(r), "Timeout"), "status %lu: %s", status(r), error_text(r));
    unsetenv("FAKEMETAL_TIMEOUT_SECONDS");
}

static void meet(rig *r, uint32_t most) {
    CV_SEND(&r->o, void, r->encoder, set_pipeline, (id), pipeline(r, "meet"));
    set_buffer(r, r->buffers[0], 0, 0);
    CV_SEND(&r->o, void, r->encoder, set_bytes, (const void *, NSUInteger, NSUInteger), &most, sizeof most, 1ul);
    dispatch(r, 1, 1);
    end(r);
    commit(r);
}

static void shares_words(cv_checks *c, rig *r) {
    meet(r, 0xffffffffu);
    cv_check(c, becomes(&r->words[0][0], 1), "the kernel has not come");
    atomic_store((_Atomic uint32_t *)&r->words[0][1], 1);
    wait_for(r);
    cv_check(c, status(r) == 4 && r->words[0][2] == 1, "status %lu, word %u", status(r), r->words[0][2]);
}

static void bounded_spin_ends(cv_checks *c, rig *r) {
    meet(r, 1000);
    wait_for(r);
    cv_check(c, status(r) == 4 && r->words[0][2] == 2, "status %lu, word %u", status(r), r->words[0][2]);
}

static void endless_spin_is_an_error(cv_checks *c, rig *r) {
    meet(r, 0xffffffffu);
    wait_for(r);
    cv_check(c, status(r) == 5 && strstr(error_text(r), "SPIN"), "status %lu: %s", status(r), error_text(r));
}

static void working_set(cv_checks *c, rig *r) {
    setenv("FAKEMETAL_WORKING_SET", "511", 1);
    encode_copy(r);
    end(r);
    commit(r);
    wait_for(r);
    cv_check(c, status(r) == 5 && strstr(error_text(r), "Insufficient Memory"), "status %lu: %s", status(r), error_text(r));
    unsetenv("FAKEMETAL_WORKING_SET");
}

static void residency(cv_checks *c, rig *r) {
    setenv("FAKEMETAL_RESIDENT", "1", 1);
    encode_copy(r);
    end(r);
    commit(r);
    wait_for(r);
    cv_check(c, status(r) == 5 && strstr(error_text(r), "not resident"), "status %lu: %s", status(r), error_text(r));
    unsetenv("FAKEMETAL_RESIDENT");
}

/* The host's own device: ten dispatches that say how much they compute, 10^11 multiply-adds each. */
static void long_steps_are_cut(cv_checks *c, rig *r) {
    enum { HIDDEN = 64 };
    char text[256] = "";
    cv_err err = {text, sizeof text};
    cv_metal_device *d;
    void *memory = NULL;
    uint64_t (*count)(const char *);
    for (size_t i = 0; i < 4 && !memory; i++) memory = r->o.libraries[i] ? dlsym(r->o.libraries[i], "fakemetal_count") : NULL;
    *(void **)&count = memory;
    int code = cv_metal_device_open(&d, err);
    if (!code) code = cv_metal_alloc(d, 4096, &memory, err);
    cv_check(c, !code && count, "%s", text);
    if (code || !count) return;
    uint64_t before = count("command_buffers"), waits = count("waits");
    cv_metal_constants none;
    memset(&none, 0, sizeof none);
    const cv_norm_params params = {.n = 1, .hidden = HIDDEN, .eps = 1};
    const size_t groups[3] = {1, 1, 1};
    code = cv_metal_begin(d);
    for (int i = 0; i < 10; i++) {
        cv_metal_use(d, "rms_norm_f32", &none);
        for (unsigned b = 0; b < 4; b++) cv_metal_bind(d, b, (char *)memory + 1024 * b, 1);
        cv_metal_bytes(d, 4, &params, sizeof params);
        cv_metal_dispatch(d, groups, 32, 1e11);
    }
    size_t joined;
    code = cv_metal_finish(d, &joined, err);
    cv_check(c, !code, "%s", text);
    uint64_t buffers = count("command_buffers") - before;
    cv_check(c, buffers >= 5 && buffers <= 6 && count("waits") - waits == 1, "%llu command buffers, %llu waits", (unsigned long long)buffers, (unsigned long long)(count("waits") - waits));
    cv_metal_device_close(d);
}

static void unmapped(cv_checks *c, rig *r) {
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    r->buffers[0] = CV_SEND(&r->o, id, r->device, new_buffer_over, (void *, NSUInteger, NSUInteger, id), p, 4096ul, 0ul, (id)NULL);
    encode_copy(r);
    end(r);
    munmap(p, 4096);
    commit(r);
    wait_for(r);
    cv_check(c, status(r) == 5 && strstr(error_text(r), "unmapped"), "status %lu: %s", status(r), error_text(r));
}

static void nil_is_fine(cv_checks *c, rig *r) { cv_check(c, CV_SEND0(&r->o, NSUInteger, NULL, status) == 0, "a message to nil gives something"); }

static const struct {
    const char *name;
    void (*run)(cv_checks *, rig *);
} behaviours[] = {
    {"a message to nil gives 0", nil_is_fine},
    {"commands run by themselves after commit, on memory as it is then", runs_from_commit},
    {"a command buffer waits for an event that the host signals", waits_for_event},
    {"an event that never comes ends in an error", gives_up_on_event},
    {"a running kernel and the host see each other's words", shares_words},
    {"a bounded wait for a peer that never comes ends", bounded_spin_ends},
    {"an endless wait is stopped and reported", endless_spin_is_an_error},
    {"commands that exceed the working set fail", working_set},
    {"commands on memory that was not made resident fail where that is asked for", residency},
    {"a long step is several command buffers, and the host waits once", long_steps_are_cut},
    {"memory that was unmapped under a buffer is an error", unmapped},
};

int main(void) {
    cv_checks c = {0};
    for (size_t i = 0; i < sizeof mistakes / sizeof mistakes[0]; i++) {
        char name[128], text[4096];
        snprintf(name, sizeof name, "reports %s", mistakes[i].name);
        cv_case(&c, name);
        bool aborted = aborts(mistakes[i].run, text, sizeof text);
        cv_check(&c, aborted && strstr(text, mistakes[i].message), "%s: %s", aborted ? "another message" : "accepted", text);
        cv_end_case(&c);
    }
    for (size_t i = 0; i < sizeof behaviours / sizeof behaviours[0]; i++) {
        cv_case(&c, behaviours[i].name);
        rig r = {0};
        open_rig(&r);
        behaviours[i].run(&c, &r);
        cv_end_case(&c);
    }
    return cv_report(&c);
}
