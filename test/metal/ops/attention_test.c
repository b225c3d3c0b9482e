/* attention_test.c — rotation, cache writes and attention of the Metal backend against double precision: head dims, groups, page
 * sizes, chunks, ragged batches, contexts that are split, caches of 8 bits. Arguments: how many rounds of random
 * shapes; `short`: nothing but those, and nothing after a case that fails. */
#include "reference.h"

enum { MOST_PAGES = 1024 };

typedef struct {
    size_t head_dim, n_kv, group, page_tokens, chunk;
    uint32_t type, flags; /* type: of activations, and of the cache unless it has 8 bits */
    bool interleaved, q8, by_hand; /* by_hand: what is in the cache before the compared step was not computed, but is random */
    size_t n_seqs;
    size_t before[3], now[3]; /* by sequence: tokens in the cache, tokens of the compared step */
} attention_case;

typedef struct {
    op_world w;
    const attention_case *a;
    cv_kv_layer cpu_kv, gpu_kv;
    size_t cache_bytes;
    uint32_t page_lists[3][MOST_PAGES];
    float *q, *k, *v, *out_cpu;     /* reference's */
    float *before;                  /* queries before they are rotated */
    void *gq, *gk, *gv, *out_gpu;   /* Metal's, typed */
} bench;

enum { FILL_TOKENS = 24 }; /* of a sequence in a step that fills the cache */

static size_t pages_of(const attention_case *a, size_t tokens) { return (tokens + a->page_tokens - 1) / a->page_tokens; }

/* Caches of all pages for both, and a shuffled page list for each sequence. */
static void open_bench(bench *b, op_context *c, const attention_case *a) {
    uint32_t kv_type = a->q8 ? CV_Q8 : a->type, cpu_type = a->q8 ? CV_Q8 : CV_F32;
    size_t pages = 0, head = a->page_tokens * cv_kv_token_elements(kv_type, a->head_dim), page = 2 * a->n_kv * head;
    uint32_t order[MOST_PAGES];
    memset(b, 0, sizeof *b);
    b->a = a;
    size_t most = 0, fill = a->by_hand ? 0 : FILL_TOKENS * a->n_seqs; /* tokens of a step */
    for (size_t i = 0; i < a->n_seqs; i++) {
        pages += pages_of(a, a->before[i] + a->now[i]);
        most += a->now[i];
    }
    if (most < fill) most = fill;
    for (uint32_t i = 0; i < pages; i++) order[i] = i;
    for (size_t i = pages; i > 1; i--) {
        size_t j = op_below(c, i);
        uint32_t t = order[i - 1];
        order[i - 1] = order[j];
        order[j] = t;
    }
    for (size_t i = 0, at = 0; i < a->n_seqs; i++) {
        size_t n = pages_of(a, a->before[i] + a->now[i]);
        memcpy(b->page_lists[i], order + at, n * sizeof *order);
        at += n;
    }
    size_t element = cv_kv_element_bytes(kv_type), cpu_element = cv_kv_element_bytes(cpu_type);
    char *cpu = op_pages(pages * page * cpu_element), *gpu = op_pages(pages * page * element);
    b->cache_bytes = pages * page * element;
    b->cpu_kv = (cv_kv_layer){cpu, cpu + page / 2 * cpu_element, page, head};
    b->gpu_kv = (cv_kv_layer){gpu, gpu + page / 2 * element, page, head};
    size_t heads = a->n_kv * a->group;
    cv_shape s = {.hidden = 64, .head_dim = a->head_dim, .vocab = 16, .page_tokens = a->page_tokens, .chunk = a->chunk, .max_tokens = most, .max_logits = 1, .max_heads = heads, .max_kv_heads = a->n_kv,
                  .max_ff = 64, .kv_type = kv_type, .act_type = a->type, .norm_eps = 1e-5f, .qk_norm_eps = 1e-5f, .attn_scale = 0.1f, .floor_scale = 16, .rope_interleaved = a->interleaved, .exact = a->type == CV_F32};
    const cv_memory shared = {gpu, pages * page * element};
    op_open(&b->w, c, &s, &shared, 1);
    if (!b->w.gpu) return;
    b->w.exact.kv_type = cpu_type;
    b->w.type = a->type;
    size_t q = most * heads * a->head_dim * sizeof(float);
    b->q = op_alloc(b->w.cpu, q);
    b->k = op_alloc(b->w.cpu, q);
    b->v = op_alloc(b->w.cpu, q);
    b->out_cpu = op_alloc(b->w.cpu, q);
    b->before = op_alloc(b->w.cpu, q);
    b->gq = op_alloc(b->w.gpu, q);
    b->gk = op_alloc(b->w.gpu, q);
    b->gv = op_alloc(b->w.gpu, q);
    b->out_gpu = op_alloc(b->w.gpu, q);
}

/* n[i] new tokens of each sequence from position first[i] on. */
static size_t make_batch(bench *b, const size_t *first, const size_t *n) {
    op_world *w = &b->w;
    size_t total = 0;
    for (size_t i = 0; i < b->a->n_seqs; i++) {
        size_t pages = pages_of(b->a, first[i] + n[i]), start = b->a->chunk ? first[i] / b->a->chunk * b->a->chunk : 0, skipped = start / b->a->page_tokens;
        w->seqs[i] = (cv_seq){.first_position = first[i], .n_tokens = n[i], .first_token = total, .full_pages = b->page_lists[i], .n_full_pages = pages, .chunk_pages = b->page_lists[i] + skipped,
                              .n_chunk_pages = pages - skipped, .chunk_base = start};
        for (size_t t = 0; t < n[i]; t++, total++) {
            w->tokens[total] = 0;
            w->positions[total] = first[i] + t;
            w->token_seq[total] = (uint32_t)i;
        }
    }
    w->batch = (cv_batch){.n_seqs = b->a->n_seqs, .n_tokens = total, .seqs = w->seqs, .tokens = w->tokens, .positions = w->positions, .token_seq = w->token_seq};
    return total;
}

static int store(bench *b, size_t n) {
    const attention_case *a = b->a;
    size_t heads = a->n_kv * a->group, d = a->head_dim;
    op_fill(b->w.c, a->type, b->q, n * heads * d);
    op_fill(b->w.c, a->type, b->k, n * a->n_kv * d);
    op_fill(b->w.c, a->type, b->v, n * a->n_kv * d);
    memcpy(b->before, b->q, n * heads * d * sizeof *b->q);
    op_encode(a->type, b->q, b->gq, n * heads * d);
    op_encode(a->type, b->k, b->gk, n * a->n_kv * d);
    op_encode(a->type, b->v, b->gv, n * a->n_kv * d);
    return b->w.cpu->ops->rope_store(b->w.cpu, a->flags, heads, a->n_kv, b->q, b->k, b->v, &b->cpu_kv) | b->w.gpu->ops->rope_store(b->w.gpu, a->flags, heads, a->n_kv, b->gq, b->gk, b->gv, &b->gpu_kv);
}

/* Both caches of 8 bits have the same scales and codes, but for a few codes that rounding in the last place moves by one: a code in a thousand;
 * with fast math one in 250, since values of few bits lie exactly between two codes (half the largest is 63.5) and a division that is off in its last place
 * decides these the other way. Both get Metal's then: attention is compared over the same cache. */
static void compare_codes(bench *b) {
    const attention_case *a = b->a;
    size_t token = cv_kv_token_elements(CV_Q8, a->head_dim), moved = 0, n = 0;
    char *cpu = b->cpu_kv.k;
    const char *gpu = b->gpu_kv.k;
    double worst = 0;
    for (size_t at = 0; at < b->cache_bytes; at += token) {
        const float *x = (const float *)(const void *)(cpu + at + a->head_dim), *y = (const float *)(const void *)(gpu + at + a->head_dim);
        for (size_t i = 0; i < a->head_dim / 32; i++) worst = fmax(worst, fabs((double)x[i] - y[i]) / (fabs((double)x[i]) + 1e-30));
        for (size_t i = 0; i < a->head_dim; i++, n++) {
            int by = abs((int)(int8_t)cpu[at + i] - (int)(int8_t)gpu[at + i]);
            cv_check(&b->w.c->checks, by <= 1, "code %zu: %d, should be %d", at + i, gpu[at + i], cpu[at + i]);
            moved += by > 0;
        }
    }
    cv_check(&b->w.c->checks, worst <= 1e-6 && moved <= n / (getenv("FAKEMETAL_FAST_MATH") ? 250 : 1000), "scales differ by %g of them, %zu of %zu codes by one", worst, moved, n);
    memcpy(cpu, gpu, b->cache_bytes);
}

/* Random keys and values, the same in both caches; of 8 bits: codes with scales of about 1/127. */
static void fill_by_hand(bench *b) {
    const attention_case *a = b->a;
    size_t element = cv_kv_element_bytes(a->q8 ? CV_Q8 : a->type), n = b->cache_bytes / element;
    char *gpu = b->gpu_kv.k;
    float *cpu = b->cpu_kv.k;
    if (a->q8) {
        for (size_t at = 0; at < n; at += cv_kv_token_elements(CV_Q8, a->head_dim)) {
            for (size_t i = 0; i < a->head_dim; i++) gpu[at + i] = (char)(int)(op_number(b->w.c) * 127.0f);
            for (size_t i = 0; i < a->head_dim / 32; i++) ((float *)(void *)(gpu + at + a->head_dim))[i] = (1.0f + 0.5f * op_number(b->w.c)) / 127.0f;
        }
        memcpy(cpu, gpu, n);
        return;
    }
    op_fill(b->w.c, a->type, cpu, n);
    op_encode(a->type, cpu, gpu, n);
}

/* Puts double precision in the place of the CPU's rotated queries, and of what attention makes of them over the CPU's cache. */
static void take_reference(bench *b, size_t n, float *rotated) {
    const attention_case *a = b->a;
    size_t heads = a->n_kv * a->group, d = a->head_dim;
    double *q = ref_room(n * heads * d), *out = ref_room(n * heads * d);
    for (size_t i = 0; i < n * heads; i++) {
        size_t t = i / heads, head = i % heads, s = b->w.token_seq[t];
        uint64_t last = b->w.positions[t], first = a->flags & CV_LAYER_CHUNKED && a->chunk ? last / a->chunk * a->chunk : 0;
        ref_rotate(&b->w, a->flags, last, b->before + i * d, q + i * d);
        ref_attend(&b->w, &b->cpu_kv, a->q8 ? CV_Q8 : CV_F32, b->page_lists[s], head / a->group, first, last, b->q + i * d, out + i * d);
    }
    memcpy(rotated, b->q, n * heads * d * sizeof *rotated);
    ref_take(&b->w, "rotated queries", rotated, q, n * heads * d);
    ref_take(&b->w, "attention", b->out_cpu, out, n * heads * d);
    free(q);
    free(out);
}

/* Fills the cache in steps, then compares rotated queries and attention of the last step. */
static void run_case(op_context *c, const attention_case *a) {
    bench b;
    size_t filled[3] = {0}, n[3], heads = a->n_kv * a->group;
    open_bench(&b, c, a);
    if (b.w.gpu && a->by_hand) {
        fill_by_hand(&b);
        memcpy(filled, a->before, sizeof filled);
    }
    while (b.w.gpu && !a->by_hand && !c->checks.broken) {
        bool more = false;
        for (size_t i = 0; i < a->n_seqs; i++) {
            n[i] = a->before[i] - filled[i];
            if (n[i] > FILL_TOKENS) n[i] = FILL_TOKENS;
            more = more || n[i];
        }
        if (!more) break;
        size_t total = make_batch(&b, filled, n);
        if (!op_begin(&b.w) || !op_finish(&b.w, store(&b, total))) break;
        for (size_t i = 0; i < a->n_seqs; i++) filled[i] += n[i];
    }
    size_t total = b.w.gpu ? make_batch(&b, filled, a->now) : 0;
    if (total && !c->checks.broken && op_begin(&b.w)) {
        int code = store(&b, total);
        if (a->q8 && op_finish(&b.w, code)) {
            compare_codes(&b);
            code = !op_begin(&b.w);
        }
        if (!code) code = b.w.cpu->ops->attention(b.w.cpu, a->flags, heads, a->n_kv, b.q, &b.cpu_kv, b.out_cpu) | b.w.gpu->ops->attention(b.w.gpu, a->flags, heads, a->n_kv, b.gq, &b.gpu_kv, b.out_gpu);
        if (op_finish(&b.w, code)) {
            double bound = op_bound(a->type);
            take_reference(&b, total, b.before);
            op_compare(&b.w, "rotated queries", a->type, b.gq, b.before, total * heads * a->head_dim, bound);
            op_compare(&b.w, "attention", a->type, b.out_gpu, b.out_cpu, total * heads * a->head_dim, 2 * bound);
        }
    }
    op_close(&b.w);
}

static void run_named(op_context *c, const char *what, const attention_case *a) {
    char name[224];
    snprintf(name, sizeof name, "%s%s%s, head dim %zu, %zu x %zu heads, pages of %zu, chunk %zu, flags %u, %zu sequences, %zu + %zu tokens in the first", what, op_type(a->type), a->q8 ? ", 8-bit cache" : "", a->head_dim, a->n_kv,
             a->group, a->page_tokens, a->chunk, a->flags, a->n_seqs, a->before[0], a->now[0]);
    cv_case(&c->checks, name);
    run_case(c, a);
    cv_end_case(&c->checks);
}

/* Heads of real models and of their slices for 2, 4 and 8 ranks: 16 rows of a batch, and a piece of a prompt. SmolLM2's 3 key heads have
 * slices of 1 and 2. */
static void run_models(op_context *c) {
    static const struct {
        const char *name;
        size_t kv_heads, group, head_dim;
        bool llama4;
    } models[] = {{"SmolLM2 135M: ", 3, 3, 64, false}, {"Llama 3 8B: ", 8, 4, 128, false}, {"Llama 3 70B: ", 8, 8, 128, false}, {"Llama 4 Scout: ", 8, 5, 128, true}, {"Llama 4 Maverick: ", 8, 5, 128, true}};
    static const uint32_t types[] = {CV_BF16, CV_F16, CV_F32};
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++)
        for (size_t kv = models[i].kv_heads, k = i; kv; kv = kv == 3 ? 2 : kv / 2, k++) {
            bool scout = i == 3, narrow = kv <= 2, chunked = models[i].llama4 && k % 2;
            uint32_t flags = models[i].llama4 && !chunked ? CV_LAYER_TEMPERATURE : CV_LAYER_ROPE | (chunked ? CV_LAYER_CHUNKED : 0) | (scout ? CV_LAYER_QK_NORM : 0);
            attention_case a = {.head_dim = models[i].head_dim, .n_kv = kv, .group = models[i].group, .page_tokens = 64, .chunk = models[i].llama4 ? 8192 : 0, .type = types[k % 3], .flags = flags,
                                .interleaved = models[i].llama4, .q8 = k % 4 == 3, .by_hand = true, .n_seqs = 3, .before = {300, narrow && chunked ? 8190 : 130, 5}, .now = {6, 5, 5}};
            run_named(c, models[i].name, &a);
            a.now[0] = 40; /* a piece of a prompt beside them */
            if (narrow) run_named(c, models[i].name, &a);
        }
}

/* The longest pieces of prompts, from the start and over a chunk's edge, and contexts whose parts have more than 256 keys. */
static void run_long(op_context *c) {
    static const attention_case all[] = {
        {.head_dim = 32, .n_kv = 1, .group = 1, .page_tokens = 64, .type = CV_F16, .flags = CV_LAYER_ROPE, .by_hand = true, .n_seqs = 1, .now = {2048}},
        {.head_dim = 32, .n_kv = 1, .group = 1, .page_tokens = 64, .chunk = 8192, .type = CV_BF16, .flags = CV_LAYER_CHUNKED | CV_LAYER_ROPE | CV_LAYER_QK_NORM, .interleaved = true, .by_hand = true, .n_seqs = 1, .before = {7168}, .now = {2048}},
        {.head_dim = 32, .n_kv = 1, .group = 1, .page_tokens = 64, .type = CV_F32, .q8 = true, .flags = CV_LAYER_TEMPERATURE, .by_hand = true, .n_seqs = 2, .before = {500, 0}, .now = {1024, 1024}},
        {.head_dim = 64, .n_kv = 1, .group = 5, .page_tokens = 128, .type = CV_BF16, .flags = CV_LAYER_TEMPERATURE, .by_hand = true, .n_seqs = 3, .before = {40000, 16383, 20000}, .now = {1, 2, 1}},
        {.head_dim = 128, .n_kv = 1, .group = 5, .page_tokens = 128, .type = CV_F32, .q8 = true, .flags = CV_LAYER_TEMPERATURE, .by_hand = true, .n_seqs = 2, .before = {33000, 70}, .now = {1, 1}},
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) run_named(c, "", &all[i]);
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    op_context c = {.random = 88172645463325252ull};
    static const uint32_t types[] = {CV_F32, CV_F16, CV_BF16};
    static const size_t dims[] = {16, 32, 64, 128}, groups[] = {1, 3, 4, 5, 8, 10}, pages[] = {16, 32, 64, 128};
    enum { CASES = 24 + 18 }; /* the last ones with a cache of 8 bits */
    for (int round = 0; round < rounds; round++)
        for (size_t i = 0; i < CASES && !(argc > 2 && c.checks.failed); i++) {
            size_t chunk = i % 3 == 2 ? 128 : 0, long_one = i % 8 == 3 ? 700 + op_below(&c, 400) : op_below(&c, 90);
            attention_case a = {.head_dim = dims[i < 24 ? i % 4 : 1 + i % 3], .n_kv = 1 + op_below(&c, 2), .group = groups[op_below(&c, 6)], .page_tokens = pages[op_below(&c, 4)], .chunk = chunk, .type = types[i < 24 ? i / 4 % 3 : i / 3 % 3],
                                .flags = (chunk ? CV_LAYER_CHUNKED : 0) | (i & 1 ? CV_LAYER_ROPE : 0) | (i & 2 ? CV_LAYER_QK_NORM : 0) | (i & 4 ? CV_LAYER_TEMPERATURE : 0), .interleaved = op_below(&c, 2), .q8 = i >= 24,
                                .n_seqs = 1 + op_below(&c, 3)};
            bool few = i % 8 == 3 ? i & 8 : op_below(&c, 2); /* long contexts: some split, some in tiles */
            for (size_t s = 0; s < a.n_seqs; s++) {
                a.before[s] = s ? op_below(&c, 40) : long_one;
                a.now[s] = few ? 1 + op_below(&c, 3) : 12 + op_below(&c, 20);
            }
            run_named(&c, "", &a);
        }
    if (argc < 3) {
        run_models(&c);
        run_long(&c);
    }
    return cv_report(&c.checks);
}
