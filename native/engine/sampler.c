/* sampler.c — see sampler.h. */
#include "sampler.h"

#include "candidates.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

int cv_sampler_open(size_t vocab, cv_sampler_scratch *s) {
    *s = (cv_sampler_scratch){.logits = malloc(vocab * sizeof(float)), .ids = malloc(vocab * sizeof(uint32_t)), .weights = malloc(vocab * sizeof(float))};
    return s->logits && s->ids && s->weights ? CV_OK : CV_E_MEMORY;
}

void cv_sampler_close(cv_sampler_scratch *s) {
    free(s->logits);
    free(s->ids);
    free(s->weights);
    *s = (cv_sampler_scratch){0};
}

enum { FEW_BIASES = 8 };

/* Of the 32 tokens from `first` on, those that may be drawn. */
static uint32_t word_of(const uint32_t *mask, size_t first, size_t vocab) {
    uint32_t bits = mask[first >> 5];
    return vocab - first < 32 ? bits & ((1u << (vocab - first)) - 1) : bits;
}

/* The most probable of the tokens that may be drawn, the first of several; vocab: there is none. *broken: one of them is not a number. */
static size_t best_of(const float *x, const uint32_t *mask, size_t vocab, bool *broken) {
    size_t best = vocab;
    for (size_t first = 0; first < vocab; first += 32)
        for (uint32_t bits = word_of(mask, first, vocab); bits; bits &= bits - 1) {
            size_t i = first + (size_t)__builtin_ctz(bits);
            if (best == vocab || x[i] > x[best]) best = i;
            *broken |= x[i] != x[i];
        }
    return best;
}

/* The same where every token may be drawn: lanes that do not wait for each other, and then the first one in the best block. */
static size_t best_of_all(const float *x, size_t vocab, bool *broken) {
    enum { LANES = 32, BLOCK = 32 * LANES };
    size_t at = 0, found = 0;
    float best = x[0];
    for (; vocab - at >= BLOCK; at += BLOCK) {
        float most[LANES];
        uint32_t odd[LANES] = {0};
        memcpy(most, x + at, sizeof most);
        for (size_t i = at; i < at + BLOCK; i += LANES)
            for (size_t l = 0; l < LANES; l++) {
                most[l] = x[i + l] > most[l] ? x[i + l] : most[l];
                odd[l] |= x[i + l] != x[i + l];
            }
        float largest = most[0];
        for (size_t l = 0; l < LANES; l++) {
            if (most[l] > largest) largest = most[l];
            *broken |= odd[l] != 0;
        }
        if (largest > best) {
            best = largest;
            found = at;
        }
    }
    while (found < at && x[found] != best) found++;
    if (found == at) found = 0; /* no block, or a first logit that is not a number */
    for (; at < vocab; at++) {
        if (x[at] > x[found]) found = at;
        *broken |= x[at] != x[at];
    }
    return found;
}

/* The same behind biases, without a copy of all logits: the best one of the others against each biased one. vocab: the copy is
 * needed, because the best one is biased itself, or a sum is not a number. */
static size_t best_beside_biases(const uint8_t *step, const cv_step_row *r, const float *x, size_t vocab, bool *broken) {
    const cv_step_bias *bias = (const cv_step_bias *)(const void *)(step + r->bias_offset);
    const size_t other = best_of_all(x, vocab, broken);
    size_t best = other;
    float most = x[other];
    for (size_t i = 0; i < r->n_bias; i++) {
        const size_t token = bias[i].token;
        float v = x[token];
        cv_adjust_logits(step, r, NULL, token, 1, &v);
        if (token == other || v != v) return vocab;
        if (v > most || (v == most && token < best)) {
            best = token;
            most = v;
        }
    }
    return isfinite(most) ? best : vocab;
}

static void add_candidate(cv_candidates *c, size_t i, float d) {
    if (!(d > CV_LEAST_EXPONENT)) return;
    c->id[c->n] = (uint32_t)i;
    c->weight[c->n++] = expf(d);
}

static uint32_t sample(const uint8_t *step, const cv_step_row *r, const float *x, const uint32_t *mask, size_t vocab, float top, uint64_t position, cv_sampler_scratch *s) {
    cv_candidates c = {s->weights, s->ids, 0};
    float inverse = 1.0f / r->temperature;
    if (!mask)
        for (size_t i = 0; i < vocab; i++) add_candidate(&c, i, (x[i] - top) * inverse);
    for (size_t first = 0; mask && first < vocab; first += 32)
        for (uint32_t bits = word_of(mask, first, vocab); bits; bits &= bits - 1) {
            size_t i = first + (size_t)__builtin_ctz(bits);
            add_candidate(&c, i, (x[i] - top) * inverse);
        }
    uint64_t stream = cv_random_stream(r, position);
    if (r->top_k && r->top_k < c.n) cv_keep_best(&c, r->top_k, INFINITY);
    if (r->top_p < 1) cv_keep_best(&c, SIZE_MAX, (double)r->top_p * cv_total_weight(&c));
    if (r->min_p > 0) cv_drop_below(&c, r->min_p < 1 ? r->min_p : 1);
    if (cv_xtc_strikes(r, stream)) cv_exclude_top_choices(&c, step, r, cv_total_weight(&c));
    return cv_draw(&c, stream);
}

uint32_t cv_sample(const void *base, const cv_step_row *r, const uint32_t *mask, const float *logits, size_t vocab, uint64_t position, cv_sampler_scratch *s, cv_result_row *out, cv_result_top *top) {
    const uint8_t *step = base;
    const float *x = logits;
    /* A mask alone says which logits to look at; they need not be copied. */
    bool looks = mask && !r->n_bias && !r->n_history && !r->n_top_logprobs && !(r->flags & CV_ROW_LOGPROB), broken = false;
    /* The inverse of a denormal temperature is infinite, and 0 * infinity no weight: such a temperature is greedy. */
    const bool greedy = r->temperature < FLT_MIN, plain = !mask && !r->n_history && !r->n_top_logprobs && !(r->flags & CV_ROW_LOGPROB);
    if (greedy && plain && r->n_bias && r->n_bias <= FEW_BIASES) {
        const size_t best = best_beside_biases(step, r, x, vocab, &broken);
        if (broken) return CV_ROW_NOT_A_NUMBER;
        if (best < vocab) {
            out->token = (uint32_t)best;
            out->n_top = 0;
            out->logprob = 0;
            return CV_ROW_OK;
        }
    }
    if (!looks && (r->n_bias || mask || r->n_history)) {
        memcpy(s->logits, logits, vocab * sizeof(float));
        cv_adjust_logits(step, r, mask, 0, vocab, s->logits);
        x = s->logits;
    }
    if (!looks) mask = NULL;
    size_t best = mask ? best_of(x, mask, vocab, &broken) : best_of_all(x, vocab, &broken);
    if (broken) return CV_ROW_NOT_A_NUMBER;
    if (best == vocab || !isfinite(x[best])) return CV_ROW_NO_CHOICE;
    out->token = greedy ? (uint32_t)best : sample(step, r, x, mask, vocab, x[best], position, s);
    out->n_top = 0;
    out->logprob = 0;
    if (r->n_top_logprobs || (r->flags & CV_ROW_LOGPROB)) {
        double sum = 0;
        for (size_t i = 0; i < vocab; i++) sum += (double)expf(x[i] - x[best]);
        float norm = x[best] + (float)log(sum);
        out->logprob = x[out->token] - norm;
        if (r->n_top_logprobs) out->n_top = cv_largest_logits(x, vocab, 0, r->n_top_logprobs, top);
        for (uint32_t i = 0; i < out->n_top; i++) top[i].logprob -= norm;
    }
    return CV_ROW_OK;
}
