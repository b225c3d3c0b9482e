/* fake_gpu.h — the fake GPU: command buffers run on a thread of its queue, in order, from commit on. */
#ifndef FAKE_GPU_H
#define FAKE_GPU_H

#include "../executor/executor.h"
#include "fake_objc.h"

/* A compiled Metal library: its kernel functions, loaded. */
typedef struct {
    int (*run)(const char *, msl_dispatch *, char *, size_t);
    int (*set_constant)(int, const void *, size_t);
    void (*clear_constants)(void);
    const char *(*kernel_name)(int, const char **);
    char *path;
} fake_library;

typedef struct {
    int index;
    size_t size;
    uint8_t value[4];
} fake_constant;

typedef struct {
    int n;
    fake_constant all[32];
} fake_constants;

typedef enum { DISPATCH, SIGNAL, WAIT } command_kind;

/* Everything that a dispatch was encoded with, or an event and its value. Holds references to all its objects. */
typedef struct {
    command_kind kind;
    object *pipeline, *event;
    uint64_t value;
    object *buffers[MSL_BUFFERS];
    size_t offsets[MSL_BUFFERS];
    void *bytes[MSL_BUFFERS];
    size_t bytes_length[MSL_BUFFERS], threadgroup_lengths[MSL_BUFFERS];
    uint32_t groups[3], threads[3], grid[3];
    uint64_t bytes_read[MSL_BUFFERS]; /* by the dispatch, when it has run with checks */
    uint64_t lines_touched[MSL_BUFFERS], lines_least[MSL_BUFFERS], distinct[MSL_BUFFERS]; /* with FAKEMETAL_LINES */
} command;

typedef struct {
    int n, capacity;
    command *all;
} command_list;

/* States of a command buffer: the numbers of MTLCommandBufferStatus. */
enum { NOT_ENQUEUED = 0, COMMITTED = 2, SCHEDULED = 3, COMPLETED = 4, FAILED = 5 };

/* Totals since the process started; fakemetal_count gives them by name. */
typedef struct {
    uint64_t allocations, allocated_bytes, libraries, pipelines, command_buffers, dispatches, threadgroups, waits, event_waits, archive_hits, archives_opened;
} fake_counters;
extern fake_counters fake_count HIDDEN;

/* What the machine is told to be: FAKEMETAL_WORKING_SET, FAKEMETAL_MAX_BUFFER (bytes), FAKEMETAL_MAX_THREADS. */
uint64_t fake_setting(const char *name, uint64_t otherwise) HIDDEN;

void fake_queue_open(object *queue) HIDDEN;
void fake_queue_close(object *queue) HIDDEN;
/* Takes a reference until the buffer has run. */
void fake_commit(object *command_buffer) HIDDEN;
void fake_wait(object *command_buffer) HIDDEN;
void fake_event_set(object *event, uint64_t value) HIDDEN;
uint64_t fake_event_value(object *event) HIDDEN;
object *fake_error(const char *text) HIDDEN; /* not autoreleased */

#endif
