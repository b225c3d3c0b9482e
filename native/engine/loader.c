/* loader.c — opens an engine in the caller's thread (cv_open) or in one of its own (cv_load_start, cv_load_poll). */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

int cv_open(const void *plan, size_t plan_size, cv_group *group, cv_engine **out, char *text, size_t text_size) {
    cv_load_progress progress = {0};
    return cv_engine_open(plan, plan_size, group, &progress, out, (cv_err){text, text_size});
}

struct cv_loader {
    cv_load_progress progress;
    pthread_t thread;
    void *plan;
    size_t plan_size;
    cv_group *group;
    cv_engine *engine;
    int code;
    char text[512];
    atomic_bool done; /* code, engine and text are final */
};

static void *load_main(void *arg) {
    cv_loader *l = arg;
    l->code = cv_engine_open(l->plan, l->plan_size, l->group, &l->progress, &l->engine, (cv_err){l->text, sizeof l->text});
    atomic_store(&l->done, true);
    return NULL;
}

int cv_load_start(const void *plan, size_t plan_size, cv_group *group, cv_loader **out, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!plan || !plan_size || !out) return cv_fail(err, CV_E_ARGUMENT, "no load plan");
    cv_loader *l = calloc(1, sizeof *l);
    if (!l || posix_memalign(&l->plan, 64, plan_size)) {
        free(l);
        return cv_fail(err, CV_E_MEMORY, "no memory for the load plan");
    }
    memcpy(l->plan, plan, plan_size);
    l->plan_size = plan_size;
    l->group = group;
    if (pthread_create(&l->thread, NULL, load_main, l)) {
        free(l->plan);
        free(l);
        return cv_fail(err, CV_E_MEMORY, "cannot start the loading thread");
    }
    *out = l;
    return CV_OK;
}

int cv_load_poll(cv_loader *l, uint64_t *bytes_done, cv_engine **out, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!l || !bytes_done || !out) return cv_fail(err, CV_E_ARGUMENT, "no loader");
    *bytes_done = atomic_load(&l->progress.bytes_done);
    if (!atomic_load(&l->done)) return CV_E_AGAIN;
    pthread_join(l->thread, NULL);
    int code = l->code;
    if (code) cv_fail(err, code, "%s", l->text);
    else *out = l->engine;
    free(l->plan);
    free(l);
    return code;
}

void cv_load_cancel(cv_loader *l) {
    if (l) atomic_store(&l->progress.stop, true);
}
