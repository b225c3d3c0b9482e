/* device_state.h — inside of a device (device.h): what its files share. */
#ifndef CV_METAL_DEVICE_STATE_H
#define CV_METAL_DEVICE_STATE_H

#include <pthread.h>

#include "device.h"
#include "kernel_source.h"
#include "objc.h"

enum { CV_METAL_PIPELINES = 512, CV_METAL_OPEN_COMMANDS = 256, CV_METAL_TEXT = 1024, CV_METAL_FOLDER = 768, CV_METAL_LIBRARIES = 64 };

/* Memory that a buffer covers. */
typedef struct {
    uintptr_t low, high;
    id buffer;
    bool owned; /* by cv_metal_alloc */
} cv_metal_region;

typedef struct {
    char name[48];
    cv_metal_constants constants;
    id pipeline; /* NULL: a free slot */
    size_t max_threads;
} cv_metal_pipeline;

/* A hand-over that is recorded in the step's command buffers, for the host to come to while they run. */
typedef struct {
    cv_host_work work;
    float *x;
    size_t n;
    uint64_t number;
} cv_metal_hand_over;

/* Ends a GPU's wait for an event when the host is late (hand_over_watch.c). */
typedef struct cv_metal_watch cv_metal_watch;

typedef struct {
    cv_metal_way way, plain; /* plain: the quicker of the ways in which the GPU waits for nobody */
    bool chosen;
    uint64_t ns[CV_METAL_WAYS]; /* a hand-over takes, as measured; 0: not possible */
    float *staging;             /* [room]: what the host adds to */
    size_t room;
    uint32_t *words;            /* CV_WORD_*, shared with a running kernel */
    uint32_t patience;          /* looks of a spinning kernel */
    uint64_t patience_ns;       /* that the GPU waits for the host */
    uint64_t spin_ns;           /* that so many looks take, as measured */
    id arrivals, releases;      /* MTLSharedEvent: the GPU has come to a number; the host lets it go on */
    cv_metal_watch *watch;
    uint64_t number;            /* given last */
    cv_metal_hand_over *joins;       /* of the running step */
    size_t n_joins, room_joins;
    size_t served;              /* of them, that the host has done */
    size_t joined;              /* hand-overs of the running step that the host has done, recorded or not */
    uint64_t took_ns;           /* the host for the last one */
    bool late;                  /* the GPU has gone on without the host */
    unsigned calm;              /* steps to go in the plain way after a late one */
    unsigned stale;             /* times that the GPU did not see the host, though it was in time */
    unsigned seen;              /* steps since then whose hand-overs all went well; many make such times forgotten */
} cv_metal_hand_overs;

/* Compiled pipelines on disk (archive.c). */
typedef struct {
    id archive; /* MTLBinaryArchive; NULL: none is kept */
    bool looked_for, changed;
    unsigned unchanged_steps, saves;
    char folder[CV_METAL_FOLDER];
    uint64_t key; /* of the system's build, the GPU and the kernels' text */
} cv_metal_archive;

struct cv_metal_device {
    cv_objc objc;
    id device, queue, residency;
    bool residency_changed;
    struct {
        cv_metal_part part;
        id library;
    } libraries[CV_METAL_LIBRARIES];
    size_t n_libraries;
    unsigned type; /* of the parts that kernels without a type are taken from */
    cv_metal_pipeline pipelines[CV_METAL_PIPELINES]; /* hash table */
    cv_metal_region *regions;                        /* by low */
    size_t n_regions, room_regions, used_bytes, working_set, max_buffer;
    cv_metal_hand_overs hand_overs;
    cv_metal_archive archive;
    /* the step that is being recorded */
    void *pool;
    id commands[CV_METAL_OPEN_COMMANDS], encoder; /* committed ones are retained until finish */
    size_t n_commands;
    bool open; /* the last one is not committed yet */
    const cv_metal_pipeline *current;
    double work;
    int code;
    char text[CV_METAL_TEXT];
};

/* device.c */
void cv_metal_fail(cv_metal_device *d, int code, const char *what, id error); /* error: NSError or NULL */
void cv_metal_release(cv_metal_device *d, id o);                             /* NULL is allowed */
id cv_metal_string(cv_metal_device *d, const char *text);                    /* autoreleased */
id cv_metal_new(cv_metal_device *d, const char *class_name);                 /* the caller's; NULL when there is no such class */
uint64_t cv_metal_now_ns(void);

/* memory.c */
void cv_metal_open_residency(cv_metal_device *d);
const cv_metal_region *cv_metal_find_region(const cv_metal_device *d, uintptr_t p, size_t bytes);

/* archive.c. None of these fails: without an archive kernels are compiled. */
id cv_metal_archived_pipeline(cv_metal_device *d, id function); /* the caller's; NULL: not in the archive */
void cv_metal_archive_add(cv_metal_device *d, id function);
void cv_metal_archive_step(cv_metal_device *d); /* a step has ended: saves what steps do not add to any more */
void cv_metal_archive_close(cv_metal_device *d);

/* commands.c */
void cv_metal_open_commands(cv_metal_device *d);
void cv_metal_open_encoder(cv_metal_device *d); /* in the command buffer that is open */
void cv_metal_end_encoder(cv_metal_device *d);
void cv_metal_commit(cv_metal_device *d);
/* Waits for the first `committed` command buffers, looks at how they ended, and lets go of all. */
void cv_metal_wait_for_commands(cv_metal_device *d, size_t committed);
/* Commits what is open, does the host's part of what runs, waits, and looks at how it ended. */
void cv_metal_complete(cv_metal_device *d);

/* hand_over.c */
void cv_metal_begin_hand_overs(cv_metal_device *d);
/* The next number of a hand-over; its lower half is never 0. */
uint64_t cv_metal_next_number(cv_metal_hand_overs *h);
/* Records a hand-over in the open command buffer (way EVENT or SPIN). */
void cv_metal_encode_hand_over(cv_metal_device *d, const cv_host_work *work, float *x, size_t n);
/* Does the host's part of all recorded hand-overs, while the command buffers run. Before it returns the GPU waits for nothing any more. */
void cv_metal_serve(cv_metal_device *d);
/* When all commands have ended: whether the GPU gave up waiting. */
void cv_metal_end_hand_overs(cv_metal_device *d);
/* Waits for what has been recorded, without ending the step: way WAIT or LOOK. */
void cv_metal_settle(cv_metal_device *d, cv_metal_way way);
void cv_metal_close_hand_overs(cv_metal_device *d);

/* hand_over_ways.c: measures the ways for n numbers and takes the quickest. No command may be open or running. */
void cv_metal_choose_way(cv_metal_device *d, size_t n);
/* The best of those measured, without `except`. */
cv_metal_way cv_metal_quickest_way(const cv_metal_hand_overs *h, int except);

/* hand_over_watch.c. NULL without memory or threads. */
cv_metal_watch *cv_metal_watch_open(cv_metal_device *d);
void cv_metal_watch_close(cv_metal_watch *w);
/* The host begins its part: in patience_ns at most `releases` gets the value `last`. */
void cv_metal_watch_start(cv_metal_watch *w, uint64_t last, uint64_t patience_ns);
/* The host has done its part. False: too late, the GPU has been let go on. */
bool cv_metal_watch_stop(cv_metal_watch *w);

#endif
