/* test_engine.c — the engine through its public interface: pieces and batches give the same bits, seeds the same tokens, and
 * damaged plans and steps end in an error, never in a crash (run it under the sanitizers: make asan). */
#include <poll.h>

#include "../backend/backend.h"
#include "tiny_model.h"

enum { N = 70, RESULT = 1 << 20 };

static uint8_t *result;
static _Alignas(64) uint8_t step[1 << 14];

static int run(cv_engine *e, size_t size, char *err) {
    uint64_t ticket, got;
    int code = cv_submit(e, step, size, &ticket, err, 256);
    if (code) return code;
    /* A damaged step may wait for masks that nobody will make; rows that wait for none refuse them. */
    char ignored[256];
    for (uint32_t i = 0; i < ((const cv_step *)(const void *)step)->n_rows; i++) cv_give_masks(e, ticket, i, NULL, 0, ignored, sizeof ignored);
    struct pollfd p = {cv_event_fd(e), POLLIN, 0};
    while ((code = cv_collect(e, ticket, result, RESULT, &got, err, 256)) == CV_E_AGAIN) {
        char byte;
        if (poll(&p, 1, 20000) != 1) return CV_E_STEP;
        if (read(p.fd, &byte, 1) < 0) continue;
    }
    return code;
}

static const cv_result_row *row(uint32_t i) { return (const cv_result_row *)(const void *)(result + sizeof(cv_result)) + i; }
static const float *logits_of(uint32_t i) { return (const float *)(const void *)(result + row(i)->logits_offset); }

/* Logits [N, vocab] of a sequence fed in pieces. */
static int feed(cv_engine *e, const uint32_t *tokens, uint32_t piece, uint32_t seq, float *out, char *err) {
    for (uint32_t at = 0; at < N; at += piece) {
        uint32_t n = piece < N - at ? piece : N - at;
        tm_row r = {.first = at, .tokens = tokens + at, .n = n, .seq = seq, .flags = CV_ROW_RETURN_LOGITS};
        int code = run(e, tm_step(step, &r, 1, NULL, 0), err);
        if (code) return code;
        memcpy(out + (size_t)at * TM_VOCAB, logits_of(0), (size_t)n * TM_VOCAB * sizeof(float));
    }
    return CV_OK;
}

static void test_pieces_and_batches(cv_checks *c, uint32_t compute, uint32_t kv_type, uint32_t threads, const uint32_t *tokens) {
    static float whole[N * TM_VOCAB], other[N * TM_VOCAB];
    tiny_model m;
    char err[256] = "";
    cv_engine *e = NULL;
    cv_case(c, "pieces of any size give the same bits over chunk edges");
    cv_check(c, tm_make(&m, compute, threads), "no tiny model");
    ((cv_plan *)(void *)m.plan)->kv_type = kv_type;
    int code = cv_open(m.plan, m.plan_size, NULL, &e, err, sizeof err);
    if (cv_check(c, !code, "open: %d %s", code, err)) {
        cv_check(c, !feed(e, tokens, 64, 0, whole, err), "%s", err);
        for (uint32_t piece = 1; piece < 40; piece += piece < 4 ? 1 : 7) {
            cv_check(c, !feed(e, tokens, piece, 1, other, err), "%s", err);
            cv_check(c, !memcmp(whole, other, sizeof whole), "pieces of %u differ", piece);
        }
    }
    cv_end_case(c);
    cv_case(c, "rows of a ragged batch give the bits that they have alone");
    uint32_t at[3] = {0, 0, 0}, pace[3] = {1, 5, 11};
    while (e && (at[0] < 40 || at[1] < N || at[2] < N)) {
        tm_row rows[3];
        uint32_t who[3], n_rows = 0;
        for (uint32_t i = 0; i < 3; i++) {
            uint32_t n = pace[i] < N - at[i] ? pace[i] : N - at[i];
            if (!n) continue;
            who[n_rows] = i;
            rows[n_rows++] = (tm_row){.first = at[i], .tokens = tokens + at[i], .n = n, .seq = i, .flags = CV_ROW_RETURN_LOGITS};
        }
        code = run(e, tm_step(step, rows, n_rows, NULL, 0), err);
        if (!cv_check(c, !code, "%d %s", code, err)) break;
        for (uint32_t i = 0; i < n_rows; i++) {
            cv_check(c, !memcmp(logits_of(i), whole + (size_t)at[who[i]] * TM_VOCAB, rows[i].n * TM_VOCAB * sizeof(float)), "row %u at %u differs", who[i], at[who[i]]);
            at[who[i]] += rows[i].n;
        }
    }
    cv_end_case(c);
    cv_case(c, "copied pages continue a sequence with the same bits");
    if (e) {
        cv_check(c, !feed(e, tokens, 16, 0, other, err), "%s", err);
        /* position 69 reads full pages 0…4 and chunked pages of chunk 64…: give sequence 2 all of them */
        cv_step_copy all[10];
        for (uint32_t i = 0; i < 5; i++) {
            all[2 * i] = (cv_step_copy){0, i, 12 + i, 0};
            all[2 * i + 1] = (cv_step_copy){1, i, 12 + i, 0};
        }
        tm_row r = {.first = N - 1, .tokens = tokens + N - 1, .n = 1, .seq = 2, .flags = CV_ROW_RETURN_LOGITS};
        code = run(e, tm_step(step, &r, 1, all, 10), err);
        cv_check(c, !code && !memcmp(logits_of(0), whole + (size_t)(N - 1) * TM_VOCAB, TM_VOCAB * sizeof(float)), "differs (%d %s)", code, err);
    }
    cv_end_case(c);
    cv_close(e);
    tm_free(&m);
}

static void test_sampling(cv_checks *c, const uint32_t *tokens) {
    tiny_model m;
    char err[256] = "";
    cv_engine *e = NULL;
    int count[TM_VOCAB] = {0};
    cv_case(c, "seeded draws follow the distribution, repeat, and do not depend on the batch");
    cv_check(c, tm_make(&m, CV_COMPUTE_EXACT, 1) && !cv_open(m.plan, m.plan_size, NULL, &e, err, sizeof err), "open: %s", err);
    float p[TM_VOCAB] = {0};
    for (uint64_t seed = 0; e && seed < 3000; seed++) {
        tm_row r = {.first = 0, .tokens = tokens, .n = 1, .seq = 0, .flags = CV_ROW_SAMPLE | CV_ROW_RETURN_LOGITS | CV_ROW_LOGPROB, .temperature = 1, .seed = seed, .top_logprobs = 3};
        int code = run(e, tm_step(step, &r, 1, NULL, 0), err);
        if (!cv_check(c, !code && row(0)->token < TM_VOCAB, "%d %s", code, err)) break;
        uint32_t token = row(0)->token;
        count[token]++;
        if (seed == 0) {
            double sum = 0;
            for (int i = 0; i < TM_VOCAB; i++) sum += (double)__builtin_expf(logits_of(0)[i]);
            for (int i = 0; i < TM_VOCAB; i++) p[i] = (float)((double)__builtin_expf(logits_of(0)[i]) / sum);
        }
        float expected = __builtin_logf(p[token]);
        cv_check(c, __builtin_fabsf(row(0)->logprob - expected) < 1e-4f, "logprob %g, expected %g", (double)row(0)->logprob, (double)expected);
        const cv_result_top *top = (const cv_result_top *)(const void *)(result + row(0)->top_offset);
        cv_check(c, row(0)->n_top == 3 && top[0].logprob >= top[1].logprob && top[1].logprob >= top[2].logprob, "alternatives out of order");
        if (seed % 500) continue;
        tm_row two[2] = {{.first = 0, .tokens = tokens + 1, .n = 3, .seq = 1, .flags = CV_ROW_SAMPLE, .temperature = 1, .seed = 9}, r};
        two[1].seq = 2;
        code = run(e, tm_step(step, two, 2, NULL, 0), err);
        cv_check(c, !code && row(1)->token == token, "in a batch %u, alone %u", code ? 0 : row(1)->token, token);
    }
    double chi = 0;
    int cells = 0;
    for (int i = 0; i < TM_VOCAB; i++) {
        double want = 3000.0 * (double)p[i];
        if (want < 5) continue;
        chi += (count[i] - want) * (count[i] - want) / want;
        cells++;
    }
    cv_check(c, cells > 3 && chi < 2.0 * cells + 20, "chi square %g over %d cells", chi, cells);
    cv_end_case(c);
    cv_case(c, "temperatures down to the smallest float choose the most probable token");
    static const float tiny[] = {1e-37f, 1.2e-38f, 1e-39f, 1e-40f, 1e-45f};
    for (size_t i = 0; e && i < sizeof tiny / sizeof tiny[0]; i++) {
        tm_row warm = {.first = 0, .tokens = tokens + 1, .n = 3, .seq = 1, .flags = CV_ROW_SAMPLE, .temperature = 2, .seed = 100 + i};
        tm_row cold = {.first = 0, .tokens = tokens, .n = 1, .seq = 0, .flags = CV_ROW_SAMPLE | CV_ROW_RETURN_LOGITS, .temperature = tiny[i], .seed = i};
        int code = run(e, tm_step(step, &warm, 1, NULL, 0), err); /* leaves other candidates in the scratch */
        if (!code) code = run(e, tm_step(step, &cold, 1, NULL, 0), err);
        if (!cv_check(c, !code, "%d %s", code, err)) break;
        uint32_t best = 0;
        for (uint32_t t = 1; t < TM_VOCAB; t++)
            if (logits_of(0)[t] > logits_of(0)[best]) best = t;
        cv_check(c, row(0)->token == best, "temperature %g gave %u, the best is %u", (double)tiny[i], row(0)->token, best);
    }
    cv_end_case(c);
    cv_case(c, "a tiny repetition penalty does not fail the step");
    if (e) {
        tm_row rows[2] = {{.first = 0, .tokens = tokens, .n = 1, .seq = 0, .flags = CV_ROW_SAMPLE | CV_ROW_RETURN_LOGITS | CV_ROW_LOGPROB}, {.first = 0, .tokens = tokens, .n = 1, .seq = 1, .flags = CV_ROW_SAMPLE}};
        size_t size = tm_step(step, rows, 2, NULL, 0), at = size;
        cv_step *head = (cv_step *)(void *)step;
        cv_step_row *r = (cv_step_row *)(void *)(step + sizeof(cv_step));
        for (uint32_t t = 0; t < TM_VOCAB; t++) *(cv_step_history *)(void *)(step + at + t * sizeof(cv_step_history)) = (cv_step_history){.token = t, .in_context = 1};
        r[0].history_offset = at;
        r[0].n_history = TM_VOCAB;
        r[0].repetition_penalty = 1e-40f;
        head->total_size = (at + TM_VOCAB * sizeof(cv_step_history) + 7) & ~(size_t)7;
        int code = run(e, head->total_size, err);
        cv_check(c, !code && row(0)->token < TM_VOCAB && row(1)->token < TM_VOCAB && row(0)->logprob <= 0 && row(0)->logprob > -10, "%d %s", code, code ? err : "tokens or logprob out of range");
    }
    cv_end_case(c);
    cv_case(c, "a step may use the token that the step before it sampled");
    if (e) {
        uint32_t last = CV_TOKEN_LAST;
        tm_row first = {.first = 0, .tokens = tokens, .n = 5, .seq = 0, .flags = CV_ROW_SAMPLE};
        tm_row next = {.first = 5, .tokens = &last, .n = 1, .seq = 0, .flags = CV_ROW_SAMPLE | CV_ROW_RETURN_LOGITS};
        int code = run(e, tm_step(step, &first, 1, NULL, 0), err);
        uint32_t sampled = code ? 0 : row(0)->token;
        code = run(e, tm_step(step, &next, 1, NULL, 0), err);
        float ahead[TM_VOCAB];
        memcpy(ahead, logits_of(0), sizeof ahead);
        next.tokens = &sampled;
        code = code ? code : run(e, tm_step(step, &next, 1, NULL, 0), err);
        cv_check(c, !code && !memcmp(ahead, logits_of(0), sizeof ahead), "differs (%d %s)", code, err);
    }
    cv_end_case(c);
    cv_close(e);
    tm_free(&m);
}

static void test_sample_all(cv_checks *c, const uint32_t *tokens) {
    tiny_model m;
    char err[256] = "";
    cv_engine *e = NULL;
    cv_case(c, "samples behind every token of a row are those of one token at a time, over chunk edges and in a batch");
    cv_check(c, tm_make(&m, CV_COMPUTE_FAST, 2) && !cv_open(m.plan, m.plan_size, NULL, &e, err, sizeof err), "open: %s", err);
    cv_result_top single[N];
    for (uint32_t i = 0; e && i < N; i++) {
        tm_row r = {.first = i, .tokens = tokens + i, .n = 1, .seq = 0, .flags = CV_ROW_SAMPLE | CV_ROW_LOGPROB, .temperature = i % 2 ? 0.9f : 0, .seed = 5};
        int code = run(e, tm_step(step, &r, 1, NULL, 0), err);
        if (!cv_check(c, !code, "%d %s", code, err)) break;
        single[i] = (cv_result_top){row(0)->token, row(0)->logprob};
    }
    for (uint32_t temperature = 0; e && temperature < 2; temperature++)
        for (uint32_t at = 0, n; at < N; at += n) {
            n = 9 < N - at ? 9 : N - at;
            tm_row rows[2] = {{.first = at, .tokens = tokens + at, .n = n, .seq = 1, .flags = CV_ROW_SAMPLE | CV_ROW_SAMPLE_ALL | CV_ROW_LOGPROB, .temperature = temperature ? 0.9f : 0, .seed = 5},
                              {.first = at, .tokens = tokens + at, .n = n, .seq = 2, .flags = CV_ROW_SAMPLE}};
            int code = run(e, tm_step(step, rows, 2, NULL, 0), err);
            if (!cv_check(c, !code && row(0)->n_top == n && row(1)->n_top == 0, "%d %s", code, err)) break;
            const cv_result_top *all = (const cv_result_top *)(const void *)(result + row(0)->top_offset);
            for (uint32_t i = 0; i < n; i++)
                if ((at + i) % 2 == temperature)
                    cv_check(c, all[i].token == single[at + i].token && all[i].logprob == single[at + i].logprob, "position %u: %u, alone %u", at + i, all[i].token, single[at + i].token);
            cv_check(c, row(0)->token == all[n - 1].token, "the last sample is the row's token");
        }
    cv_end_case(c);
    cv_case(c, "samples of all positions are refused with alternatives, without logits of all, or without a sample");
    if (e) {
        tm_row r = {.first = 0, .tokens = tokens, .n = 3, .seq = 0, .flags = CV_ROW_SAMPLE | CV_ROW_SAMPLE_ALL, .top_logprobs = 2};
        cv_check(c, run(e, tm_step(step, &r, 1, NULL, 0), err) == CV_E_ARGUMENT, "alternatives: %s", err);
        r.top_logprobs = 0;
        size_t size = tm_step(step, &r, 1, NULL, 0);
        ((cv_step_row *)(void *)(step + sizeof(cv_step)))->logits = CV_LOGITS_LAST;
        cv_check(c, run(e, size, err) == CV_E_ARGUMENT, "logits of the last: %s", err);
        r.flags = CV_ROW_SAMPLE_ALL;
        cv_check(c, run(e, tm_step(step, &r, 1, NULL, 0), err) == CV_E_ARGUMENT, "no sample: %s", err);
    }
    cv_end_case(c);
    cv_close(e);
    tm_free(&m);
}

static void test_failing_rows(cv_checks *c, const uint32_t *tokens) {
    tiny_model m;
    char err[256] = "";
    cv_engine *e = NULL;
    const uint32_t bad = TM_VOCAB - 1, last = CV_TOKEN_LAST;
    const float nan = __builtin_nanf("");
    cv_case(c, "a row whose logits are not numbers fails alone, and so does the next one that needs its token");
    bool made = tm_make(&m, CV_COMPUTE_FAST, 2);
    FILE *f = fopen(m.path, "r+b"); /* the embedding comes first */
    made = made && f && !fseek(f, (long)(bad * TM_HIDDEN * sizeof(float)), SEEK_SET) && fwrite(&nan, sizeof nan, 1, f) == 1;
    cv_check(c, f && !fclose(f) && made && !cv_open(m.plan, m.plan_size, NULL, &e, err, sizeof err), "open: %s", err);
    const uint32_t good[3] = {tokens[0] % bad, tokens[1] % bad, tokens[2] % bad};
    tm_row alone = {.first = 0, .tokens = good, .n = 3, .seq = 2, .flags = CV_ROW_SAMPLE}, then = {.first = 3, .tokens = &last, .n = 1, .seq = 2, .flags = CV_ROW_SAMPLE};
    uint32_t expected[2] = {0};
    if (e && !run(e, tm_step(step, &alone, 1, NULL, 0), err)) expected[0] = row(0)->token;
    if (e && !run(e, tm_step(step, &then, 1, NULL, 0), err)) expected[1] = row(0)->token;
    for (uint32_t i = 0; e && i < 3; i++) { /* the second step, then the first one again: a slot recovers */
        tm_row rows[2] = {{.first = i == 1 ? 3 : 0, .tokens = i == 1 ? &last : &bad, .n = 1, .seq = 0, .flags = CV_ROW_SAMPLE, .top_logprobs = 2}, i == 1 ? then : alone};
        if (i == 2) rows[0].tokens = good;
        rows[1].seq = 1;
        int code = run(e, tm_step(step, rows, 2, NULL, 0), err);
        if (!cv_check(c, !code, "step %u: %d %s", i, code, err)) break;
        static const uint32_t status[3] = {CV_ROW_NOT_A_NUMBER, CV_ROW_NO_TOKEN, CV_ROW_OK};
        cv_check(c, row(0)->status == status[i] && (i == 2) == (row(0)->token != CV_TOKEN_LAST) && (i == 2) == (row(0)->n_top == 2), "step %u: status %u, token %u", i, row(0)->status, row(0)->token);
        cv_check(c, row(1)->status == CV_ROW_OK && row(1)->token == expected[i % 2], "step %u: the other row has status %u, token %u, not %u", i, row(1)->status, row(1)->token, expected[i % 2]);
    }
    cv_end_case(c);
    cv_close(e);
    tm_free(&m);
}

static void test_tickets(cv_checks *c, const uint32_t *tokens) {
    tiny_model m;
    char err[256] = "";
    cv_engine *e = NULL;
    uint64_t ticket = 0, size = 0, first = 0;
    cv_case(c, "tickets: queue limit, small buffers, unknown tickets, abort");
    cv_check(c, tm_make(&m, CV_COMPUTE_EXACT, 2) && !cv_open(m.plan, m.plan_size, NULL, &e, err, sizeof err), "open: %s", err);
    tm_row r = {.first = 0, .tokens = tokens, .n = 60, .seq = 0, .flags = CV_ROW_RETURN_LOGITS};
    size_t n = tm_step(step, &r, 1, NULL, 0);
    int code = CV_OK, submitted = 0;
    while (e && submitted < 100000 && !(code = cv_submit(e, step, n, &ticket, err, sizeof err))) first = submitted++ ? first : ticket;
    cv_check(c, code == CV_E_BUSY && submitted >= 64, "%d after %d", code, submitted);
    while (e && (code = cv_collect(e, first, result, 8, &size, err, sizeof err)) == CV_E_AGAIN) usleep(100);
    cv_check(c, code == CV_E_BUFFER && size > 8, "a small buffer gives %d", code);
    cv_check(c, e && !cv_collect(e, first, result, RESULT, &size, err, sizeof err), "and then the result");
    cv_check(c, e && cv_collect(e, first, result, RESULT, &size, err, sizeof err) == CV_E_ARGUMENT, "which comes once");
    cv_abort(e);
    cv_check(c, e && cv_submit(e, step, n, &ticket, err, sizeof err) == CV_E_ABORTED, "no steps after abort");
    cv_close(e);
    cv_end_case(c);
    tm_free(&m);
}

/* Damage is done to whole fields (small changes, extremes) and to single bits. */
static void damage(uint8_t *bytes, size_t size, unsigned long long *seed) {
    static const uint64_t odd[] = {0, 1, 7, 0x7fffffff, 0x80000000u, 0xffffffffu, 0x100000000ull, 0x7fffffffffffffffull, 0xffffffffffffffffull};
    for (int k = 1 + (int)(cv_random(seed) % 3); k > 0; k--) {
        size_t at = (size_t)(cv_random(seed) % (size / 4)) * 4;
        uint64_t v = odd[cv_random(seed) % (sizeof odd / sizeof odd[0])];
        switch (cv_random(seed) % 3) {
        case 0: bytes[cv_random(seed) % size] ^= (uint8_t)(1u << cv_random(seed) % 8); break;
        case 1: memcpy(bytes + at, &v, 4); break;
        default: memcpy(bytes + at / 8 * 8, &v, at / 8 * 8 + 8 <= size ? 8 : 4);
        }
    }
}

static void test_damaged_plans(cv_checks *c, int rounds) {
    tiny_model m;
    unsigned long long seed = 7;
    int refused = 0, opened = 0;
    cv_case(c, "damaged load plans are refused or harmless");
    cv_check(c, tm_make(&m, CV_COMPUTE_FAST, 1), "no tiny model");
    uint8_t *copy = aligned_alloc(64, (m.plan_size + 63) / 64 * 64);
    for (int i = 0; i < rounds; i++) {
        char err[256] = "";
        cv_engine *e = NULL;
        memcpy(copy, m.plan, m.plan_size);
        damage(copy, m.plan_size, &seed);
        cv_plan *p = (cv_plan *)(void *)copy; /* a plan may ask for much memory: keep the test small */
        if (p->max_tokens > 4096 || p->max_rows > 4096 || p->max_logits > 4096 || p->n_full_pages > 1 << 20 || p->n_chunk_pages > 1 << 20 || p->n_threads > 8) continue;
        int code = cv_open(copy, m.plan_size, NULL, &e, err, sizeof err);
        if (code) {
            refused++;
            cv_check(c, !e && err[0], "code %d without a reason", code);
        } else {
            opened++;
            cv_close(e);
        }
    }
    cv_check(c, refused > rounds / 4 && opened > 0, "%d refused, %d opened", refused, opened);
    free(copy);
    cv_end_case(c);
    tm_free(&m);
}

static void test_damaged_steps(cv_checks *c, int rounds, const uint32_t *tokens) {
    tiny_model m;
    char err[256] = "";
    cv_engine *e = NULL;
    unsigned long long seed = 11;
    int refused = 0, computed = 0;
    cv_case(c, "damaged steps are refused or computed, never fatal");
    cv_check(c, tm_make(&m, CV_COMPUTE_FAST, 2) && !cv_open(m.plan, m.plan_size, NULL, &e, err, sizeof err), "open: %s", err);
    for (int i = 0; e && i < rounds; i++) {
        tm_row rows[2] = {{.first = 30, .tokens = tokens, .n = 5, .seq = 0, .flags = CV_ROW_SAMPLE, .temperature = 0.7f, .top_logprobs = 2}, {.first = 3, .tokens = tokens, .n = 1, .seq = 1, .flags = CV_ROW_SAMPLE}};
        size_t n = tm_step(step, rows, 2, NULL, 0);
        damage(step, n, &seed);
        err[0] = 0;
        int code = run(e, n, err);
        if (code) refused++;
        else computed++;
        cv_check(c, !code || err[0], "code %d without a reason", code);
    }
    cv_check(c, refused > rounds / 4 && computed > 0, "%d refused, %d computed", refused, computed);
    cv_close(e);
    cv_end_case(c);
    tm_free(&m);
}

static void test_damaged_files(cv_checks *c) {
    tiny_model m;
    char err[256] = "";
    cv_engine *e = NULL;
    cv_case(c, "a truncated, missing or foreign file is an error that names it");
    cv_check(c, tm_make(&m, CV_COMPUTE_FAST, 1), "no tiny model");
    cv_check(c, !truncate(m.path, (off_t)m.file_size - 4) && cv_open(m.plan, m.plan_size, NULL, &e, err, sizeof err) == CV_E_IO && strstr(err, m.path), "truncated: %s", err);
    unlink(m.path);
    cv_check(c, cv_open(m.plan, m.plan_size, NULL, &e, err, sizeof err) == CV_E_IO && strstr(err, m.path), "missing: %s", err);
    cv_check(c, cv_open(m.data, 4096, NULL, &e, err, sizeof err) == CV_E_PLAN, "not a plan: %s", err);
    cv_end_case(c);
    tm_free(&m);
}

static void test_loader(cv_checks *c) {
    tiny_model m;
    char err[256] = "";
    cv_engine *e = NULL;
    cv_loader *l = NULL;
    uint64_t done = 0;
    int code;
    cv_case(c, "loading in a thread of its own gives the engine, its progress, and its errors; it can be stopped");
    cv_check(c, tm_make(&m, CV_COMPUTE_FAST, 1) && !cv_load_start(m.plan, m.plan_size, NULL, &l, err, sizeof err), "start: %s", err);
    while ((code = cv_load_poll(l, &done, &e, err, sizeof err)) == CV_E_AGAIN) usleep(100);
    cv_check(c, !code && e && done >= m.file_size, "%d %s, %llu bytes", code, err, (unsigned long long)done);
    cv_close(e);
    cv_check(c, !cv_load_start(m.plan, m.plan_size, NULL, &l, err, sizeof err), "start: %s", err);
    cv_load_cancel(l);
    e = NULL;
    while ((code = cv_load_poll(l, &done, &e, err, sizeof err)) == CV_E_AGAIN) usleep(100);
    cv_check(c, code == CV_E_ABORTED || !code, "stopped: %d %s", code, err); /* it may have been faster */
    cv_close(e);
    unlink(m.path);
    cv_check(c, !cv_load_start(m.plan, m.plan_size, NULL, &l, err, sizeof err), "start: %s", err);
    while ((code = cv_load_poll(l, &done, &e, err, sizeof err)) == CV_E_AGAIN) usleep(100);
    cv_check(c, code == CV_E_IO && strstr(err, m.path), "missing file: %d %s", code, err);
    cv_end_case(c);
    tm_free(&m);
}

static void test_wide_matrix(cv_checks *c) {
    cv_case(c, "the CPU backend refuses a matrix that is wider than its inputs");
    static const float weights[4 * 48], x[48];
    float h[4] = {7};
    char err[256] = "";
    cv_backend *b = NULL;
    const cv_shape s = {.hidden = 32, .head_dim = 16, .vocab = 16, .page_tokens = 16, .max_tokens = 1, .max_logits = 1, .max_heads = 2, .max_kv_heads = 1, .max_ff = 64, .kv_type = CV_F32, .norm_eps = 1e-5f,
                        .qk_norm_eps = 1e-5f, .exact = true, .inv_freq = x, .n_threads = 1};
    cv_weight w = {.format = CV_FORMAT_F32, .experts = 1, .rows = 4, .cols = 48, .data = (const uint8_t *)weights, .row_bytes = sizeof weights / 4, .expert_bytes = sizeof weights};
    const uint32_t zero = 0;
    const uint64_t position = 0;
    const cv_seq seq = {.n_tokens = 1, .full_pages = &zero, .n_full_pages = 1};
    const cv_batch batch = {.n_seqs = 1, .n_tokens = 1, .seqs = &seq, .tokens = &zero, .positions = &position, .token_seq = &zero};
    if (cv_check(c, !cv_backend_cpu_open(&s, &b, err, sizeof err) && !b->ops->begin(b, &batch), "open: %s", err)) {
        cv_check(c, b->ops->linear(b, x, &w, NULL, false, h) == CV_E_ARGUMENT && h[0] == 7, "48 columns were taken");
        w.cols = 32;
        cv_check(c, !b->ops->linear(b, x, &w, NULL, false, h) && h[0] == 0, "32 columns were refused");
    }
    if (b) b->ops->close(b);
    cv_end_case(c);
}

int main(void) {
    cv_checks c = {0};
    uint32_t tokens[N];
    unsigned long long seed = 3;
    for (int i = 0; i < N; i++) tokens[i] = (uint32_t)(cv_random(&seed) % TM_VOCAB);
    result = aligned_alloc(64, RESULT);
    test_pieces_and_batches(&c, CV_COMPUTE_EXACT, CV_F32, 1, tokens);
    test_pieces_and_batches(&c, CV_COMPUTE_FAST, CV_BF16, 2, tokens);
    test_pieces_and_batches(&c, CV_COMPUTE_FAST, CV_Q8, 2, tokens);
    test_sampling(&c, tokens);
    test_sample_all(&c, tokens);
    test_failing_rows(&c, tokens);
    test_tickets(&c, tokens);
    test_damaged_plans(&c, 3000);
    test_damaged_steps(&c, 3000, tokens);
    test_damaged_files(&c);
    test_loader(&c);
    test_wide_matrix(&c);
    free(result);
    return cv_report(&c);
}
