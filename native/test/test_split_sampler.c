/* test_split_sampler.c — choosing a token from a vocabulary that is split over ranks gives what one rank gives, for every sampler
 * option, on logits with and without ties; and the lists that ranks exchange suffice in the usual cases. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../engine/split_sampler.h"
#include "check.h"

enum { VOCAB = 3000, RANKS = 5, PROPOSAL = 4096 };

typedef struct {
    _Alignas(8) uint8_t bytes[1 << 14]; /* stands for a step: the row's tables */
    cv_step_row row;
} options;

static double uniform(unsigned long long *seed) { return (double)(cv_random(seed) >> 11) * 0x1p-53; }
static uint32_t below(unsigned long long *seed, uint32_t n) { return (uint32_t)(cv_random(seed) % n); }

/* What a request may ask for: each option is on in a part of the rounds. */
static void random_options(options *o, unsigned long long *seed) {
    static const uint32_t ks[] = {1, 2, 5, 40, 64, 200, 256, 257, 1000, 2999, 3000, 5000};
    static const float ps[] = {0.01f, 0.3f, 0.5f, 0.9f, 0.95f, 0.999f}, thresholds[] = {0.5f, 0.1f, 0.02f, 0.0005f};
    memset(o, 0, sizeof *o);
    cv_step_row *r = &o->row;
    *r = (cv_step_row){.temperature = below(seed, 5) ? 0.2f + 2 * (float)uniform(seed) : 0, .top_p = 1, .repetition_penalty = 1, .seed = cv_random(seed), .flags = CV_ROW_SAMPLE};
    if (!below(seed, 3)) r->top_k = ks[below(seed, sizeof ks / sizeof ks[0])];
    if (!below(seed, 3)) r->top_p = ps[below(seed, sizeof ps / sizeof ps[0])];
    if (!below(seed, 4)) r->min_p = below(seed, 8) ? 0.2f * (float)uniform(seed) : 1;
    if (!below(seed, 4)) {
        r->xtc_probability = 0.7f;
        r->xtc_threshold = thresholds[below(seed, 4)];
    }
    if (!below(seed, 3)) r->flags |= CV_ROW_LOGPROB;
    if (!below(seed, 3)) r->n_top_logprobs = 1 + below(seed, 64);
    size_t at = 8;
    if (!below(seed, 3)) {
        r->bias_offset = at;
        r->n_bias = 1 + below(seed, 20);
        for (uint32_t i = 0; i < r->n_bias; i++, at += sizeof(cv_step_bias)) *(cv_step_bias *)(void *)(o->bytes + at) = (cv_step_bias){below(seed, VOCAB), below(seed, 3) ? 6 * (float)uniform(seed) - 3 : -INFINITY};
    }
    if (!below(seed, 3)) {
        r->repetition_penalty = 1.3f;
        r->presence_penalty = 0.4f;
        r->frequency_penalty = 0.1f;
        r->history_offset = at;
        r->n_history = 1 + below(seed, 50);
        for (uint32_t i = 0; i < r->n_history; i++, at += sizeof(cv_step_history)) *(cv_step_history *)(void *)(o->bytes + at) = (cv_step_history){below(seed, VOCAB), below(seed, 3), below(seed, 4)};
    }
    if (!below(seed, 3)) {
        r->xtc_keep_offset = at;
        r->n_xtc_keep = 1 + below(seed, 4);
        for (uint32_t i = 0; i < r->n_xtc_keep; i++, at += 4) *(uint32_t *)(void *)(o->bytes + at) = below(seed, VOCAB);
    }
    if (!below(seed, 3)) { /* few, many or no tokens allowed */
        r->mask_offset = at;
        uint32_t every = below(seed, 4) ? 1 + below(seed, 3) : 100 + below(seed, 4000);
        for (uint32_t i = 0; i < VOCAB; i += every) o->bytes[at + i / 8] |= (uint8_t)(1u << i % 8);
    }
}

/* Peaked or flat, with ties or without. */
static void random_logits(float *x, unsigned long long *seed) {
    float spread = 1 + 6 * (float)uniform(seed), step = below(seed, 2) ? 0.25f : 0;
    for (size_t i = 0; i < VOCAB; i++) {
        double u = uniform(seed) + uniform(seed) + uniform(seed) + uniform(seed) - 2;
        x[i] = spread * (float)u;
        if (step > 0) x[i] = step * roundf(x[i] / step);
    }
    if (below(seed, 2)) x[below(seed, VOCAB)] += 8;
}

/* Cuts the vocabulary at random places; slices may be empty. */
static void random_slices(size_t *first, uint32_t n, unsigned long long *seed) {
    first[0] = 0;
    first[n] = VOCAB;
    for (uint32_t i = 1; i < n; i++) first[i] = below(seed, 6) ? below(seed, VOCAB + 1) : first[i - 1];
    for (uint32_t i = 1; i < n; i++)
        for (uint32_t j = i + 1; j < n; j++)
            if (first[j] < first[i]) {
                size_t t = first[i];
                first[i] = first[j];
                first[j] = t;
            }
}

static const uint32_t *mask_of(const options *o) { return o->row.mask_offset ? (const uint32_t *)(const void *)(o->bytes + o->row.mask_offset) : NULL; }

/* The split choice: what cv_split_merge returns. */
static uint32_t split(const options *o, const float *x, const size_t *first, uint32_t n, uint64_t position, cv_sampler_scratch *s, cv_result_row *out, cv_result_top *top) {
    static _Alignas(8) uint8_t room[RANKS][PROPOSAL];
    const cv_proposal *all[RANKS];
    for (uint32_t i = 0; i < n; i++) {
        cv_proposal *p = (cv_proposal *)(void *)room[i];
        cv_split_propose(o->bytes, &o->row, mask_of(o), x + first[i], first[i], first[i + 1] - first[i], position, s, p);
        all[i] = p;
    }
    return cv_split_merge(o->bytes, &o->row, all, n, position, s, out, top);
}

static void test_equality(cv_checks *c, int rounds) {
    static float x[VOCAB];
    static options o;
    unsigned long long seed = 20;
    int gathered = 0, usual = 0, usual_gathered = 0;
    cv_sampler_scratch s;
    cv_case(c, "a split vocabulary gives one rank's tokens, log-probabilities and alternatives, for every option");
    cv_check(c, !cv_sampler_open(VOCAB, &s), "no scratch");
    for (int round = 0; round < rounds; round++) {
        size_t first[RANKS + 1];
        uint32_t n = 1 + below(&seed, RANKS);
        if (round % 20 == 0) random_logits(x, &seed);
        random_options(&o, &seed);
        random_slices(first, n, &seed);
        uint64_t position = below(&seed, 100000);
        cv_result_row one = {0}, many = {0};
        cv_result_top top[64], others[64];
        uint32_t status = cv_sample(o.bytes, &o.row, mask_of(&o), x, VOCAB, position, &s, &one, top);
        uint32_t got = split(&o, x, first, n, position, &s, &many, others);
        /* Filters that keep few tokens, or none at all: no row need be gathered for them. */
        bool common = o.row.top_k <= 256 && (o.row.top_k || (o.row.top_p >= 1 && !(o.row.min_p > 0) && !(o.row.xtc_probability > 0)));
        usual += common;
        if (got == CV_SPLIT_GATHER) {
            gathered++;
            usual_gathered += common;
            continue;
        }
        if (!cv_check(c, got == status, "round %d: status %u, one rank's is %u", round, got, status) || status) continue;
        cv_check(c, many.token == one.token, "round %d: token %u, one rank's is %u", round, many.token, one.token);
        cv_check(c, fabsf(many.logprob - one.logprob) < 1e-4f, "round %d: log-probability %g, one rank's is %g", round, (double)many.logprob, (double)one.logprob);
        cv_check(c, many.n_top == one.n_top, "round %d: %u alternatives, one rank has %u", round, many.n_top, one.n_top);
        for (uint32_t i = 0; i < one.n_top && i < many.n_top; i++)
            cv_check(c, others[i].token == top[i].token && fabsf(others[i].logprob - top[i].logprob) < 1e-4f, "round %d: alternative %u is token %u, one rank's is %u", round, i, others[i].token, top[i].token);
    }
    cv_end_case(c);
    cv_case(c, "rows are gathered only where a filter keeps many tokens");
    cv_check(c, usual > rounds / 4 && usual_gathered == 0, "%d of %d usual rounds", usual_gathered, usual);
    cv_check(c, gathered > 0 && gathered < rounds / 3, "%d of %d rounds", gathered, rounds);
    cv_end_case(c);
    cv_sampler_close(&s);
}

static void test_failures(cv_checks *c) {
    static float x[VOCAB];
    static options o;
    unsigned long long seed = 5;
    cv_sampler_scratch s;
    cv_result_row out;
    cv_result_top top[64];
    size_t first[] = {0, 1000, 1000, VOCAB};
    cv_case(c, "a logit that is not a number in one slice fails the row everywhere, and so does a vocabulary of which nothing may be chosen");
    cv_check(c, !cv_sampler_open(VOCAB, &s), "no scratch");
    random_logits(x, &seed);
    o.row = (cv_step_row){.temperature = 1, .top_p = 1, .repetition_penalty = 1};
    x[2500] = NAN;
    uint32_t status = split(&o, x, first, 3, 1, &s, &out, top);
    cv_check(c, status == CV_ROW_NOT_A_NUMBER, "status %u", status);
    for (size_t i = 0; i < VOCAB; i++) x[i] = -INFINITY;
    status = split(&o, x, first, 3, 1, &s, &out, top);
    cv_check(c, status == CV_ROW_NO_CHOICE, "status %u", status);
    x[7] = INFINITY;
    status = split(&o, x, first, 3, 1, &s, &out, top);
    cv_check(c, status == CV_ROW_NO_CHOICE, "status %u", status);
    x[7] = 1;
    status = split(&o, x, first, 3, 1, &s, &out, top);
    cv_check(c, !status && out.token == 7, "status %u, token %u", status, out.token);
    cv_end_case(c);
    cv_sampler_close(&s);
}

/* Biases of a greedy row are looked at without a copy of the logits; asked for its log-probability, the same row takes the copy. */
static void test_greedy_biases(cv_checks *c, int rounds) {
    static const float biases[] = {-INFINITY, -1, -0.25f, 0, 0.25f, 1, 9, INFINITY};
    static float x[VOCAB];
    static options o;
    unsigned long long seed = 11;
    cv_sampler_scratch s;
    cv_case(c, "a greedy row with a few biases takes the token that is best in a copy of its logits");
    cv_check(c, !cv_sampler_open(VOCAB, &s), "no scratch");
    for (int round = 0; round < rounds; round++) {
        random_logits(x, &seed);
        memset(&o, 0, sizeof o);
        o.row = (cv_step_row){.top_p = 1, .repetition_penalty = 1, .flags = CV_ROW_SAMPLE, .bias_offset = 8, .n_bias = 1 + below(&seed, 10)};
        size_t best = 0;
        for (size_t i = 0; i < VOCAB; i++)
            if (x[i] > x[best]) best = i;
        if (!below(&seed, 4)) x[below(&seed, VOCAB)] = x[best]; /* the first of two wins */
        if (!below(&seed, 50)) x[below(&seed, VOCAB)] = NAN;
        if (!below(&seed, 50)) x[below(&seed, VOCAB)] = INFINITY;
        if (!below(&seed, 50))
            for (size_t i = 0; i < VOCAB; i++) x[i] = i % 1000 ? -INFINITY : x[i];
        for (uint32_t i = 0; i < o.row.n_bias; i++) {
            const uint32_t near = (uint32_t)best + below(&seed, 3), token = below(&seed, 3) ? below(&seed, VOCAB) : near < VOCAB ? near : VOCAB - 1;
            *(cv_step_bias *)(void *)(o.bytes + 8 + i * sizeof(cv_step_bias)) = (cv_step_bias){token, biases[below(&seed, 8)]};
        }
        cv_result_row plain = {0}, copied = {0};
        const uint32_t status = cv_sample(o.bytes, &o.row, NULL, x, VOCAB, 1, &s, &plain, NULL);
        o.row.flags |= CV_ROW_LOGPROB;
        const uint32_t expected = cv_sample(o.bytes, &o.row, NULL, x, VOCAB, 1, &s, &copied, NULL);
        cv_check(c, status == expected && plain.token == copied.token, "round %d: token %u (%u), in a copy %u (%u)", round, plain.token, status, copied.token, expected);
    }
    cv_end_case(c);
    cv_sampler_close(&s);
}

int main(void) {
    cv_checks c = {0};
    test_greedy_biases(&c, 3000);
    test_equality(&c, 6000);
    test_failures(&c);
    return cv_report(&c);
}
