/* candidates.h — tokens that may be drawn, their weights, the filters on them, and the draw. Used on a whole vocabulary (sampler.c)
 * and on what the ranks that share one propose (split_sampler.c). */
#ifndef CV_CANDIDATES_H
#define CV_CANDIDATES_H

#include <stdbool.h>
#include <stddef.h>

#include "../include/caravan.h"

/* weight: probability relative to the most probable token's. */
typedef struct {
    float *weight;
    uint32_t *id;
    size_t n;
} cv_candidates;

/* What is below e^-80 of the most probable token can never be drawn. */
#define CV_LEAST_EXPONENT (-80.0f)

/* The random stream of the token at a position of a sequence. */
uint64_t cv_random_stream(const cv_step_row *r, uint64_t position);

/* Applies bias, mask (NULL: none) and penalties to x [n], the logits of tokens first … first+n-1. step: base of the row's offsets. */
void cv_adjust_logits(const uint8_t *step, const cv_step_row *r, const uint32_t *mask, size_t first, size_t n, float *x);

/* Keeps the k largest of x in top, with their logits, largest first, lower index first among equals; -inf is left out. Tokens are
 * numbered from `first`. Returns how many there are. */
uint32_t cv_largest_logits(const float *x, size_t n, size_t first, uint32_t k, cv_result_top *top);

/* Keeps the most probable `keep`, or as many as it takes to reach `mass`, in no order. The work grows with what is kept. */
void cv_keep_best(cv_candidates *c, size_t keep, double mass);
/* Removes all below a weight (the most probable has weight 1 and always stays). The order remains. */
void cv_drop_below(cv_candidates *c, float least);
double cv_total_weight(const cv_candidates *c);

/* Whether XTC strikes here; and its exclusion: all tokens above the threshold but the least probable of them go. total: of the weights. */
bool cv_xtc_strikes(const cv_step_row *r, uint64_t stream);
void cv_exclude_top_choices(cv_candidates *c, const uint8_t *step, const cv_step_row *r, double total);

/* Gumbel-max over at least one candidate. */
uint32_t cv_draw(const cv_candidates *c, uint64_t stream);

#endif
