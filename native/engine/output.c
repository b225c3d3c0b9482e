/* output.c — see output.h. */
#include "output.h"

#include <stdlib.h>
#include <string.h>

#include "split_sampler.h"

int cv_output_open(const cv_model *m, cv_output *o) {
    *o = (cv_output){0};
    return cv_sampler_open(m->shape.vocab, &o->sampler);
}

void cv_output_close(cv_output *o) {
    cv_sampler_close(&o->sampler);
    free(o->slices);
    free(o->mine);
    free(o->all);
    free(o->slice);
    free(o->gathered);
    free(o->row);
    *o = (cv_output){0};
}

/* Entries of a row's table of alternatives, or of samples. */
static size_t top_entries(const cv_step_row *r) { return r->flags & CV_ROW_SAMPLE_ALL ? r->n_tokens : r->n_top_logprobs; }

/* Rows, then alternatives, then logits. */
int cv_output_reserve(const cv_model *m, const cv_parsed_step *s, uint64_t ticket, void **result, size_t *size) {
    size_t n = s->head->n_rows, at = sizeof(cv_result) + n * sizeof(cv_result_row), vocab = m->shape.vocab;
    for (size_t i = 0; i < n; i++) at += top_entries(&s->rows[i]) * sizeof(cv_result_top);
    for (size_t i = 0; i < n; i++)
        if (s->rows[i].flags & CV_ROW_RETURN_LOGITS) at += (s->first_logit[i + 1] - s->first_logit[i]) * vocab * sizeof(float);
    uint8_t *base = calloc(1, at);
    if (!base) return CV_E_MEMORY;
    *(cv_result *)(void *)base = (cv_result){.ticket = ticket, .total_size = at, .n_rows = (uint32_t)n, .rows_offset = sizeof(cv_result)};
    cv_result_row *rows = (cv_result_row *)(void *)(base + sizeof(cv_result));
    size_t next = sizeof(cv_result) + n * sizeof(cv_result_row);
    for (size_t i = 0; i < n; i++) {
        rows[i] = (cv_result_row){.token = CV_TOKEN_LAST, .top_offset = next, .status = s->no_token[i] ? CV_ROW_NO_TOKEN : CV_ROW_OK};
        next += top_entries(&s->rows[i]) * sizeof(cv_result_top);
    }
    for (size_t i = 0; i < n; i++) {
        if (!(s->rows[i].flags & CV_ROW_RETURN_LOGITS)) continue;
        rows[i].n_logits = (uint32_t)(s->first_logit[i + 1] - s->first_logit[i]);
        rows[i].logits_offset = next;
        next += rows[i].n_logits * vocab * sizeof(float);
    }
    *result = base;
    *size = at;
    return CV_OK;
}

/* One draw: the row, the token it comes behind, the position of the token to come, its logits' row. */
typedef struct {
    size_t row;
    uint32_t token;
    uint64_t position;
    size_t logit;
} draw;

/* The draws of a row, one after another: false when there are no more. */
static bool next_draw(const cv_parsed_step *s, draw *d, bool start) {
    if (!start && d->token + 1 < s->rows[d->row].n_tokens) {
        d->token++;
    } else {
        for (d->row = start ? 0 : d->row + 1; d->row < s->head->n_rows && !(s->rows[d->row].flags & CV_ROW_SAMPLE); d->row++) continue;
        if (d->row == s->head->n_rows) return false;
        d->token = s->rows[d->row].flags & CV_ROW_SAMPLE_ALL ? 0 : s->rows[d->row].n_tokens - 1;
    }
    const cv_step_row *r = &s->rows[d->row];
    d->position = r->first_position + d->token + 1;
    d->logit = s->first_logit[d->row + 1] - (r->n_tokens - d->token);
    return true;
}

/* Puts the outcome of a draw, which is in row->token and row->logprob unless status says otherwise, where it belongs. */
static void settle(const cv_parsed_step *s, const draw *d, uint32_t status, cv_result_row *row, cv_result_top *top) {
    const cv_step_row *r = &s->rows[d->row];
    if (status && !row->status) row->status = status;
    if (r->flags & CV_ROW_SAMPLE_ALL) {
        top[d->token] = (cv_result_top){row->token, row->logprob};
        row->n_top = r->n_tokens;
    }
    if (row->status && d->token + 1 == r->n_tokens) {
        row->token = CV_TOKEN_LAST;
        row->logprob = 0;
        row->n_top = 0;
    }
}

static void fill_alone(cv_output *o, const cv_model *m, const cv_parsed_step *s, const float *logits, uint8_t *base) {
    cv_result_row *rows = (cv_result_row *)(void *)(base + sizeof(cv_result));
    size_t vocab = m->shape.vocab;
    draw d = {0};
    for (bool more = next_draw(s, &d, true); more; more = next_draw(s, &d, false)) {
        cv_result_top *top = (cv_result_top *)(void *)(base + rows[d.row].top_offset);
        settle(s, &d, cv_sample(s->head, &s->rows[d.row], cv_step_mask(s, d.row, d.token), logits + d.logit * vocab, vocab, d.position, &o->sampler, &rows[d.row], top), &rows[d.row], top);
    }
    for (size_t i = 0; i < s->head->n_rows; i++)
        if (rows[i].n_logits) memcpy(base + rows[i].logits_offset, logits + s->first_logit[i] * vocab, rows[i].n_logits * vocab * sizeof(float));
}

/* Learns how the vocabulary is split, and checks it. */
static int exchange_slices(cv_output *o, const cv_model *m, cv_place *p, cv_err err) {
    uint64_t mine[2] = {m->vocab_first, m->shape.vocab_rows}, *slices = calloc(p->tensor_size, sizeof mine);
    if (!slices) return cv_fail(err, CV_E_MEMORY, "no memory");
    int code = cv_place_gather(p, mine, sizeof mine, slices);
    if (code) {
        free(slices);
        return cv_place_failed(p, code, err);
    }
    uint64_t next = 0;
    for (uint32_t i = 0; !code && i < p->tensor_size; i++) {
        if (slices[2 * i + 1] && slices[2 * i] != next) code = cv_fail(err, CV_E_GROUP, "rank %u's rows of the head start at %llu, not at %llu", p->tensor.first + i, (unsigned long long)slices[2 * i], (unsigned long long)next);
        next += slices[2 * i + 1];
        if (slices[2 * i + 1] > o->widest) o->widest = (size_t)slices[2 * i + 1];
    }
    if (!code && next != m->shape.vocab) code = cv_fail(err, CV_E_GROUP, "the ranks' heads have %llu rows together, the vocabulary %zu", (unsigned long long)next, m->shape.vocab);
    if (!code) {
        o->slice = calloc(o->widest, sizeof(float));
        o->gathered = calloc(p->tensor_size * o->widest, sizeof(float));
        o->row = calloc(m->shape.vocab, sizeof(float));
        if (!o->slice || !o->gathered || !o->row) code = cv_fail(err, CV_E_MEMORY, "no memory for a row of logits");
    }
    if (code) {
        free(slices);
        return code;
    }
    o->slices = slices;
    return CV_OK;
}

/* The whole row `logit` of logits, in o->row on every rank. */
static int gather_row(cv_output *o, const cv_model *m, cv_place *p, const float *logits, size_t logit, cv_err err) {
    size_t rows = m->shape.vocab_rows;
    if (rows) memcpy(o->slice, logits + logit * rows, rows * sizeof(float));
    int code = cv_place_gather(p, o->slice, o->widest * sizeof(float), o->gathered);
    if (code) return cv_place_failed(p, code, err);
    for (uint32_t i = 0; i < p->tensor_size; i++)
        if (o->slices[2 * i + 1]) memcpy(o->row + o->slices[2 * i], o->gathered + i * o->widest, (size_t)o->slices[2 * i + 1] * sizeof(float));
    return CV_OK;
}

static int grow(cv_output *o, size_t room, uint32_t ranks) {
    if (room <= o->room) return CV_OK;
    free(o->mine);
    free(o->all);
    o->room = 0;
    o->mine = malloc(room);
    o->all = malloc(room * ranks);
    if (!o->mine || !o->all) return CV_E_MEMORY;
    o->room = room;
    return CV_OK;
}

/* What other ranks sent is used as sizes and indices: it must be possible. */
static bool possible(const cv_model *m, const cv_step_row *r, const cv_proposal *const *proposals, uint32_t n_ranks) {
    size_t listed = 0;
    for (uint32_t i = 0; i < n_ranks; i++) {
        const cv_result_top *list = (const cv_result_top *)(const void *)(proposals[i] + 1);
        if (proposals[i]->n_listed > cv_split_listed(r)) return false;
        for (uint32_t k = 0; k < proposals[i]->n_listed; k++)
            if (list[k].token >= m->shape.vocab) return false;
        listed += proposals[i]->n_listed + (proposals[i]->rest_token != CV_TOKEN_LAST);
    }
    return listed <= m->shape.vocab;
}

static int fill_split(cv_output *o, const cv_model *m, cv_place *p, const cv_parsed_step *s, const float *logits, uint8_t *base, cv_err err) {
    cv_result_row *rows = (cv_result_row *)(void *)(base + sizeof(cv_result));
    size_t width = m->shape.vocab_rows, vocab = m->shape.vocab, bytes = 0, at = 0;
    uint32_t n = p->tensor_size;
    draw d = {0};
    int code = CV_OK;
    for (bool more = next_draw(s, &d, true); more; more = next_draw(s, &d, false)) bytes += cv_split_bytes(&s->rows[d.row]);
    if (grow(o, bytes, n)) return cv_fail(err, CV_E_MEMORY, "no memory for %zu bytes of proposals", bytes);
    for (bool more = next_draw(s, &d, true); more; more = next_draw(s, &d, false)) {
        const cv_step_row *r = &s->rows[d.row];
        cv_split_propose(s->head, r, cv_step_mask(s, d.row, d.token), logits + d.logit * width, m->vocab_first, width, d.position, &o->sampler, (cv_proposal *)(void *)(o->mine + at));
        at += cv_split_bytes(r);
    }
    if (bytes && (code = cv_place_gather(p, o->mine, bytes, o->all))) return cv_place_failed(p, code, err);
    at = 0;
    for (bool more = next_draw(s, &d, true); more; more = next_draw(s, &d, false)) {
        const cv_step_row *r = &s->rows[d.row];
        const cv_proposal *proposals[64];
        for (uint32_t i = 0; i < n; i++) proposals[i] = (const cv_proposal *)(const void *)(o->all + i * bytes + at);
        at += cv_split_bytes(r);
        if (!possible(m, r, proposals, n)) return cv_fail(err, CV_E_GROUP, "a rank sent proposals of tokens that are not possible");
        cv_result_top *top = (cv_result_top *)(void *)(base + rows[d.row].top_offset);
        uint32_t status = cv_split_merge(s->head, r, proposals, n, d.position, &o->sampler, &rows[d.row], top);
        if (status == CV_SPLIT_GATHER) {
            if ((code = gather_row(o, m, p, logits, d.logit, err))) return code;
            status = cv_sample(s->head, r, cv_step_mask(s, d.row, d.token), o->row, vocab, d.position, &o->sampler, &rows[d.row], top);
        }
        settle(s, &d, status, &rows[d.row], top);
    }
    for (size_t i = 0; i < s->head->n_rows; i++)
        for (size_t k = 0; k < rows[i].n_logits; k++) {
            if ((code = gather_row(o, m, p, logits, s->first_logit[i] + k, err))) return code;
            memcpy(base + rows[i].logits_offset + k * vocab * sizeof(float), o->row, vocab * sizeof(float));
        }
    return CV_OK;
}

int cv_output_fill(cv_output *o, const cv_model *m, cv_place *place, const cv_parsed_step *s, const float *logits, void *result, cv_err err) {
    if (!cv_place_splits(place)) {
        fill_alone(o, m, s, logits, result);
        return CV_OK;
    }
    int code = o->slices ? CV_OK : exchange_slices(o, m, place, err);
    return code ? code : fill_split(o, m, place, s, logits, result, err);
}
