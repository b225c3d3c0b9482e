/* step.c — see step.h. */
#include "step.h"

#include <math.h>
#include <stdlib.h>

int cv_step_open(const cv_model *m, cv_parsed_step *s) {
    *s = (cv_parsed_step){0};
    s->seqs = calloc(m->max_rows, sizeof *s->seqs);
    s->tokens = calloc(m->shape.max_tokens, sizeof *s->tokens);
    s->positions = calloc(m->shape.max_tokens, sizeof *s->positions);
    s->token_seq = calloc(m->shape.max_tokens, sizeof *s->token_seq);
    s->logit_rows = calloc(m->shape.max_logits, sizeof *s->logit_rows);
    s->first_logit = calloc(m->max_rows + 1, sizeof *s->first_logit);
    s->no_token = calloc(m->max_rows, sizeof *s->no_token);
    s->first_late = calloc(m->max_rows, sizeof *s->first_late);
    return s->first_late && s->no_token && s->seqs && s->tokens && s->positions && s->token_seq && s->logit_rows && s->first_logit ? CV_OK : CV_E_MEMORY;
}

void cv_step_close(cv_parsed_step *s) {
    free(s->seqs);
    free(s->tokens);
    free(s->positions);
    free(s->token_seq);
    free(s->logit_rows);
    free(s->first_logit);
    free(s->no_token);
    free(s->first_late);
    *s = (cv_parsed_step){0};
}

/* `count` records of `size` bytes at offset; an empty table may be anywhere. */
static bool inside(uint64_t total, uint64_t offset, uint64_t count, uint64_t size, uint64_t align) {
    return !count || (offset % align == 0 && offset <= total && count <= (total - offset) / size);
}

/* As an integer sum: the offset of an empty table is not checked and may be anything. */
static const void *at(const void *base, uint64_t offset) { return (const void *)((uintptr_t)base + (uintptr_t)offset); }

static int check_sampling(const cv_model *m, const void *base, uint64_t total, const cv_step_row *r, size_t row, cv_err err) {
    const float all[] = {r->temperature, r->top_p, r->min_p, r->xtc_probability, r->xtc_threshold, r->repetition_penalty, r->presence_penalty, r->frequency_penalty};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (!isfinite(all[i])) return cv_fail(err, CV_E_ARGUMENT, "row %zu: a sampling option is not a number", row);
    if (r->temperature < 0 || r->repetition_penalty <= 0 || r->n_top_logprobs > 64) return cv_fail(err, CV_E_ARGUMENT, "row %zu: sampling options out of range", row);
    if (!inside(total, r->bias_offset, r->n_bias, sizeof(cv_step_bias), 4) || !inside(total, r->history_offset, r->n_history, sizeof(cv_step_history), 4) ||
        !inside(total, r->mask_offset, r->mask_offset ? cv_row_masks(r) * cv_mask_words(m->shape.vocab) : 0, 4, 4) || !inside(total, r->xtc_keep_offset, r->n_xtc_keep, 4, 4))
        return cv_fail(err, CV_E_ARGUMENT, "row %zu: a sampling table is cut off", row);
    const cv_step_bias *bias = at(base, r->bias_offset);
    for (size_t i = 0; i < r->n_bias; i++)
        if (bias[i].token >= m->shape.vocab || isnan(bias[i].bias)) return cv_fail(err, CV_E_ARGUMENT, "row %zu: logit bias for token %u", row, bias[i].token);
    const cv_step_history *history = at(base, r->history_offset);
    for (size_t i = 0; i < r->n_history; i++)
        if (history[i].token >= m->shape.vocab) return cv_fail(err, CV_E_ARGUMENT, "row %zu: penalty for token %u", row, history[i].token);
    const uint32_t *keep = at(base, r->xtc_keep_offset);
    for (size_t i = 0; i < r->n_xtc_keep; i++)
        if (keep[i] >= m->shape.vocab) return cv_fail(err, CV_E_ARGUMENT, "row %zu: token %u is not in the vocabulary", row, keep[i]);
    return CV_OK;
}

static int check_pages(const cv_model *m, const void *base, uint64_t total, const cv_step_row *r, size_t row, cv_err err) {
    uint64_t p = m->shape.page_tokens, last = r->first_position + r->n_tokens - 1;
    if (r->first_position > (uint64_t)1 << 40) return cv_fail(err, CV_E_ARGUMENT, "row %zu: position %llu", row, (unsigned long long)r->first_position);
    if (!inside(total, r->full_pages_offset, r->n_full_pages, 4, 4) || !inside(total, r->chunk_pages_offset, r->n_chunk_pages, 4, 4)) return cv_fail(err, CV_E_ARGUMENT, "row %zu: a page table is cut off", row);
    if (m->has_full && last / p >= r->n_full_pages) return cv_fail(err, CV_E_ARGUMENT, "row %zu: %u full pages do not reach position %llu", row, r->n_full_pages, (unsigned long long)last);
    if (m->has_chunked) {
        uint64_t start = r->first_position / m->shape.chunk * m->shape.chunk;
        if (r->chunk_base % p || r->chunk_base > start || (last - r->chunk_base) / p >= r->n_chunk_pages)
            return cv_fail(err, CV_E_ARGUMENT, "row %zu: the chunk table (from %llu, %u pages) does not cover positions %llu to %llu", row, (unsigned long long)r->chunk_base, r->n_chunk_pages, (unsigned long long)start, (unsigned long long)last);
    }
    const uint32_t *full = at(base, r->full_pages_offset), *chunk = at(base, r->chunk_pages_offset);
    for (size_t i = 0; m->has_full && i < r->n_full_pages; i++)
        if (full[i] >= m->pools[0].n_pages) return cv_fail(err, CV_E_ARGUMENT, "row %zu: full page %u of %zu", row, full[i], m->pools[0].n_pages);
    for (size_t i = 0; m->has_chunked && i < r->n_chunk_pages; i++)
        if (chunk[i] >= m->pools[1].n_pages) return cv_fail(err, CV_E_ARGUMENT, "row %zu: chunked page %u of %zu", row, chunk[i], m->pools[1].n_pages);
    return CV_OK;
}

const uint32_t *cv_step_mask(const cv_parsed_step *s, size_t row, uint32_t token) {
    const cv_step_row *r = &s->rows[row];
    size_t index = r->flags & CV_ROW_SAMPLE_ALL ? token : 0;
    if (r->flags & CV_ROW_MASK_LATER) return s->late + (s->first_late[row] + index) * s->mask_words;
    return r->mask_offset ? (const uint32_t *)at(s->head, r->mask_offset) + index * s->mask_words : NULL;
}

static int parse_row(const cv_model *m, const void *base, uint64_t total, const uint32_t *last, size_t row, cv_parsed_step *s, cv_err err) {
    const cv_step_row *r = &s->rows[row];
    size_t first = s->batch.n_tokens;
    if (!r->n_tokens || r->n_tokens > m->shape.max_tokens - first) return cv_fail(err, CV_E_ARGUMENT, "row %zu: %u tokens, a step takes 1 to %zu in all", row, r->n_tokens, m->shape.max_tokens);
    if (r->slot >= m->n_slots) return cv_fail(err, CV_E_ARGUMENT, "row %zu: slot %u of %zu", row, r->slot, m->n_slots);
    if (!inside(total, r->tokens_offset, r->n_tokens, 4, 4)) return cv_fail(err, CV_E_ARGUMENT, "row %zu: its tokens are cut off", row);
    if (r->logits > CV_LOGITS_ALL || (r->logits == CV_LOGITS_NONE && r->flags)) return cv_fail(err, CV_E_ARGUMENT, "row %zu: asks for a sample without logits", row);
    if ((r->flags & CV_ROW_SAMPLE_ALL) && (!(r->flags & CV_ROW_SAMPLE) || r->logits != CV_LOGITS_ALL || r->n_top_logprobs || r->n_history))
        return cv_fail(err, CV_E_ARGUMENT, "row %zu: samples of all positions take logits of all, and no alternatives or penalties", row);
    if ((r->flags & CV_ROW_MASK_LATER) && (!(r->flags & CV_ROW_SAMPLE) || r->mask_offset)) return cv_fail(err, CV_E_ARGUMENT, "row %zu: masks that come later take a sample, and no other mask", row);
    int code = check_pages(m, base, total, r, row, err);
    if (!code) code = check_sampling(m, base, total, r, row, err);
    if (code) return code;
    const uint32_t *tokens = at(base, r->tokens_offset);
    s->no_token[row] = false;
    for (size_t i = 0; i < r->n_tokens; i++) {
        uint32_t token = tokens[i];
        if (token == CV_TOKEN_LAST && last) {
            token = last[row];
            if (token == CV_TOKEN_LAST) {
                s->no_token[row] = true;
                token = 0;
            }
        }
        if (token >= m->shape.vocab && !(token == CV_TOKEN_LAST && !last)) return cv_fail(err, CV_E_ARGUMENT, "row %zu: token %u is not in the vocabulary of %zu", row, token, m->shape.vocab);
        s->tokens[first + i] = token;
        s->positions[first + i] = r->first_position + i;
        s->token_seq[first + i] = (uint32_t)row;
    }
    size_t wanted = r->logits == CV_LOGITS_NONE ? 0 : r->logits == CV_LOGITS_LAST ? 1 : r->n_tokens;
    if (wanted > m->shape.max_logits - s->n_logits) return cv_fail(err, CV_E_ARGUMENT, "row %zu: logits for more than %zu positions", row, m->shape.max_logits);
    s->first_logit[row] = s->n_logits;
    for (size_t i = r->n_tokens - wanted; i < r->n_tokens; i++) s->logit_rows[s->n_logits++] = (uint32_t)(first + i);
    s->first_logit[row + 1] = s->n_logits;
    s->first_late[row] = s->n_late;
    if (r->flags & CV_ROW_MASK_LATER) s->n_late += cv_row_masks(r);
    s->seqs[row] = (cv_seq){.first_position = r->first_position, .n_tokens = r->n_tokens, .first_token = first, .full_pages = at(base, r->full_pages_offset), .chunk_pages = at(base, r->chunk_pages_offset),
                            .n_full_pages = r->n_full_pages, .n_chunk_pages = r->n_chunk_pages, .chunk_base = r->chunk_base};
    s->batch.n_tokens += r->n_tokens;
    return CV_OK;
}

int cv_step_parse(const cv_model *m, const void *bytes, size_t size, const uint32_t *last, cv_parsed_step *s, cv_err err) {
    const cv_step *h = bytes;
    if (!bytes || (uintptr_t)bytes % 8 || size % 8 || size < sizeof *h || h->magic != CV_STEP_MAGIC || h->version != CV_ABI_VERSION || h->total_size != size) return cv_fail(err, CV_E_ARGUMENT, "not a step descriptor");
    if (!h->n_rows || h->n_rows > m->max_rows) return cv_fail(err, CV_E_ARGUMENT, "%u rows, a step takes 1 to %zu", h->n_rows, m->max_rows);
    if (!inside(size, h->rows_offset, h->n_rows, sizeof(cv_step_row), 8) || !inside(size, h->copies_offset, h->n_copies, sizeof(cv_step_copy), 4)) return cv_fail(err, CV_E_ARGUMENT, "the step's tables are cut off");
    s->head = h;
    s->rows = at(bytes, h->rows_offset);
    s->copies = at(bytes, h->copies_offset);
    s->n_logits = s->n_late = 0;
    s->mask_words = cv_mask_words(m->shape.vocab);
    s->late = NULL;
    s->batch = (cv_batch){.n_seqs = h->n_rows, .seqs = s->seqs, .tokens = s->tokens, .positions = s->positions, .token_seq = s->token_seq};
    for (size_t i = 0; i < h->n_copies; i++) {
        const cv_step_copy *c = &s->copies[i];
        if (c->pool > 1 || c->from >= m->pools[c->pool].n_pages || c->to >= m->pools[c->pool].n_pages) return cv_fail(err, CV_E_ARGUMENT, "page copy %zu: pool %u, %u to %u", i, c->pool, c->from, c->to);
    }
    for (size_t row = 0; row < h->n_rows; row++) {
        int code = parse_row(m, bytes, size, last, row, s, err);
        if (code) return code;
    }
    return CV_OK;
}
