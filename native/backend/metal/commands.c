/* commands.c — a step's command buffers: recording, committing in bounded pieces, waiting for their end. */
#include <stdio.h>

#include "../../include/caravan.h"
#include "device_state.h"

/* A command buffer with more than this many multiply-adds is committed: a fraction of a second on the slowest M chip. */
static const double MOST_WORK = 2e11;

void cv_metal_open_encoder(cv_metal_device *d) {
    d->encoder = CV_SEND0(&d->objc, id, d->commands[d->n_commands - 1], encoder);
    if (!d->encoder) cv_metal_refuse(d, CV_E_STEP, "the GPU gives no command encoder");
}

void cv_metal_end_encoder(cv_metal_device *d) {
    if (d->encoder) CV_SEND0(&d->objc, void, d->encoder, end_encoding);
    d->encoder = NULL;
}

void cv_metal_open_commands(cv_metal_device *d) {
    id commands = CV_SEND0(&d->objc, id, d->queue, command_buffer);
    if (!commands) {
        cv_metal_refuse(d, CV_E_STEP, "the GPU gives no command buffer");
        return;
    }
    d->commands[d->n_commands++] = CV_SEND0(&d->objc, id, commands, retain);
    d->open = true;
    d->work = 0;
    cv_metal_open_encoder(d);
}

/* Memory is made resident before the first command that uses it. */
void cv_metal_commit(cv_metal_device *d) {
    cv_metal_make_resident(d);
    cv_metal_end_encoder(d);
    CV_SEND0(&d->objc, void, d->commands[d->n_commands - 1], commit);
    d->open = false;
}

int cv_metal_begin(cv_metal_device *d) {
    d->code = CV_OK;
    d->text[0] = 0;
    d->n_commands = 0;
    d->open = false;
    cv_metal_begin_hand_overs(d);
    d->pool = d->objc.pool_push();
    cv_metal_open_commands(d);
    return d->code;
}

void cv_metal_bind(cv_metal_device *d, unsigned index, const void *p, size_t bytes) {
    if (d->code) return;
    const cv_metal_region *r = cv_metal_find_region(d, (uintptr_t)p, bytes);
    if (!r) {
        char text[CV_METAL_TEXT / 2] = "";
        int code = cv_metal_share(d, p, bytes, (cv_err){text, sizeof text});
        r = code ? NULL : cv_metal_find_region(d, (uintptr_t)p, bytes);
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
    if (d->work < MOST_WORK || d->n_commands == CV_METAL_OPEN_COMMANDS) return;
    cv_metal_commit(d);
    cv_metal_open_commands(d);
}

void cv_metal_wait_for_commands(cv_metal_device *d, size_t committed) {
    enum { STATUS_COMPLETED = 4 };
    if (committed) CV_SEND0(&d->objc, void, d->commands[committed - 1], wait); /* a queue runs them in order */
    for (size_t i = 0; i < committed; i++)
        if (CV_SEND0(&d->objc, NSUInteger, d->commands[i], status) != STATUS_COMPLETED) cv_metal_fail(d, CV_E_STEP, "the GPU stopped", CV_SEND0(&d->objc, id, d->commands[i], error));
    for (size_t i = 0; i < d->n_commands; i++) cv_metal_release(d, d->commands[i]);
    d->n_commands = 0;
}

void cv_metal_complete(cv_metal_device *d) {
    size_t committed = d->n_commands;
    if (d->code) { /* what has been recorded last is dropped */
        if (d->open) committed--;
        cv_metal_end_encoder(d);
        d->open = false;
    } else {
        cv_metal_commit(d);
    }
    cv_metal_serve(d);
    cv_metal_wait_for_commands(d, committed);
    cv_metal_end_hand_overs(d);
}

int cv_metal_finish(cv_metal_device *d, size_t *joined, cv_err err) {
    if (!d->pool) return cv_fail(err, CV_E_STEP, "no step was begun");
    cv_metal_complete(d);
    if (!d->code) cv_metal_archive_step(d);
    d->objc.pool_pop(d->pool);
    d->pool = NULL;
    *joined = d->hand_overs.joined;
    if (d->hand_overs.calm && !d->hand_overs.late) d->hand_overs.calm--;
    if (d->code) return cv_fail(err, d->code, "%s", d->text);
    if (d->hand_overs.late && !*joined) return cv_fail(err, CV_E_STEP, "the GPU did not wait for the host");
    return d->hand_overs.late ? CV_E_AGAIN : CV_OK;
}
