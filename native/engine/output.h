/* output.h — what comes out of a step behind the head: samples, alternatives, logits, laid out as cv_result. On the last stage; where
 * the vocabulary is split over its ranks all of them take part, and all come to the same tokens. */
#ifndef CV_OUTPUT_H
#define CV_OUTPUT_H

#include "graph.h"
#include "sampler.h"
#include "step.h"

typedef struct {
    cv_sampler_scratch sampler;
    /* Split vocabulary only. */
    uint64_t *slices;              /* [tensor_size][2] first row and rows of every rank's head; known after the first exchange */
    size_t widest;                 /* rows of the largest slice */
    uint8_t *mine, *all;           /* proposals: [room], [tensor_size][room] */
    size_t room;
    float *slice, *gathered, *row; /* [widest], [tensor_size][widest], [vocab] */
} cv_output;

int cv_output_open(const cv_model *m, cv_output *o);
void cv_output_close(cv_output *o);

/* An empty result for a step, malloc'ed; CV_E_MEMORY. */
int cv_output_reserve(const cv_model *m, const cv_parsed_step *s, uint64_t ticket, void **result, size_t *size);

/* Fills it. Rows that fail have a status; the return value is an error of the group. */
int cv_output_fill(cv_output *o, const cv_model *m, cv_place *place, const cv_parsed_step *s, const float *logits, void *result, cv_err err);

#endif
