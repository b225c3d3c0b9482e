/* pass.h — one rank's part in computing steps: its model, its backend, its scratch, and the stages of a step in the order in which
 * they are called. Used by one thread at a time. */
#ifndef CV_PASS_H
#define CV_PASS_H

#include "graph.h"
#include "output.h"
#include "place.h"
#include "step.h"

typedef struct {
    cv_model *model;
    cv_backend *backend;
    cv_activations act;
    cv_parsed_step step; /* the running one */
    cv_output output;
    cv_place place;
    uint64_t kernel_ns; /* so far */
} cv_pass;

int cv_pass_open(const void *plan, size_t plan_size, cv_group *group, cv_load_progress *progress, cv_pass *p, cv_err err);
void cv_pass_close(cv_pass *p);

/* Checks and keeps a step; bytes stay valid while it runs. last [n_rows]: see cv_step_parse. */
int cv_pass_parse(cv_pass *p, const void *bytes, size_t size, const uint32_t *last, cv_err err);

/* Copies pages, takes hidden states over from the stage before, computes this stage's layers (and the head). */
int cv_pass_compute(cv_pass *p, const atomic_bool *stop, cv_err err);

/* Gives hidden states to the next stage. Not on the last. */
int cv_pass_hand_over(cv_pass *p, cv_err err);

/* Last stage: the result, malloc'ed. reserve before compute, so that a lack of memory concerns one rank only; fill behind it. */
int cv_pass_reserve(cv_pass *p, uint64_t ticket, void **result, size_t *size, cv_err err);
int cv_pass_fill(cv_pass *p, void *result, cv_err err);

#endif
