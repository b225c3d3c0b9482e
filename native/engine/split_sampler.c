/* split_sampler.c — see split_sampler.h. */
#include "split_sampler.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "../backend/cpu/scalar.h"
#include "candidates.h"

enum { LISTED_MOST = 256, LISTED_FILTERED = 128, RANKS_MOST = 64 };

static bool draws(const cv_step_row *r) { return r->temperature >= FLT_MIN; }
static bool truncates(const cv_step_row *r) { return r->top_k || r->top_p < 1 || r->min_p > 0; }

uint32_t cv_split_listed(const cv_step_row *r) {
    uint32_t n = r->n_top_logprobs > 1 ? r->n_top_logprobs : 1;
    if (!draws(r)) return n;
    if (r->top_k && r->top_k <= LISTED_MOST) return r->top_k > n ? r->top_k : n;
    bool filtered = truncates(r) || r->xtc_probability > 0;
    return filtered && n < LISTED_FILTERED ? LISTED_FILTERED : n;
}

size_t cv_split_bytes(const cv_step_row *r) { return sizeof(cv_proposal) + cv_split_listed(r) * sizeof(cv_result_top); }

/* The winner of the draw among tokens that are not listed. */
static void propose_rest(const cv_step_row *r, const float *x, size_t first, size_t n, uint64_t position, cv_sampler_scratch *s, cv_proposal *out) {
    const cv_result_top *last = (const cv_result_top *)(const void *)(out + 1) + out->n_listed - 1;
    cv_candidates c = {s->weights, s->ids, 0};
    float inverse = 1.0f / r->temperature;
    for (size_t i = 0; i < n; i++) {
        float d = (x[i] - out->top) * inverse;
        bool listed = x[i] > last->logprob || (x[i] == last->logprob && first + i <= last->token);
        if (!(d > CV_LEAST_EXPONENT) || listed) continue;
        c.id[c.n] = (uint32_t)(first + i);
        c.weight[c.n++] = expf(d);
    }
    if (!c.n) return;
    out->rest_token = cv_draw(&c, cv_random_stream(r, position));
    out->rest_logit = x[out->rest_token - first];
}

void cv_split_propose(const void *base, const cv_step_row *r, const uint32_t *mask, const float *logits, size_t first, size_t n, uint64_t position, cv_sampler_scratch *s, cv_proposal *out) {
    cv_result_top *list = (cv_result_top *)(void *)(out + 1);
    memset(out, 0, cv_split_bytes(r));
    out->top = -INFINITY;
    out->rest_token = CV_TOKEN_LAST;
    const float *x = logits;
    if (n && (r->n_bias || mask || r->n_history)) {
        memcpy(s->logits, logits, n * sizeof *x);
        cv_adjust_logits(base, r, mask, first, n, s->logits);
        x = s->logits;
    }
    size_t choices = 0;
    for (size_t i = 0; i < n; i++) {
        if (x[i] > out->top) out->top = x[i];
        out->broken |= x[i] != x[i];
        choices += x[i] > -INFINITY;
    }
    if (out->broken || !isfinite(out->top)) return;
    out->n_listed = cv_largest_logits(x, n, first, cv_split_listed(r), list);
    out->more = choices > out->n_listed;
    if (r->n_top_logprobs || (r->flags & CV_ROW_LOGPROB))
        for (size_t i = 0; i < n; i++) out->sum += (double)expf(x[i] - out->top);
    if (!draws(r)) return;
    if (r->top_p < 1 || r->xtc_probability > 0) {
        float inverse = 1.0f / r->temperature;
        for (size_t i = 0; i < n; i++) {
            float d = (x[i] - out->top) * inverse;
            if (d > CV_LEAST_EXPONENT) out->mass += (double)expf(d);
        }
    }
    if (!truncates(r) && out->more) propose_rest(r, x, first, n, position, s, out);
}

/* All ranks' lists as one, most probable first. */
typedef struct {
    float *logit;  /* [n] in scratch->logits */
    cv_candidates c; /* ids, and weights at the row's temperature */
    size_t n;
    size_t proven; /* of them, so many from the start are certainly the most probable of all */
    float top;
    bool all; /* nothing is unlisted */
} merged;

static bool ahead(const cv_result_top *a, const cv_result_top *b) { return a->logprob > b->logprob || (a->logprob == b->logprob && a->token < b->token); }

static const cv_result_top *list_of(const cv_proposal *p) { return (const cv_result_top *)(const void *)(p + 1); }

static void join_lists(const cv_proposal *const *proposals, uint32_t n_ranks, merged *m) {
    uint32_t at[RANKS_MOST] = {0};
    bool proven = true;
    m->all = true;
    for (uint32_t i = 0; i < n_ranks; i++) m->all = m->all && !proposals[i]->more;
    for (;;) {
        uint32_t from = n_ranks;
        for (uint32_t i = 0; i < n_ranks; i++)
            if (at[i] < proposals[i]->n_listed && (from == n_ranks || ahead(list_of(proposals[i]) + at[i], list_of(proposals[from]) + at[from]))) from = i;
        if (from == n_ranks) return;
        const cv_result_top *next = list_of(proposals[from]) + at[from]++;
        m->logit[m->n] = next->logprob;
        m->c.id[m->n++] = next->token;
        if (proven) m->proven = m->n;
        /* Behind a list's last token its rank's unlisted ones may come. */
        if (proposals[from]->more && at[from] == proposals[from]->n_listed) proven = false;
    }
}

/* Σ of the ranks' sums, each relative to its own top, relative to `top`. */
static double total_of(const cv_proposal *const *proposals, uint32_t n_ranks, float top, float inverse, bool mass) {
    double sum = 0;
    for (uint32_t i = 0; i < n_ranks; i++) {
        if (proposals[i]->top == -INFINITY) continue;
        float d = (proposals[i]->top - top) * inverse;
        if (d > CV_LEAST_EXPONENT) sum += (mass ? proposals[i]->mass : proposals[i]->sum) * (double)cv_exp_scalar(d);
    }
    return sum;
}

/* Filters and draws. False when the lists do not prove the choice. */
static bool choose(const uint8_t *step, const cv_step_row *r, const cv_proposal *const *proposals, uint32_t n_ranks, uint64_t position, merged *m, uint32_t *token) {
    float inverse = 1.0f / r->temperature;
    cv_candidates *c = &m->c;
    bool all = m->all;
    size_t proven = m->proven;
    for (size_t i = 0; i < m->n; i++) c->weight[i] = cv_exp_scalar((m->logit[i] - m->top) * inverse);
    c->n = m->n;
    while (c->n > 0 && !((m->logit[c->n - 1] - m->top) * inverse > CV_LEAST_EXPONENT)) c->n--; /* the order is that of the logits */
    if (c->n < proven) {
        proven = c->n;
        all = true; /* all that can be drawn is listed */
    }
    if (r->top_k && (all || r->top_k <= proven)) {
        if (r->top_k < c->n) c->n = r->top_k;
        proven = c->n;
        all = true;
    } else if (r->top_k) {
        return false;
    }
    if (r->top_p < 1) {
        double total = all ? cv_total_weight(c) : total_of(proposals, n_ranks, m->top, inverse, true), mass = (double)r->top_p * total, sum = 0;
        size_t taken = 0;
        while (taken < proven && (taken == 0 || sum < mass)) sum += (double)c->weight[taken++];
        if (!all && sum < mass) return false;
        c->n = proven = taken;
        all = true;
    }
    if (r->min_p > 0) {
        float least = r->min_p < 1 ? r->min_p : 1;
        if (!all && !(c->weight[proven - 1] < least)) return false;
        cv_drop_below(c, least);
        if (c->n < proven) proven = c->n;
        all = true;
    }
    uint64_t stream = cv_random_stream(r, position);
    if (cv_xtc_strikes(r, stream)) {
        double total = all ? cv_total_weight(c) : total_of(proposals, n_ranks, m->top, inverse, true);
        if (!all && (double)c->weight[proven - 1] / total > (double)r->xtc_threshold) return false;
        cv_exclude_top_choices(c, step, r, total);
    }
    for (uint32_t i = 0; !all && i < n_ranks; i++) { /* without filters the unlisted tokens take part: their ranks have drawn among them */
        const cv_proposal *p = proposals[i];
        float d = (p->rest_logit - m->top) * inverse;
        if (p->rest_token == CV_TOKEN_LAST || !(d > CV_LEAST_EXPONENT)) continue;
        c->id[c->n] = p->rest_token;
        c->weight[c->n++] = cv_exp_scalar(d);
    }
    *token = cv_draw(c, stream);
    return true;
}

/* The logit of a token that was listed or drawn among the rest. */
static float logit_of(const cv_proposal *const *proposals, uint32_t n_ranks, uint32_t token) {
    for (uint32_t i = 0; i < n_ranks; i++) {
        if (proposals[i]->rest_token == token) return proposals[i]->rest_logit;
        for (uint32_t k = 0; k < proposals[i]->n_listed; k++)
            if (list_of(proposals[i])[k].token == token) return list_of(proposals[i])[k].logprob;
    }
    return -INFINITY;
}

uint32_t cv_split_merge(const void *step, const cv_step_row *r, const cv_proposal *const *proposals, uint32_t n_ranks, uint64_t position, cv_sampler_scratch *s, cv_result_row *out, cv_result_top *top) {
    merged m = {.logit = s->logits, .c = {s->weights, s->ids, 0}, .top = -INFINITY};
    bool broken = false;
    for (uint32_t i = 0; i < n_ranks; i++) {
        broken = broken || proposals[i]->broken;
        if (proposals[i]->top > m.top) m.top = proposals[i]->top;
    }
    if (broken) return CV_ROW_NOT_A_NUMBER;
    if (!isfinite(m.top)) return CV_ROW_NO_CHOICE;
    join_lists(proposals, n_ranks, &m);
    if (r->n_top_logprobs > m.proven && !m.all) return CV_SPLIT_GATHER; /* cannot be: as many are listed as asked for */
    uint32_t token = m.c.id[0];
    for (uint32_t i = 0; i < r->n_top_logprobs && i < m.n; i++) top[i] = (cv_result_top){m.c.id[i], m.logit[i]};
    out->n_top = (uint32_t)(r->n_top_logprobs < m.n ? r->n_top_logprobs : m.n);
    if (draws(r) && !choose(step, r, proposals, n_ranks, position, &m, &token)) return CV_SPLIT_GATHER;
    out->token = token;
    out->logprob = 0;
    if (r->n_top_logprobs || (r->flags & CV_ROW_LOGPROB)) {
        float norm = m.top + (float)log(total_of(proposals, n_ranks, m.top, 1, false));
        out->logprob = logit_of(proposals, n_ranks, token) - norm;
        for (uint32_t i = 0; i < out->n_top; i++) top[i].logprob -= norm;
    }
    return CV_ROW_OK;
}
