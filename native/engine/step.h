/* step.h — a step descriptor (cv_step) checked and turned into the batch that the graph computes. Nothing in a descriptor
 * is trusted: every offset, page, token and position is checked before it is used. */
#ifndef CV_STEP_H
#define CV_STEP_H

#include "model.h"

typedef struct {
    cv_batch batch;
    cv_seq *seqs;          /* [max_rows] */
    uint32_t *tokens;      /* [max_tokens] */
    uint64_t *positions;   /* [max_tokens] */
    uint32_t *token_seq;   /* [max_tokens] */
    uint32_t *logit_rows;  /* [max_logits] token rows whose logits are wanted, by sequence */
    size_t *first_logit;   /* [max_rows+1] */
    bool *no_token;        /* [max_rows] the row asks for its slot's last token, but there is none: computed with another, to no avail */
    size_t n_logits;
    size_t n_late;         /* masks that come later, of all rows */
    size_t *first_late;    /* [max_rows] index of the row's first one */
    size_t mask_words;     /* of one mask */
    const uint32_t *late;  /* [n_late][mask_words], set by whoever has them before samples are drawn */
    const cv_step *head;
    const cv_step_row *rows;
    const cv_step_copy *copies;
} cv_parsed_step;

static inline size_t cv_mask_words(size_t vocab) { return (vocab + 31) / 32; }
/* Masks of a row that has some. */
static inline size_t cv_row_masks(const cv_step_row *r) { return r->flags & CV_ROW_SAMPLE_ALL ? r->n_tokens : 1; }

/* What may be sampled behind token `token` of a row, [mask_words]; NULL: everything. */
const uint32_t *cv_step_mask(const cv_parsed_step *s, size_t row, uint32_t token);

int cv_step_open(const cv_model *m, cv_parsed_step *s);
void cv_step_close(cv_parsed_step *s);

/* Checks the descriptor at `bytes` (kept alive by the caller while *s is in use). `last` [n_rows]: the last sampled token of each
 * row's slot, for CV_TOKEN_LAST (itself CV_TOKEN_LAST: there is none); NULL: only check, such tokens are left as they are. */
int cv_step_parse(const cv_model *m, const void *bytes, size_t size, const uint32_t *last, cv_parsed_step *s, cv_err err);

#endif
