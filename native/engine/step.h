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
    const cv_step *head;
    const cv_step_row *rows;
    const cv_step_copy *copies;
} cv_parsed_step;

int cv_step_open(const cv_model *m, cv_parsed_step *s);
void cv_step_close(cv_parsed_step *s);

/* Checks the descriptor at `bytes` (kept alive by the caller while *s is in use). `last` [n_rows]: the last sampled token of each
 * row's slot, for CV_TOKEN_LAST (itself CV_TOKEN_LAST: there is none); NULL: only check, such tokens are left as they are. */
int cv_step_parse(const cv_model *m, const void *bytes, size_t size, const uint32_t *last, cv_parsed_step *s, cv_err err);

#endif
