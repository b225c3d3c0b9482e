/* split_sampler.h — chooses a token from logits whose vocabulary is split over ranks, without gathering them in the common cases.
 *
 * Every rank makes a proposal from its slice: its largest logit, the sum and the mass of its probabilities, its most probable tokens
 * (cv_split_listed of them), and of the rest the one that wins the draw. Proposals of all ranks are exchanged, and each rank merges
 * them. The merge is exact: it gives what cv_sample would give for the whole vocabulary (but for the order of floating-point sums in
 * the total probability), or it says that the lists do not prove the choice, and the whole row must be gathered.
 *
 * Whether they do is decided with arithmetic that has the same bits on every machine, so ranks never disagree about it.
 */
#ifndef CV_SPLIT_SAMPLER_H
#define CV_SPLIT_SAMPLER_H

#include "sampler.h"

/* One rank's proposal for one draw; cv_result_top[cv_split_listed] with plain logits follow, the most probable first. */
typedef struct {
    double sum;          /* Σ exp(x - top), for log-probabilities; 0 when none are asked for */
    double mass;         /* Σ exp((x - top) / temperature), where a filter needs it; else 0 */
    float top;           /* the largest adjusted logit; -inf: no token of the slice may be chosen */
    uint32_t broken;     /* there are logits that are not numbers */
    uint32_t n_listed;
    uint32_t more;       /* tokens that may be chosen and are not listed exist */
    uint32_t rest_token; /* of those the winner of the draw, where all of them take part in it; CV_TOKEN_LAST: none */
    float rest_logit;
} cv_proposal; /* 40 bytes */

/* Tokens a proposal lists for a row, and a proposal's bytes: the same on all ranks. */
uint32_t cv_split_listed(const cv_step_row *row);
size_t cv_split_bytes(const cv_step_row *row);

/* This rank's proposal from its slice: logits [n] of tokens first … first+n-1 (n may be 0), not changed. `step`, mask, position: as cv_sample. */
void cv_split_propose(const void *step, const cv_step_row *row, const uint32_t *mask, const float *logits, size_t first, size_t n, uint64_t position, cv_sampler_scratch *s, cv_proposal *out);

/* Merges the proposals of n_ranks ranks, in the order of their slices; proposals[i] are cv_split_bytes long. Returns a CV_ROW_* like cv_sample, or
 * CV_SPLIT_GATHER: cv_sample is to be called with the whole row. */
enum { CV_SPLIT_GATHER = 0x100 };
uint32_t cv_split_merge(const void *step, const cv_step_row *row, const cv_proposal *const *proposals, uint32_t n_ranks, uint64_t position, cv_sampler_scratch *s, cv_result_row *out, cv_result_top *top);

#endif
