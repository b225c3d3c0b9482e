/* sampler.c — see sampler.h. */
#include "sampler.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
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

/* A table of the step. As an integer sum: the offset of an empty table is not checked and may be anything. */
static const void *table(const uint8_t *step, uint64_t offset) { return (const void *)((uintptr_t)step + (uintptr_t)offset); }

/* SplitMix64's finaliser (Steele, Lea, Flood 2014): a well-mixed function of its argument. */
static uint64_t mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Uniform in (0, 1), a pure function of stream and token. */
static double uniform(uint64_t stream, uint32_t token) { return ((double)(mix(stream ^ mix(token)) >> 12) + 0.5) * 0x1p-52; }

/* Adjusts a copy of the logits. */
static void adjust(const uint8_t *step, const cv_step_row *r, const float *logits, size_t vocab, float *x) {
    memcpy(x, logits, vocab * sizeof(float));
    const cv_step_bias *bias = table(step, r->bias_offset);
    for (size_t i = 0; i < r->n_bias; i++) x[bias[i].token] += bias[i].bias;
    if (r->mask_offset) {
        const uint32_t *mask = table(step, r->mask_offset);
        for (size_t i = 0; i < vocab; i++)
            if (!(mask[i >> 5] >> (i & 31) & 1)) x[i] = -INFINITY;
    }
    const cv_step_history *h = table(step, r->history_offset);
    for (size_t i = 0; i < r->n_history; i++) {
        float *v = &x[h[i].token];
        if (h[i].in_context && r->repetition_penalty != 1) *v = *v < 0 ? *v * r->repetition_penalty : *v / r->repetition_penalty;
        if (h[i].in_output) *v -= r->presence_penalty + r->frequency_penalty * (float)h[i].in_output;
        /* A tiny repetition penalty leaves float32's range: the token stays the most (or least) probable, and the step of
         * everybody else does not fail. */
        if (*v > FLT_MAX) *v = FLT_MAX;
    }
}

/* Keeps the k largest of x in top, largest first, lower index first among equals. */
static uint32_t largest(const float *x, size_t n, uint32_t k, cv_result_top *top) {
    uint32_t have = 0;
    for (size_t i = 0; i < n; i++) {
        if (x[i] == -INFINITY || (have == k && !(x[i] > top[k - 1].logprob))) continue;
        uint32_t at = have < k ? have++ : k - 1;
        while (at > 0 && x[i] > top[at - 1].logprob) {
            top[at] = top[at - 1];
            at--;
        }
        top[at] = (cv_result_top){(uint32_t)i, x[i]};
    }
    return have;
}

typedef struct {
    float *weight;
    uint32_t *id;
    size_t n;
} candidates;

static bool before(const candidates *c, size_t a, size_t b) { return c->weight[a] > c->weight[b] || (c->weight[a] == c->weight[b] && c->id[a] < c->id[b]); }

static void swap(candidates *c, size_t a, size_t b) {
    float w = c->weight[a];
    uint32_t i = c->id[a];
    c->weight[a] = c->weight[b];
    c->id[a] = c->id[b];
    c->weight[b] = w;
    c->id[b] = i;
}

static void sift_down(candidates *c, size_t root, size_t n) {
    for (;;) {
        size_t child = 2 * root + 1;
        if (child >= n) return;
        if (child + 1 < n && before(c, child + 1, child)) child++;
        if (!before(c, child, root)) return;
        swap(c, root, child);
        root = child;
    }
}

/* Moves the most probable to the end, one after another (a heap): `keep` of them, or until their mass reaches `mass`.
 * Afterwards the candidates are exactly those. The work grows with what is kept, not with the vocabulary. */
static void keep_best(candidates *c, size_t keep, double mass) {
    size_t n = c->n, taken = 0;
    double sum = 0;
    for (size_t i = n / 2; i-- > 0;) sift_down(c, i, n);
    while (n > 0 && taken < keep && (taken == 0 || sum < mass)) {
        sum += c->weight[0];
        swap(c, 0, --n);
        sift_down(c, 0, n);
        taken++;
    }
    memmove(c->weight, c->weight + n, taken * sizeof *c->weight);
    memmove(c->id, c->id + n, taken * sizeof *c->id);
    c->n = taken;
}

static double total(const candidates *c) {
    double sum = 0;
    for (size_t i = 0; i < c->n; i++) sum += c->weight[i];
    return sum;
}

/* Removes all candidates below a weight (the most probable has weight 1 and always stays). */
static void drop_below(candidates *c, float least) {
    size_t n = 0;
    for (size_t i = 0; i < c->n; i++)
        if (c->weight[i] >= least) {
            c->weight[n] = c->weight[i];
            c->id[n++] = c->id[i];
        }
    c->n = n;
}

/* XTC: with some probability, all tokens above the threshold but the least probable of them go. */
static void exclude_top_choices(candidates *c, const uint8_t *step, const cv_step_row *r, uint64_t stream) {
    if (!(r->xtc_probability > 0) || uniform(stream, 0xfffffffeu) >= (double)r->xtc_probability) return;
    const uint32_t *keep = table(step, r->xtc_keep_offset);
    double sum = total(c);
    float lowest = INFINITY;
    for (size_t i = 0; i < c->n; i++)
        if ((double)c->weight[i] / sum > (double)r->xtc_threshold && c->weight[i] < lowest) lowest = c->weight[i];
    size_t n = 0;
    for (size_t i = 0; i < c->n; i++) {
        bool special = false;
        for (size_t j = 0; j < r->n_xtc_keep; j++) special = special || keep[j] == c->id[i];
        if (c->weight[i] > lowest && !special) continue;
        c->weight[n] = c->weight[i];
        c->id[n++] = c->id[i];
    }
    c->n = n;
}

/* Gumbel-max. -ln(-ln u) exceeds `gap` only if 1-u < exp(-gap), which spares most tokens both logarithms. */
static uint32_t draw(const candidates *c, uint64_t stream) {
    double best = -INFINITY, scale = INFINITY; /* scale = exp(-best): a token of weight w can win only if 1-u < w*scale */
    uint32_t chosen = c->id[0];
    for (size_t i = 0; i < c->n; i++) {
        double u = uniform(stream, c->id[i]), w = (double)c->weight[i];
        if (1.0 - u > w * scale * 1.0000001 + 1e-300 || w <= 0) continue;
        double score = log(w) - log(-log(u));
        if (score > best || (score == best && c->id[i] < chosen)) {
            best = score;
            scale = exp(-best);
            chosen = c->id[i];
        }
    }
    return chosen;
}

static uint32_t sample(const uint8_t *step, const cv_step_row *r, const float *x, size_t vocab, float top, uint64_t position, cv_sampler_scratch *s) {
    candidates c = {s->weights, s->ids, 0};
    float inverse = 1.0f / r->temperature;
    for (size_t i = 0; i < vocab; i++) { /* what is below e^-80 of the best can never be drawn */
        float d = (x[i] - top) * inverse;
        if (!(d > -80.0f)) continue;
        c.id[c.n] = (uint32_t)i;
        c.weight[c.n++] = expf(d);
    }
    uint64_t stream = mix(r->seed ^ mix(position));
    if (r->top_k && r->top_k < c.n) keep_best(&c, r->top_k, INFINITY);
    if (r->top_p < 1) keep_best(&c, SIZE_MAX, (double)r->top_p * total(&c));
    if (r->min_p > 0) drop_below(&c, r->min_p < 1 ? r->min_p : 1);
    exclude_top_choices(&c, step, r, stream);
    return draw(&c, stream);
}

int cv_sample(const void *base, const cv_step_row *r, const float *logits, size_t vocab, uint64_t position, cv_sampler_scratch *s, cv_result_row *out, cv_result_top *top, cv_err err) {
    const uint8_t *step = base;
    const float *x = logits;
    if (r->n_bias || r->mask_offset || r->n_history) {
        adjust(step, r, logits, vocab, s->logits);
        x = s->logits;
    }
    size_t best = 0;
    bool broken = x[0] != x[0];
    for (size_t i = 1; i < vocab; i++) {
        if (x[i] > x[best]) best = i;
        broken |= x[i] != x[i];
    }
    if (broken) return cv_fail(err, CV_E_STEP, "the logits are not numbers: the weights are damaged or overflow");
    if (!isfinite(x[best])) return cv_fail(err, CV_E_STEP, "no token may be chosen: all are masked or banned");
    /* The inverse of a denormal temperature is infinite, and 0 * infinity no weight: such a temperature is greedy. */
    out->token = r->temperature >= FLT_MIN ? sample(step, r, x, vocab, x[best], position, s) : (uint32_t)best;
    out->n_top = 0;
    out->logprob = 0;
    if (r->n_top_logprobs || (r->flags & CV_ROW_LOGPROB)) {
        double sum = 0;
        for (size_t i = 0; i < vocab; i++) sum += (double)expf(x[i] - x[best]);
        float norm = x[best] + (float)log(sum);
        out->logprob = x[out->token] - norm;
        if (r->n_top_logprobs) out->n_top = largest(x, vocab, r->n_top_logprobs, top);
        for (uint32_t i = 0; i < out->n_top; i++) top[i].logprob -= norm;
    }
    return CV_OK;
}
