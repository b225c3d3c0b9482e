/* place.h — this rank's place in its group, and everything that it exchanges with the other ranks while a step is computed: sums
 * and gathers inside a stage, hidden states from stage to stage, step descriptors out and results back. */
#ifndef CV_PLACE_H
#define CV_PLACE_H

#include <stdatomic.h>
#include <stdbool.h>

#include "../transport/transport.h"
#include "error.h"

typedef struct {
    cv_group *group; /* borrowed; NULL: one rank, and nothing below is called */
    uint32_t rank, tensor_rank, tensor_size, stage, n_stages;
    cv_members tensor;             /* the ranks of this stage */
    uint64_t model;                /* fingerprint of what all ranks' plans must have in common */
    bool check;                    /* CV_MODEL_CHECK_RANKS */
    uint32_t timeout_ms;           /* for every wait of the running step */
    _Atomic uint64_t exchange_ns;  /* spent here so far; of the compute thread */
    _Atomic uint64_t checks;       /* hidden states compared */
} cv_place;

/* The place that a plan names, checked against the group: CV_E_PLAN when they contradict each other. */
int cv_place_open(const cv_plan *plan, cv_group *group, cv_place *p, cv_err err);

/* Whether another rank computes with this one, and whether this stage is the first or the last. */
static inline bool cv_place_splits(const cv_place *p) { return p->tensor_size > 1; }
static inline bool cv_place_first(const cv_place *p) { return p->stage == 0; }
static inline bool cv_place_last(const cv_place *p) { return p->stage + 1 == p->n_stages; }

/* x = Σ over the stage's ranks, the same bits on all of them. */
int cv_place_reduce(cv_place *p, float *x, size_t n);
/* out [tensor_size][bytes] */
int cv_place_gather(cv_place *p, const void *mine, size_t bytes, void *out);
/* Compares a checksum of x over the stage's ranks. CV_E_GROUP when it differs. */
int cv_place_compare(cv_place *p, const float *x, size_t n, cv_err err);

/* Hidden states, from this tensor rank to its like in the next stage, and from the one before. */
int cv_place_hand_over(cv_place *p, const float *h, size_t n);
int cv_place_take_over(cv_place *p, float *h, size_t n);

/* What rank 0 sends to every other rank ahead of a step: this header, the descriptor's bytes, then the last token of every row
 * (uint32[n_rows], CV_TOKEN_LAST: none). */
enum { CV_WORD_STEP = 1, CV_WORD_END = 2, CV_WORD_MASKS = 3 /* step_size bytes of masks (late_masks.h), n_rows 0 */ };
typedef struct {
    uint32_t magic, kind;   /* CV_WORD_* */
    uint64_t ticket;
    uint64_t model;         /* fingerprint of rank 0's plan */
    uint64_t step_size;     /* bytes, a multiple of 8 */
    uint32_t n_rows, timeout_ms;
    uint64_t reserved[3];
} cv_word; /* 64 bytes */

/* To the other ranks of a stage. bytes: header and all that follows. */
int cv_place_send_word(cv_place *p, uint32_t stage, cv_word *word, size_t bytes);
/* *word is malloc'ed, to be freed; blocks until rank 0 sends. Its sizes are checked. */
int cv_place_receive_word(cv_place *p, cv_word **word, cv_err err);

/* A result, from tensor rank 0 of the last stage to rank 0. receive: *result is malloc'ed, to be freed. */
int cv_place_send_result(cv_place *p, uint64_t ticket, const void *result, size_t bytes);
int cv_place_receive_result(cv_place *p, uint64_t *ticket, void **result, size_t *bytes, uint32_t timeout_ms, cv_err err);

/* Fails with what the group says of its end. */
int cv_place_failed(const cv_place *p, int code, cv_err err);

#endif
