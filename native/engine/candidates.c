/* candidates.c — see candidates.h. */
#include "candidates.h"

#include <float.h>
#include <math.h>
#include <string.h>

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

uint64_t cv_random_stream(const cv_step_row *r, uint64_t position) { return mix(r->seed ^ mix(position)); }

void cv_adjust_logits(const uint8_t *step, const cv_step_row *r, const uint32_t *mask, size_t first, size_t n, float *x) {
    const cv_step_bias *bias = table(step, r->bias_offset);
    for (size_t i = 0; i < r->n_bias; i++)
        if (bias[i].token - first < n) x[bias[i].token - first] += bias[i].bias;
    for (size_t i = 0, run; mask && i < n; i += run) { /* a word of the mask at a time: most are all or nothing */
        size_t shift = (first + i) & 31;
        uint32_t bits = mask[(first + i) >> 5] >> shift;
        run = 32 - shift < n - i ? 32 - shift : n - i;
        if (bits == UINT32_MAX >> shift) continue;
        for (size_t k = 0; k < run; k++)
            if (!(bits >> k & 1)) x[i + k] = -INFINITY;
    }
    const cv_step_history *h = table(step, r->history_offset);
    for (size_t i = 0; i < r->n_history; i++) {
        if (h[i].token - first >= n) continue;
        float *v = &x[h[i].token - first];
        if (h[i].in_context && r->repetition_penalty != 1) *v = *v < 0 ? *v * r->repetition_penalty : *v / r->repetition_penalty;
        if (h[i].in_output) *v -= r->presence_penalty + r->frequency_penalty * (float)h[i].in_output;
        /* A tiny repetition penalty leaves float32's range: the token stays the most (or least) probable, and the step of
         * everybody else does not fail. */
        if (*v > FLT_MAX) *v = FLT_MAX;
    }
}

uint32_t cv_largest_logits(const float *x, size_t n, size_t first, uint32_t k, cv_result_top *top) {
    uint32_t have = 0;
    for (size_t i = 0; i < n; i++) {
        if (x[i] == -INFINITY || (have == k && !(x[i] > top[k - 1].logprob))) continue;
        uint32_t at = have < k ? have++ : k - 1;
        while (at > 0 && x[i] > top[at - 1].logprob) {
            top[at] = top[at - 1];
            at--;
        }
        top[at] = (cv_result_top){(uint32_t)(first + i), x[i]};
    }
    return have;
}

static bool before(const cv_candidates *c, size_t a, size_t b) { return c->weight[a] > c->weight[b] || (c->weight[a] == c->weight[b] && c->id[a] < c->id[b]); }

static void swap(cv_candidates *c, size_t a, size_t b) {
    float w = c->weight[a];
    uint32_t i = c->id[a];
    c->weight[a] = c->weight[b];
    c->id[a] = c->id[b];
    c->weight[b] = w;
    c->id[b] = i;
}

static void sift_down(cv_candidates *c, size_t root, size_t n) {
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
void cv_keep_best(cv_candidates *c, size_t keep, double mass) {
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

double cv_total_weight(const cv_candidates *c) {
    double sum = 0;
    for (size_t i = 0; i < c->n; i++) sum += c->weight[i];
    return sum;
}

void cv_drop_below(cv_candidates *c, float least) {
    size_t n = 0;
    for (size_t i = 0; i < c->n; i++)
        if (c->weight[i] >= least) {
            c->weight[n] = c->weight[i];
            c->id[n++] = c->id[i];
        }
    c->n = n;
}

bool cv_xtc_strikes(const cv_step_row *r, uint64_t stream) { return r->xtc_probability > 0 && uniform(stream, 0xfffffffeu) < (double)r->xtc_probability; }

void cv_exclude_top_choices(cv_candidates *c, const uint8_t *step, const cv_step_row *r, double total) {
    const uint32_t *keep = table(step, r->xtc_keep_offset);
    float lowest = INFINITY;
    for (size_t i = 0; i < c->n; i++)
        if ((double)c->weight[i] / total > (double)r->xtc_threshold && c->weight[i] < lowest) lowest = c->weight[i];
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
uint32_t cv_draw(const cv_candidates *c, uint64_t stream) {
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
