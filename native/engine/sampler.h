/* sampler.h — chooses a token from logits. Order: bias, mask, penalties, temperature, top_k, top_p, min_p, xtc, draw.
 *
 * The draw is a Gumbel-max: token i scores logit/T + g(seed, position, i) and the largest wins. The noise is a pure
 * function of those three numbers, so a sequence's tokens do not depend on what else is in the batch, and ranks that
 * each hold a part of the vocabulary can draw exactly without gathering logits.
 */
#ifndef CV_SAMPLER_H
#define CV_SAMPLER_H

#include <stddef.h>

#include "../include/caravan.h"

/* Scratch of one sampling row. */
typedef struct {
    float *logits;   /* [vocab] adjusted copy */
    uint32_t *ids;   /* [vocab] candidates */
    float *weights;  /* [vocab] probabilities of candidates, relative to the most probable */
} cv_sampler_scratch;

int cv_sampler_open(size_t vocab, cv_sampler_scratch *s);
void cv_sampler_close(cv_sampler_scratch *s);

/* logits [vocab], not changed. mask: bits of the tokens that may be drawn, NULL: all. `step` is the base of the row's offsets (checked by step.c). position: of the token that
 * is drawn. Writes token, logprob and n_top <= row->n_top_logprobs alternatives to top. Returns CV_ROW_OK, or why there is no
 * token (CV_ROW_NO_CHOICE, CV_ROW_NOT_A_NUMBER; *out is not changed then). */
uint32_t cv_sample(const void *step, const cv_step_row *row, const uint32_t *mask, const float *logits, size_t vocab, uint64_t position, cv_sampler_scratch *s, cv_result_row *out, cv_result_top *top);

#endif
