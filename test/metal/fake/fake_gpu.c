/* fake_gpu.c — runs committed command buffers on a thread of their queue. Commands see memory as it is when they run, not as it
 * was when they were encoded, and a host that does not wait reads what is there: as on a GPU. */
#define _GNU_SOURCE
#include "fake_gpu.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { EVENT_SECONDS = 10, REPORT = 1 << 16 };

typedef struct queue_state {
    pthread_t thread;
    object *waiting[4096]; /* ring of committed command buffers */
    unsigned head, tail;
    bool stop;
} queue_state;

fake_counters fake_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* states, queues, events */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_mutex_t executor_lock = PTHREAD_MUTEX_INITIALIZER; /* a library runs one dispatch at a time */

uint64_t fake_setting(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

API uint64_t fakemetal_count(const char *what) {
    const struct { const char *name; const uint64_t *value; } all[] = {
        {"allocations", &fake_count.allocations}, {"allocated_bytes", &fake_count.allocated_bytes}, {"libraries", &fake_count.libraries}, {"pipelines", &fake_count.pipelines},
        {"command_buffers", &fake_count.command_buffers}, {"dispatches", &fake_count.dispatches}, {"threadgroups", &fake_count.threadgroups}, {"waits", &fake_count.waits},
        {"event_waits", &fake_count.event_waits}, {"archive_hits", &fake_count.archive_hits}, {"archives_opened", &fake_count.archives_opened},
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (!strcmp(all[i].name, what)) return __atomic_load_n(all[i].value, __ATOMIC_SEQ_CST);
    fake_misuse("no counter %s", what);
}

/* ---- events ---- */

uint64_t fake_event_value(object *event) {
    pthread_mutex_lock(&lock);
    uint64_t v = (uint64_t)event->size;
    pthread_mutex_unlock(&lock);
    return v;
}

void fake_event_set(object *event, uint64_t value) {
    pthread_mutex_lock(&lock);
    event->size = (size_t)value;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* False after EVENT_SECONDS: a GPU gives up as well. */
static bool wait_for_event(object *event, uint64_t value) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += (time_t)fake_setting("FAKEMETAL_TIMEOUT_SECONDS", EVENT_SECONDS);
    pthread_mutex_lock(&lock);
    int timed_out = 0;
    while (event->size < value && !timed_out) timed_out = pthread_cond_timedwait(&changed, &lock, &until);
    bool reached = event->size >= value;
    pthread_mutex_unlock(&lock);
    return reached;
}

/* ---- one dispatch ---- */

/* A buffer over memory that was unmapped would fault: on a Mac in the kernel's page tables. */
static bool memory_is_there(const object *buffer) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (buffer->size + page - 1) / page;
    unsigned char in_core;
    for (size_t i = 0; i < pages; i += pages > 64 ? pages / 64 : 1)
        if (mincore((char *)buffer->memory + i * page, page, &in_core)) return false;
    return true;
}

/* Adds the kernel's name and, for the first address in it, the source line. */
static void explain(const fake_library *library, const char *kernel, char *report) {
    const char *at = strstr(report, "@pc ");
    char line[512] = "", command[1024];
    if (at) {
        snprintf(command, sizeof command, "addr2line -e %s 0x%lx", library->path, strtoul(at + 4, NULL, 16) - 1);
        FILE *p = popen(command, "r");
        if (!p || !fgets(line, sizeof line, p)) *line = 0;
        if (p) pclose(p);
        line[strcspn(line, "\n")] = 0;
    }
    size_t used = strlen(report);
    snprintf(report + used, REPORT - used, "in %s%s%s", kernel, *line ? ", first at " : "", line);
}

static msl_dispatch last_dispatch;

/* Counts of one buffer in the dispatch that ran last: bytes and lines (FAKEMETAL_CHECKED with FAKEMETAL_LINES), as lines.cpp has them. */
API uint64_t fakemetal_last(const char *what, unsigned buffer) {
    if (buffer >= MSL_BUFFERS) fake_misuse("no buffer %u", buffer);
    if (!strcmp(what, "distinct")) return last_dispatch.distinct[buffer];
    if (!strcmp(what, "lines")) return last_dispatch.lines_touched[buffer];
    if (!strcmp(what, "least")) return last_dispatch.lines_least[buffer];
    fake_misuse("no count %s", what);
}

static bool run_dispatch(command *c, char *report) {
    object *function = c->pipeline->first;
    const fake_library *library = function->first->extra;
    bool checked = getenv("FAKEMETAL_CHECKED") != NULL;
    static uint32_t seed;
    msl_dispatch d = {.flags = checked ? MSL_CHECK | MSL_SHUFFLE | (getenv("FAKEMETAL_LINES") ? MSL_LINES : 0) : 0, .seed = __atomic_add_fetch(&seed, 1, __ATOMIC_RELAXED)};
    for (int k = 0; k < 3; k++) {
        d.groups[k] = c->groups[k];
        d.threads[k] = c->threads[k];
        d.grid[k] = c->grid[k];
    }
    for (int i = 0; i < MSL_BUFFERS; i++) {
        const object *b = c->buffers[i];
        d.threadgroup_lengths[i] = c->threadgroup_lengths[i];
        if (c->bytes[i]) d.buffers[i] = (msl_bound_buffer){c->bytes[i], c->bytes_length[i]};
        if (!b) continue;
        if (!memory_is_there(b)) {
            snprintf(report, REPORT, "the memory of buffer %d was unmapped while a command used it", i);
            return false;
        }
        d.buffers[i] = (msl_bound_buffer){(char *)b->memory + c->offsets[i], b->size - c->offsets[i]};
    }
    pthread_mutex_lock(&executor_lock);
    const fake_constants *constants = function->extra;
    library->clear_constants();
    for (int i = 0; constants && i < constants->n; i++) library->set_constant(constants->all[i].index, constants->all[i].value, constants->all[i].size);
    int code = library->run(function->memory, &d, report, REPORT);
    pthread_mutex_unlock(&executor_lock);
    memcpy(c->bytes_read, d.bytes_read, sizeof d.bytes_read);
    memcpy(c->lines_touched, d.lines_touched, sizeof d.lines_touched);
    memcpy(c->lines_least, d.lines_least, sizeof d.lines_least);
    memcpy(c->distinct, d.distinct, sizeof d.distinct);
    last_dispatch = d;
    __atomic_add_fetch(&fake_count.dispatches, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&fake_count.threadgroups, (uint64_t)c->groups[0] * c->groups[1] * c->groups[2], __ATOMIC_SEQ_CST);
    if (code) explain(library, function->memory, report);
    return !code;
}

/* ---- memory limit ---- */

typedef struct {
    const object *all[65536];
    size_t n, bytes;
} buffer_set;

static void add_buffer(buffer_set *s, const object *b) {
    for (size_t i = 0; i < s->n; i++)
        if (s->all[i] == b) return;
    if (s->n < 65536) s->all[s->n++] = b;
    s->bytes += b->size;
}

/* Bytes of all buffers that the command buffer needs, with the residency sets of its queue. */
static size_t bytes_needed(const object *command_buffer) {
    const command_list *list = command_buffer->extra;
    buffer_set *s = calloc(1, sizeof *s);
    for (int i = 0; s && i < list->n; i++)
        for (int k = 0; k < MSL_BUFFERS; k++)
            if (list->all[i].buffers[k]) add_buffer(s, list->all[i].buffers[k]);
    const object *set = command_buffer->first->second;
    for (size_t i = 0; s && set && i < set->size; i++) add_buffer(s, ((object **)set->memory)[i]);
    size_t bytes = s ? s->bytes : 0;
    free(s);
    return bytes;
}

/* With FAKEMETAL_RESIDENT: whether all memory that the commands use was requested before. A Mac brings the rest in by itself, one fault
 * after another while the GPU waits, and near its limit that never ends. */
static bool all_resident(const object *command_buffer, char *report) {
    const command_list *list = command_buffer->extra;
    const object *set = command_buffer->first->second;
    for (int i = 0; i < list->n; i++)
        for (int k = 0; k < MSL_BUFFERS; k++) {
            const object *b = list->all[i].buffers[k];
            bool found = !b;
            for (int r = 0; set && !found && r < set->state; r++) found = ((object **)set->memory)[r] == b;
            if (found) continue;
            snprintf(report, REPORT, "buffer %d of dispatch %d is not resident", k, i);
            return false;
        }
    return true;
}

/* ---- command buffers ---- */

object *fake_error(const char *text) {
    object *e = fake_new("NSError");
    e->memory = strdup(text);
    return e;
}

static bool run_command(command *c, char *report) {
    switch (c->kind) {
    case DISPATCH: return run_dispatch(c, report);
    case SIGNAL: fake_event_set(c->event, c->value); return true;
    case WAIT:
        __atomic_add_fetch(&fake_count.event_waits, 1, __ATOMIC_SEQ_CST);
        if (wait_for_event(c->event, c->value)) return true;
        snprintf(report, REPORT, "Caused GPU Timeout Error: an event has not reached %llu", (unsigned long long)c->value);
        return false;
    }
    return true;
}

static void write_numbers(FILE *f, const uint64_t numbers[MSL_BUFFERS]) {
    for (int k = 0; k < MSL_BUFFERS; k++) fprintf(f, "%s%llu", k ? "," : "", (unsigned long long)numbers[k]);
}

/* What a test reads: totals after each command buffer, a JSON object a line. One write a line: ranks may share a file, and a
 * test may read it meanwhile. */
static void write_log(const object *command_buffer, bool failed) {
    const char *name = getenv("FAKEMETAL_LOG"), *number = name ? strstr(name, "%d") : NULL; /* %d: a file for each process */
    char path[1024];
    if (number) snprintf(path, sizeof path, "%.*s%d%s", (int)(number - name), name, (int)getpid(), number + 2);
    else if (name) snprintf(path, sizeof path, "%s", name);
    int log = name ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644) : -1;
    if (log < 0) return;
    char *line = NULL;
    size_t length = 0;
    FILE *f = open_memstream(&line, &length);
    if (!f) abort();
    const command_list *list = command_buffer->extra;
    bool first = true;
    fprintf(f, "{\"failed\":%s,\"dispatches\":%d,\"allocations\":%llu,\"pipelines\":%llu,\"command_buffers\":%llu,\"waits\":%llu,\"event_waits\":%llu,\"kernels\":[", failed ? "true" : "false", list->n, (unsigned long long)fake_count.allocations,
            (unsigned long long)fake_count.pipelines, (unsigned long long)fake_count.command_buffers, (unsigned long long)fake_count.waits,
            (unsigned long long)fake_count.event_waits);
    for (int i = 0; i < list->n; i++) {
        const command *c = &list->all[i];
        if (c->kind != DISPATCH) continue;
        fprintf(f, "%s{\"name\":\"%s\",\"threadgroups\":%u,\"read\":[", first ? "" : ",", (const char *)c->pipeline->first->memory, c->groups[0] * c->groups[1] * c->groups[2]);
        first = false;
        write_numbers(f, c->bytes_read);
        fputs("]}", f);
    }
    fputs("]}\n", f);
    if (fclose(f) != 0 || write(log, line, length) != (ssize_t)length) {
        perror("FAKEMETAL_LOG");
        abort();
    }
    free(line);
    close(log);
}

static void run_command_buffer(object *o) {
    static _Thread_local char report[REPORT];
    command_list *list = o->extra;
    size_t limit = (size_t)fake_setting("FAKEMETAL_WORKING_SET", SIZE_MAX), bytes = limit == SIZE_MAX ? 0 : bytes_needed(o);
    bool ok = bytes <= limit;
    *report = 0;
    if (!ok) snprintf(report, REPORT, "Insufficient Memory: the commands need %zu bytes, the working set is %zu", bytes, limit);
    if (ok && getenv("FAKEMETAL_RESIDENT")) ok = all_resident(o, report);
    __atomic_add_fetch(&fake_count.command_buffers, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; ok && i < list->n; i++) ok = run_command(&list->all[i], report);
    write_log(o, !ok);
    for (int i = 0; i < list->n; i++) {
        command *c = &list->all[i];
        fake_release(c->pipeline);
        fake_release(c->event);
        for (int k = 0; k < MSL_BUFFERS; k++) {
            fake_release(c->buffers[k]);
            free(c->bytes[k]);
        }
    }
    list->n = 0;
    pthread_mutex_lock(&lock);
    if (!ok) o->second = fake_error(report);
    __atomic_store_n(&o->state, ok ? COMPLETED : FAILED, __ATOMIC_SEQ_CST);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void *queue_main(void *arg) {
    queue_state *q = arg;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (q->head == q->tail && !q->stop) pthread_cond_wait(&changed, &lock);
        object *next = q->head == q->tail ? NULL : q->waiting[q->head++ % 4096];
        pthread_mutex_unlock(&lock);
        if (!next) return NULL;
        run_command_buffer(next);
        fake_release(next);
    }
}

void fake_queue_open(object *queue) {
    queue_state *q = calloc(1, sizeof *q);
    queue->extra = q;
    if (!q || pthread_create(&q->thread, NULL, queue_main, q)) fake_misuse("cannot start a queue's thread");
}

void fake_queue_close(object *queue) {
    queue_state *q = queue->extra;
    pthread_mutex_lock(&lock);
    q->stop = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    if (!pthread_equal(pthread_self(), q->thread)) pthread_join(q->thread, NULL);
    else pthread_detach(q->thread);
}

void fake_commit(object *command_buffer) {
    queue_state *q = command_buffer->first->extra;
    fake_retain(command_buffer);
    pthread_mutex_lock(&lock);
    if (q->tail - q->head == 4096) fake_misuse("4096 command buffers wait in a queue");
    __atomic_store_n(&command_buffer->state, COMMITTED, __ATOMIC_SEQ_CST);
    q->waiting[q->tail++ % 4096] = command_buffer;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void fake_wait(object *command_buffer) {
    __atomic_add_fetch(&fake_count.waits, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&lock);
    while (command_buffer->state < COMPLETED) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}
