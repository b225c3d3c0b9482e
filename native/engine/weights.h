/* weights.h — tensors of a load plan in memory. What is whole, in order and aligned is mapped from its file and shared with
 * every other process that maps it; the rest is copied into memory of the right shape. */
#ifndef CV_WEIGHTS_H
#define CV_WEIGHTS_H

#include <stdatomic.h>

#include "../backend/backend.h"
#include "error.h"

typedef struct cv_weights cv_weights;

/* What a loading thread and its watcher share. */
typedef struct {
    _Atomic uint64_t bytes_done; /* of weights in place */
    atomic_bool stop;            /* loading should end with CV_E_ABORTED */
} cv_load_progress;

/* paths: the plan's files, already opened and checked here. The plan's records must lie inside `plan` (model.c checks). */
int cv_weights_open(const uint8_t *plan, const cv_plan *head, cv_load_progress *progress, cv_weights **out, cv_err err);
void cv_weights_close(cv_weights *w);

/* The tensor of a slot in a layer (-1: global), NULL when the plan has none. */
const cv_weight *cv_weights_matrix(const cv_weights *w, uint32_t slot, int32_t layer);
/* A vector as float32, NULL when the plan has none. */
const float *cv_weights_vector(const cv_weights *w, uint32_t slot, int32_t layer);

/* Where the tensors lie: as many extents as `room` allows, each a tensor's codes, scales, biases or a vector; returns how many there are. */
size_t cv_weights_extents(const cv_weights *w, cv_memory *out, size_t room);

uint64_t cv_weights_mapped_bytes(const cv_weights *w);
uint64_t cv_weights_copied_bytes(const cv_weights *w);

#endif
