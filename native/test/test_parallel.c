/* test_parallel.c — a model on several ranks (tensor, pipeline, grids; shared memory and TCP; processes of their own) gives one
 * rank's logits and tokens, and a rank that dies, stops or has another plan gives an error on all others, never a hang. */
#include <math.h>

#include "../engine/place.h"
#include "tiny_ranks.h"

enum { N = 70, RESULT = 1 << 20, LAYERS = 4, VARIANTS = 48, CHAIN = 40, SEQS = 4, MASKS = 6 };

static uint8_t *result;
static _Alignas(64) uint8_t step[1 << 14];

static double now_s(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static int collect(cv_engine *e, uint64_t ticket, char *err) {
    struct pollfd p = {cv_event_fd(e), POLLIN, 0};
    uint64_t size;
    int code;
    while ((code = cv_collect(e, ticket, result, RESULT, &size, err, 256)) == CV_E_AGAIN) {
        char byte;
        if (poll(&p, 1, TR_WAIT_MS) != 1) {
            snprintf(err, 256, "a step does not end");
            return CV_E_STEP;
        }
        if (read(p.fd, &byte, 1) < 0) continue;
    }
    return code;
}

static int run(cv_engine *e, size_t size, char *err) {
    uint64_t ticket;
    int code = cv_submit(e, step, size, &ticket, err, 256);
    return code ? code : collect(e, ticket, err);
}

static const cv_result_row *row(uint32_t i) { return (const cv_result_row *)(const void *)(result + sizeof(cv_result)) + i; }

/* Everything that is compared between one rank and several. */
typedef struct {
    float logits[N * TM_VOCAB];
    uint32_t status[VARIANTS], token[VARIANTS], n_top[VARIANTS];
    float logprob[VARIANTS];
    cv_result_top top[VARIANTS][8];
    uint32_t all[5]; /* samples behind five tokens */
    uint32_t chain[SEQS][CHAIN];
    uint32_t masked[MASKS]; /* samples behind five tokens of one row and one of another, each with a mask of its own */
} outcome;

static uint32_t below(unsigned long long *seed, uint32_t n) { return (uint32_t)(cv_random(seed) % n); }

/* One row at the last position with sampler options of the variant; tables behind the step's own. */
static size_t variant_step(uint32_t variant, const uint32_t *tokens) {
    unsigned long long seed = 1000 + variant;
    tm_row in = {.first = N - 1, .tokens = tokens + N - 1, .n = 1, .seq = 0, .flags = CV_ROW_SAMPLE | CV_ROW_LOGPROB, .temperature = variant % 4 ? 0.5f + 0.3f * (float)(variant % 5) : 0, .seed = variant, .top_logprobs = variant % 3 ? 0 : 1 + variant % 8};
    size_t at = tm_step(step, &in, 1, NULL, 0);
    cv_step_row *r = (cv_step_row *)(void *)(step + sizeof(cv_step));
    if (!below(&seed, 3)) r->top_k = 1 + below(&seed, 30);
    if (!below(&seed, 3)) r->top_p = 0.3f + 0.1f * (float)below(&seed, 7);
    if (!below(&seed, 4)) r->min_p = 0.01f * (float)below(&seed, 30);
    if (!below(&seed, 4)) {
        r->xtc_probability = 0.9f;
        r->xtc_threshold = 0.05f;
    }
    if (!below(&seed, 3)) {
        r->bias_offset = at;
        r->n_bias = 6;
        for (uint32_t i = 0; i < r->n_bias; i++, at += sizeof(cv_step_bias)) *(cv_step_bias *)(void *)(step + at) = (cv_step_bias){below(&seed, TM_VOCAB), i ? 2 : -INFINITY};
    }
    if (!below(&seed, 3)) {
        r->repetition_penalty = 1.5f;
        r->presence_penalty = 0.5f;
        r->frequency_penalty = 0.2f;
        r->history_offset = at;
        r->n_history = 12;
        for (uint32_t i = 0; i < r->n_history; i++, at += sizeof(cv_step_history)) *(cv_step_history *)(void *)(step + at) = (cv_step_history){below(&seed, TM_VOCAB), i % 3, i % 2};
    }
    if (!below(&seed, 3)) {
        r->mask_offset = at;
        for (uint32_t i = 0; i < (TM_VOCAB + 31) / 32; i++, at += 4) *(uint32_t *)(void *)(step + at) = (uint32_t)(cv_random(&seed) >> 16);
    }
    at = (at + 7) & ~(size_t)7;
    ((cv_step *)(void *)step)->total_size = at;
    return at;
}

/* Streams in pairs, their steps all queued before the first has ended: each step names the tokens that the last but one samples. */
static int run_chain(cv_engine *e, const uint32_t *tokens, outcome *out, char *err) {
    uint64_t tickets[CHAIN];
    const uint32_t last = CV_TOKEN_LAST;
    for (uint32_t i = 0; i < CHAIN; i++) {
        tm_row rows[2];
        for (uint32_t k = 0; k < 2; k++) {
            uint32_t seq = i % 2 * 2 + k, prompt = 8 + 3 * seq, at = i / 2;
            rows[k] = (tm_row){.first = at ? prompt + at - 1 : 0, .tokens = at ? &last : tokens + seq, .n = at ? 1 : prompt, .seq = seq, .flags = CV_ROW_SAMPLE, .temperature = seq % 2 ? 0.8f : 0, .seed = seq};
        }
        int code = cv_submit(e, step, tm_step(step, rows, 2, NULL, 0), &tickets[i], err, 256);
        if (code) return code;
    }
    for (uint32_t i = 0; i < CHAIN; i++) {
        int code = collect(e, tickets[i], err);
        if (code) return code;
        for (uint32_t k = 0; k < 2; k++) out->chain[i % 2 * 2 + k][i / 2] = row(k)->token;
    }
    return CV_OK;
}

/* Masks with the step, or given while it is computed. */
static int run_masked(cv_engine *e, const uint32_t *tokens, bool later, uint32_t *out, char *err) {
    enum { WORDS = (TM_VOCAB + 31) / 32 };
    uint32_t masks[MASKS][WORDS], flags = CV_ROW_SAMPLE | (later ? CV_ROW_MASK_LATER : 0);
    unsigned long long seed = 77;
    for (uint32_t i = 0; i < MASKS; i++)
        for (uint32_t k = 0; k < WORDS; k++) masks[i][k] = (uint32_t)(cv_random(&seed) >> 16) & (uint32_t)(cv_random(&seed) >> 16);
    tm_row rows[2] = {{.first = N - MASKS + 1, .tokens = tokens + N - MASKS + 1, .n = MASKS - 1, .seq = 0, .flags = flags | CV_ROW_SAMPLE_ALL, .temperature = 2, .seed = 4}, {.first = 0, .tokens = tokens, .n = 3, .seq = 1, .flags = flags, .temperature = 2, .seed = 5}};
    size_t at = tm_step(step, rows, 2, NULL, 0);
    cv_step_row *r = (cv_step_row *)(void *)(step + sizeof(cv_step));
    if (!later) {
        memcpy(step + at, masks, sizeof masks);
        r[0].mask_offset = at;
        r[1].mask_offset = at + (MASKS - 1) * sizeof masks[0];
        at = (at + sizeof masks + 7) & ~(size_t)7;
        ((cv_step *)(void *)step)->total_size = at;
    }
    uint64_t ticket;
    int code = cv_submit(e, step, at, &ticket, err, 256);
    if (code) return code;
    if (later && cv_give_masks(e, ticket, 0, masks, sizeof masks, err, 256) != CV_E_ARGUMENT) return CV_E_STEP;
    if (later && (code = cv_give_masks(e, ticket, 1, masks[MASKS - 1], sizeof masks[0], err, 256))) return code;
    if (later && (cv_give_masks(e, ticket, 1, NULL, 0, err, 256) != CV_E_ARGUMENT || cv_give_masks(e, ticket, 2, NULL, 0, err, 256) != CV_E_ARGUMENT)) return CV_E_STEP;
    if (later && (code = cv_give_masks(e, ticket, 0, masks, (MASKS - 1) * sizeof masks[0], err, 256))) return code;
    if ((code = collect(e, ticket, err))) return code;
    const cv_result_top *all = (const cv_result_top *)(const void *)(result + row(0)->top_offset);
    for (uint32_t i = 0; i < MASKS; i++) {
        out[i] = i + 1 < MASKS ? all[i].token : row(1)->token;
        if (!(masks[i][out[i] / 32] >> out[i] % 32 & 1)) return CV_E_STEP;
    }
    return CV_OK;
}

/* A step that waits for masks: of a row that nobody needs any more, and when the engine is told to stop. */
static void test_waiting(cv_checks *c, const tiny_model *m, const uint32_t *tokens) {
    char err[256] = "";
    uint64_t ticket, got;
    cv_engine *e = NULL;
    cv_case(c, "a step samples without masks where none are needed any more, and a waiting one ends with the engine");
    tm_row in = {.first = 0, .tokens = tokens, .n = 4, .seq = 0, .flags = CV_ROW_SAMPLE};
    cv_check(c, !cv_open(m->plan, m->plan_size, NULL, &e, err, sizeof err) && !run(e, tm_step(step, &in, 1, NULL, 0), err), "%s", err);
    uint32_t plain = row(0)->token;
    in.flags |= CV_ROW_MASK_LATER;
    size_t size = tm_step(step, &in, 1, NULL, 0);
    int code = cv_submit(e, step, size, &ticket, err, sizeof err);
    if (!code) code = cv_give_masks(e, ticket, 0, NULL, 0, err, sizeof err);
    if (!code) code = collect(e, ticket, err);
    cv_check(c, !code && row(0)->token == plain, "%d %s", code, err);
    code = cv_submit(e, step, size, &ticket, err, sizeof err);
    cv_check(c, !code && cv_collect(e, ticket, result, RESULT, &got, err, sizeof err) == CV_E_AGAIN, "%d %s", code, err);
    cv_abort(e);
    code = collect(e, ticket, err);
    cv_check(c, code == CV_E_ABORTED, "%d %s", code, err);
    cv_check(c, cv_give_masks(e, ticket, 0, NULL, 0, err, sizeof err) == CV_E_ARGUMENT, "a ticket that is gone takes masks");
    cv_close(e);
    cv_end_case(c);
}

/* later: the engine is no pipeline. */
static int compute(cv_engine *e, const uint32_t *tokens, bool later, outcome *out, char *err) {
    for (uint32_t at = 0, n; at < N; at += n) { /* pieces of many sizes, over chunk edges */
        n = 1 + at % 17 < N - at ? 1 + at % 17 : N - at;
        tm_row r = {.first = at, .tokens = tokens + at, .n = n, .seq = 0, .flags = CV_ROW_RETURN_LOGITS};
        int code = run(e, tm_step(step, &r, 1, NULL, 0), err);
        if (code) return code;
        memcpy(out->logits + (size_t)at * TM_VOCAB, result + row(0)->logits_offset, (size_t)n * TM_VOCAB * sizeof(float));
    }
    for (uint32_t v = 0; v < VARIANTS; v++) {
        int code = run(e, variant_step(v, tokens), err);
        if (code) return code;
        out->status[v] = row(0)->status;
        out->token[v] = row(0)->token;
        out->logprob[v] = row(0)->logprob;
        out->n_top[v] = row(0)->n_top;
        memcpy(out->top[v], result + row(0)->top_offset, row(0)->n_top * sizeof(cv_result_top));
    }
    tm_row all = {.first = N - 5, .tokens = tokens + N - 5, .n = 5, .seq = 0, .flags = CV_ROW_SAMPLE | CV_ROW_SAMPLE_ALL, .temperature = 0.9f, .seed = 3};
    int code = run(e, tm_step(step, &all, 1, NULL, 0), err);
    if (code) return code;
    for (uint32_t i = 0; i < 5; i++) out->all[i] = ((const cv_result_top *)(const void *)(result + row(0)->top_offset))[i].token;
    if ((code = run_masked(e, tokens, later, out->masked, err))) return code;
    return run_chain(e, tokens, out, err);
}

static void compare(cv_checks *c, const outcome *one, const outcome *many) {
    float worst = 0;
    for (size_t i = 0; i < N * TM_VOCAB; i++) worst = fmaxf(worst, fabsf(one->logits[i] - many->logits[i]));
    cv_check(c, worst <= 2e-4f, "logits differ by %g", (double)worst);
    for (uint32_t v = 0; v < VARIANTS; v++) {
        cv_check(c, one->status[v] == many->status[v] && one->token[v] == many->token[v], "options %u: status %u, token %u; one rank has %u, %u", v, many->status[v], many->token[v], one->status[v], one->token[v]);
        cv_check(c, fabsf(one->logprob[v] - many->logprob[v]) < 2e-4f && one->n_top[v] == many->n_top[v], "options %u: log-probability %g, one rank has %g", v, (double)many->logprob[v], (double)one->logprob[v]);
        for (uint32_t i = 0; i < one->n_top[v] && i < many->n_top[v]; i++) cv_check(c, one->top[v][i].token == many->top[v][i].token, "options %u: alternative %u", v, i);
    }
    cv_check(c, !memcmp(one->all, many->all, sizeof one->all), "samples behind all tokens differ");
    cv_check(c, !memcmp(one->masked, many->masked, sizeof one->masked), "samples with masks differ");
    cv_check(c, !memcmp(one->chain, many->chain, sizeof one->chain), "tokens of streams in flight differ");
}

static const char *transport_name(uint32_t transport) { return transport == CV_TRANSPORT_SHM ? "shared memory" : "TCP"; }

static void test_equality(cv_checks *c, const tiny_model *m, const uint32_t *tokens, const outcome *one, uint32_t tensor, uint32_t stages, uint32_t transport) {
    static outcome many;
    char name[128], err[256] = "";
    snprintf(name, sizeof name, "tensor %u, pipeline %u over %s: logits, samples with all options, streams in flight are one rank's", tensor, stages, transport_name(transport));
    cv_case(c, name);
    tr_ranks r = {0};
    int code = tr_start(&r, m, tensor, stages, transport, NULL, err);
    if (!code) code = compute(r.engine, tokens, stages == 1, &many, err);
    cv_check(c, !code, "%d %s", code, err);
    if (!code) compare(c, one, &many);
    cv_stats_record stats = {0};
    if (!code) cv_stats(r.engine, &stats);
    cv_check(c, code || tensor == 1 || (stats.rank_checks == stats.steps && stats.exchange_ns > 0), "%llu of %llu hidden states were compared", (unsigned long long)stats.rank_checks, (unsigned long long)stats.steps);
    cv_check(c, tr_end(&r), "a rank does not end");
    for (uint32_t i = 1; i < r.n; i++) cv_check(c, !r.board->code[i], "rank %u ended with %d %s", i, r.board->code[i], r.board->text[i]);
    for (uint32_t i = 1; i < r.n && tensor > 1; i++) cv_check(c, r.board->checks[i] == stats.steps, "rank %u compared %llu hidden states", i, (unsigned long long)r.board->checks[i]);
    tr_forget(&r);
    cv_end_case(c);
}

/* Steps without an end until one fails; the victim is struck by a signal among them. seconds: from there to the failure. */
static int run_until_failure(tr_ranks *r, const uint32_t *tokens, uint32_t victim, int signal, bool *struck, double *seconds, char *err) {
    double start = now_s(), hit = 0;
    for (;;) {
        tm_row row = {.first = 0, .tokens = tokens, .n = 40, .seq = 0, .flags = CV_ROW_SAMPLE};
        int code = run(r->engine, tm_step(step, &row, 1, NULL, 0), err);
        *seconds = now_s() - (hit > 0 ? hit : start);
        if (code || *seconds > 20) return code;
        if (hit > 0 || now_s() - start < 0.05) continue;
        hit = now_s();
        *struck = true;
        kill(r->pids[victim], signal);
    }
}

static void test_struck(cv_checks *c, const tiny_model *m, const uint32_t *tokens, uint32_t tensor, uint32_t stages, uint32_t victim, int signal, uint32_t transport) {
    char name[128], err[256] = "", again[256] = "";
    snprintf(name, sizeof name, "rank %u of tensor %u, pipeline %u is %s over %s: an error on all others within 3 s", victim, tensor, stages, signal == SIGKILL ? "killed" : "stopped", transport_name(transport));
    cv_case(c, name);
    tr_ranks r = {0};
    bool struck = false;
    double seconds = 0;
    uint64_t ticket;
    int code = tr_start(&r, m, tensor, stages, transport, NULL, err);
    if (cv_check(c, !code, "%d %s", code, err)) {
        code = run_until_failure(&r, tokens, victim, signal, &struck, &seconds, err);
        cv_check(c, struck && code == CV_E_GROUP && err[0], "%d %s", code, err);
        cv_check(c, seconds < 3, "after %.1f s", seconds);
        tm_row row = {.first = 0, .tokens = tokens, .n = 1, .seq = 0};
        code = cv_submit(r.engine, step, tm_step(step, &row, 1, NULL, 0), &ticket, again, sizeof again);
        cv_check(c, code == CV_E_GROUP && again[0], "a later step: %d %s", code, again);
    }
    if (signal == SIGSTOP) kill(r.pids[victim], SIGCONT);
    cv_check(c, tr_end(&r), "a rank does not end");
    for (uint32_t i = 1; i < r.n; i++)
        if (i != victim || signal == SIGSTOP) cv_check(c, (r.board->code[i] == CV_E_GROUP || r.board->code[i] == CV_E_ABORTED) && r.board->text[i][0], "rank %u ended with %d %s", i, r.board->code[i], r.board->text[i]);
    tr_forget(&r);
    cv_end_case(c);
}

static void test_stalled(cv_checks *c, const tiny_model *m, const uint32_t *tokens, uint32_t tensor, uint32_t stages, uint32_t victim, uint32_t transport) {
    char name[160], err[256] = "", who[16];
    snprintf(name, sizeof name, "rank %u of tensor %u, pipeline %u lives but computes nothing over %s: an error that names it after the step's time", victim, tensor, stages, transport_name(transport));
    cv_case(c, name);
    snprintf(who, sizeof who, "rank %u", victim);
    tr_ranks r = {.stalled = victim};
    int code = tr_start(&r, m, tensor, stages, transport, NULL, err);
    if (cv_check(c, !code, "%d %s", code, err)) {
        tm_row row = {.first = 0, .tokens = tokens, .n = 4, .seq = 0, .flags = CV_ROW_SAMPLE};
        size_t size = tm_step(step, &row, 1, NULL, 0);
        ((cv_step *)(void *)step)->timeout_ms = 300;
        double start = now_s();
        code = run(r.engine, size, err);
        double seconds = now_s() - start;
        cv_check(c, code == CV_E_GROUP && strstr(err, who), "%d %s", code, err);
        cv_check(c, seconds > 0.25 && seconds < 3, "after %.2f s", seconds);
    }
    cv_check(c, tr_end(&r), "a rank does not end");
    tr_forget(&r);
    cv_end_case(c);
}

/* Longer than any silence that would be an alarm (2 s): the rank's monitor goes on beside what it computes. */
#define SLOW_MS 3000

static void test_slow(cv_checks *c, const tiny_model *m, const uint32_t *tokens, uint32_t tensor, uint32_t stages, uint32_t transport) {
    char name[160], err[256] = "";
    snprintf(name, sizeof name, "rank 1 of tensor %u, pipeline %u takes %d s over %s while it lives: no false alarm", tensor, stages, SLOW_MS / 1000, transport_name(transport));
    cv_case(c, name);
    tr_ranks r = {.stalled = 1, .slow_ms = SLOW_MS};
    int code = tr_start(&r, m, tensor, stages, transport, NULL, err);
    if (cv_check(c, !code, "%d %s", code, err)) {
        tm_row row = {.first = 0, .tokens = tokens, .n = 4, .seq = 0, .flags = CV_ROW_SAMPLE};
        double start = now_s();
        code = run(r.engine, tm_step(step, &row, 1, NULL, 0), err);
        double seconds = now_s() - start;
        cv_check(c, !code, "%d %s", code, err);
        cv_check(c, seconds > SLOW_MS / 1000.0 - 1, "it was not slow: %.2f s", seconds);
    }
    cv_check(c, tr_end(&r), "a rank does not end");
    tr_forget(&r);
    cv_end_case(c);
}

static void test_abort(cv_checks *c, const tiny_model *m, const uint32_t *tokens, uint32_t tensor, uint32_t stages, uint32_t transport) {
    char name[128], err[256] = "";
    snprintf(name, sizeof name, "rank 0 is told to stop among steps of tensor %u, pipeline %u over %s: all of them end, and all ranks", tensor, stages, transport_name(transport));
    cv_case(c, name);
    tr_ranks r = {0};
    uint64_t tickets[30];
    int code = tr_start(&r, m, tensor, stages, transport, NULL, err), failed = 0;
    if (cv_check(c, !code, "%d %s", code, err)) {
        tm_row row = {.first = 0, .tokens = tokens, .n = 60, .seq = 0, .flags = CV_ROW_SAMPLE};
        size_t size = tm_step(step, &row, 1, NULL, 0);
        for (uint32_t i = 0; i < 30 && !code; i++) code = cv_submit(r.engine, step, size, &tickets[i], err, sizeof err);
        cv_check(c, !code && !collect(r.engine, tickets[0], err), "%d %s", code, err);
        cv_abort(r.engine);
        for (uint32_t i = 1; i < 30; i++) {
            code = collect(r.engine, tickets[i], err);
            failed += code != 0;
            cv_check(c, !code || code == CV_E_ABORTED || code == CV_E_GROUP, "step %u: %d %s", i, code, err);
        }
        cv_check(c, failed > 0, "no step was stopped");
    }
    cv_check(c, tr_end(&r), "a rank does not end");
    tr_forget(&r);
    cv_end_case(c);
}

static void fewer_pages(uint32_t rank, cv_plan *plan) { plan->n_full_pages -= rank == 1; }

static void test_other_plan(cv_checks *c, const tiny_model *m, const uint32_t *tokens) {
    char err[256] = "";
    cv_case(c, "a rank whose plan is not of rank 0's model ends the group with an error that says so");
    tr_ranks r = {0};
    int code = tr_start(&r, m, 2, 1, CV_TRANSPORT_TCP, fewer_pages, err);
    if (cv_check(c, !code, "%d %s", code, err)) {
        tm_row row = {.first = 0, .tokens = tokens, .n = 4, .seq = 0, .flags = CV_ROW_SAMPLE};
        code = run(r.engine, tm_step(step, &row, 1, NULL, 0), err);
        cv_check(c, code == CV_E_GROUP && strstr(err, "plan"), "%d %s", code, err);
    }
    cv_check(c, tr_end(&r) && r.board->code[1] == CV_E_GROUP && strstr(r.board->text[1], "plan"), "rank 1: %d %s", r.board->code[1], r.board->text[1]);
    tr_forget(&r);
    cv_engine *e = NULL;
    uint8_t *plan = tr_plan(m, 2, 1, 1);
    code = cv_open(plan, m->plan_size, NULL, &e, err, sizeof err);
    cv_check(c, code == CV_E_PLAN && strstr(err, "group"), "without a group: %d %s", code, err);
    free(plan);
    cv_end_case(c);
}

/* Rank 1's last norm becomes the embedding of the last token, in which the test puts what is no number. */
static void broken_norm(uint32_t rank, cv_plan *plan) {
    cv_plan_tensor *tensors = (cv_plan_tensor *)(void *)((uint8_t *)plan + plan->tensors_offset);
    for (uint32_t i = 0; rank == 1 && i < plan->n_tensors; i++)
        if (tensors[i].slot == CV_T_FINAL_NORM) tensors[i].weight.offset = (TM_VOCAB - 1) * TM_HIDDEN * sizeof(float);
}

static void test_broken_rank(cv_checks *c) {
    char err[256] = "";
    const float nan = NAN;
    const uint32_t token = 5;
    cv_case(c, "logits that are not numbers on one rank are a failure of the row, not of the group");
    tiny_model m;
    bool made = tm_make_layers(&m, CV_COMPUTE_EXACT, 1, LAYERS, false);
    FILE *f = fopen(m.path, "r+b");
    made = made && f && !fseek(f, (long)((TM_VOCAB - 1) * TM_HIDDEN * sizeof(float)), SEEK_SET) && fwrite(&nan, sizeof nan, 1, f) == 1;
    cv_check(c, f && !fclose(f) && made, "no tiny model");
    tr_ranks r = {0};
    int code = tr_start(&r, &m, 2, 1, CV_TRANSPORT_TCP, broken_norm, err);
    for (int i = 0; i < 2 && cv_check(c, !code, "%d %s", code, err); i++) {
        tm_row in = {.first = 0, .tokens = &token, .n = 1, .seq = 0, .flags = CV_ROW_SAMPLE};
        code = run(r.engine, tm_step(step, &in, 1, NULL, 0), err);
        cv_check(c, !code && row(0)->status == CV_ROW_NOT_A_NUMBER && row(0)->token == CV_TOKEN_LAST, "%d %s", code, err);
    }
    cv_check(c, tr_end(&r) && !r.board->code[1], "rank 1: %d %s", r.board->code[1], r.board->text[1]);
    tr_forget(&r);
    tm_free(&m);
    cv_end_case(c);
}

/* Rank 0's words with damage: each to a process of its own, which must end with an error, whatever it makes of them. */
static void test_damaged_words(cv_checks *c, const tiny_model *m, const uint32_t *tokens, int rounds) {
    unsigned long long seed = 17;
    cv_case(c, "a rank that receives damaged steps ends with an error and does not crash");
    for (int round = 0; round < rounds; round++) {
        static _Alignas(64) uint8_t word[1 << 14];
        char err[256] = "";
        cv_place place;
        tr_ranks r = {.bare = true};
        int code = tr_start(&r, m, 2, 1, CV_TRANSPORT_SHM, NULL, err);
        uint8_t *plan = tr_plan(m, 2, 1, 0);
        if (!code) code = cv_place_open((const cv_plan *)(void *)plan, r.group, &place, (cv_err){err, sizeof err});
        free(plan);
        if (!cv_check(c, !code, "%d %s", code, err)) break;
        const uint32_t last[2] = {3, CV_TOKEN_LAST};
        tm_row rows[2] = {{.first = 30, .tokens = tokens, .n = 5, .seq = 0, .flags = CV_ROW_SAMPLE, .temperature = 0.7f}, {.first = 3, .tokens = last + 1, .n = 1, .seq = 1, .flags = CV_ROW_SAMPLE}};
        cv_word *w = (cv_word *)(void *)word;
        size_t size = tm_step((uint8_t *)(w + 1), rows, 2, NULL, 0), bytes = sizeof *w + size + sizeof last;
        *w = (cv_word){.kind = CV_WORD_STEP, .ticket = 1, .step_size = size, .n_rows = 2, .timeout_ms = 50};
        memcpy(word + sizeof *w + size, last, sizeof last);
        place.timeout_ms = 1000;
        for (int k = round % 4; k > 0; k--) {
            uint32_t odd = k == 1 ? 0xffffffffu : (uint32_t)cv_random(&seed);
            memcpy(word + sizeof *w + cv_random(&seed) % ((bytes - sizeof *w) / 4) * 4, &odd, 4);
        }
        if (round % 4 == 0) { /* the header: sizes, rows */
            static const uint64_t sizes[] = {0, 8, 7, 1ull << 40, 0xffffffffffffffffull};
            w->step_size = sizes[cv_random(&seed) % 5];
            if (round % 8) w->n_rows = (uint32_t)cv_random(&seed);
        }
        code = cv_place_send_word(&place, 0, w, round % 5 ? bytes : bytes - cv_random(&seed) % bytes);
        cv_check(c, !code, "sending: %d", code);
        cv_check(c, tr_end(&r), "the rank does not end");
        cv_check(c, !r.signals[1], "signal %d", r.signals[1]);
        cv_check(c, r.board->code[1] && r.board->text[1][0], "round %d: ended with %d %s", round, r.board->code[1], r.board->text[1]);
        tr_forget(&r);
    }
    cv_end_case(c);
}

int main(void) {
    cv_checks c = {0};
    static outcome one;
    uint32_t tokens[N];
    unsigned long long seed = 3;
    char err[256] = "";
    for (int i = 0; i < N; i++) tokens[i] = (uint32_t)(cv_random(&seed) % TM_VOCAB);
    result = aligned_alloc(64, RESULT);
    tiny_model m;
    cv_engine *e = NULL;
    int code = tm_make_layers(&m, CV_COMPUTE_EXACT, 1, LAYERS, true) ? cv_open(m.plan, m.plan_size, NULL, &e, err, sizeof err) : CV_E_IO;
    if (!code) code = compute(e, tokens, false, &one, err);
    cv_close(e);
    if (code) {
        printf("not ok - one rank: %d %s\n", code, err);
        return 1;
    }
    test_waiting(&c, &m, tokens);
    static const uint32_t grids[][2] = {{2, 1}, {3, 1}, {4, 1}, {1, 2}, {1, 3}, {2, 2}};
    for (uint32_t transport = CV_TRANSPORT_SHM; transport <= CV_TRANSPORT_TCP; transport += CV_TRANSPORT_TCP - CV_TRANSPORT_SHM) {
        for (size_t i = 0; i < sizeof grids / sizeof grids[0]; i++) test_equality(&c, &m, tokens, &one, grids[i][0], grids[i][1], transport);
        test_struck(&c, &m, tokens, 2, 1, 1, SIGKILL, transport);
        test_struck(&c, &m, tokens, 1, 3, 1, SIGKILL, transport);
        test_struck(&c, &m, tokens, 2, 2, 3, SIGKILL, transport);
        test_struck(&c, &m, tokens, 2, 2, 2, SIGSTOP, transport);
        test_stalled(&c, &m, tokens, 2, 1, 1, transport);
        test_stalled(&c, &m, tokens, 1, 2, 1, transport);
        test_slow(&c, &m, tokens, 2, 1, transport);
        test_abort(&c, &m, tokens, 2, 1, transport);
        test_abort(&c, &m, tokens, 1, 2, transport);
    }
    test_other_plan(&c, &m, tokens);
    test_broken_rank(&c);
    test_damaged_words(&c, &m, tokens, 40);
    tm_free(&m);
    free(result);
    return cv_report(&c);
}
