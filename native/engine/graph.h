/* graph.h — one forward pass over a batch, written once against backend.h. */
#ifndef CV_GRAPH_H
#define CV_GRAPH_H

#include <stdatomic.h>

#include "model.h"
#include "place.h"

/* Activations of a step: device memory of the backend, sized for max_tokens at load. */
typedef struct {
    void *h, *q, *k, *v, *attended;
    float *logits; /* [max_logits, vocab_rows] */
    size_t bytes;
} cv_activations;

int cv_graph_open(const cv_model *m, cv_backend *b, cv_activations *a, cv_err err);
void cv_graph_close(cv_backend *b, cv_activations *a);

/* Computes the batch (this stage's layers of it: behind the first stage a->h holds what the stage before left) and leaves hidden
 * states in a->h, on the last stage also logits of rows[0 … n_rows) in a->logits: this rank's part of the vocabulary. stop: checked
 * between layers (CV_E_ABORTED). kernel_ns grows by the time spent in operations and in the sums over ranks between them. */
int cv_graph_run(const cv_model *m, cv_backend *b, cv_activations *a, cv_place *place, const cv_batch *batch, const uint32_t *rows, size_t n_rows, const atomic_bool *stop, uint64_t *kernel_ns, cv_err err);

#endif
