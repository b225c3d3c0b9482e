/* step.c — the tables that a step's kernels read (tokens, angles, tiles, page lists), and its begin and end. */
#include "operations.h"

#include <math.h>

int cv_metal_grow_pages(cv_metal *m, size_t n) {
    cv_metal_tables *s = &m->step;
    if (n <= s->room_pages) return CV_OK;
    size_t room = s->room_pages ? s->room_pages : CV_METAL_FIRST_PAGES;
    while (room < n) room *= 2;
    void *pages;
    int code = cv_metal_alloc(m->d, room * sizeof *s->pages, &pages, (cv_err){NULL, 0});
    if (code) return code;
    cv_metal_free(m->d, s->pages);
    m->base.scratch_bytes += (room - s->room_pages) * sizeof *s->pages;
    s->pages = pages;
    s->room_pages = room;
    return CV_OK;
}

/* As the kernel's keys_of_part. */
static size_t parts_of(size_t keys) {
    size_t blocks = cut(keys, CV_ATTN_SPLIT_KEYS), size = CV_ATTN_SPLIT_KEYS * cut(blocks, CV_ATTN_SPLITS);
    return cut(keys, size);
}

/* The angle is the float32 product of position and frequency, as in the CPU backend. */
static void fill_token(cv_metal *m, size_t t, const uint32_t first_page[2]) {
    const cv_shape *s = m->base.shape;
    const cv_batch *b = m->batch;
    const cv_seq *seq = &b->seqs[b->token_seq[t]];
    uint64_t position = b->positions[t], start = s->chunk ? position / s->chunk * s->chunk : 0;
    cv_token *token = &m->step.tokens[t];
    *token = (cv_token){.id = b->tokens[t], .temperature = 1, .first_page = {first_page[0], first_page[1]}, .keys = {(uint32_t)(position + 1), (uint32_t)(position - start + 1)}};
    if (s->chunk && start >= seq->chunk_base) token->first_page[1] += (uint32_t)((start - seq->chunk_base) / s->page_tokens);
    if (s->floor_scale > 0) token->temperature = (float)(1.0 + (double)s->attn_scale * log(1.0 + floor(((double)position + 1.0) / (double)s->floor_scale)));
    size_t half = s->head_dim / 2;
    for (size_t j = 0; j < half; j++) {
        float angle = (float)position * s->inv_freq[j];
        m->step.cosines[t * half + j] = (float)cos((double)angle);
        m->step.sines[t * half + j] = (float)sin((double)angle);
    }
    for (size_t pool = 0; pool < 2; pool++) {
        cv_metal_tables *tables = &m->step;
        tables->n_parts[pool] = most(tables->n_parts[pool], parts_of(token->keys[pool]));
        cv_tile *last = tables->n_tiles[pool] ? &tables->tiles[pool][tables->n_tiles[pool] - 1] : NULL;
        bool follows = t > 0 && last && b->token_seq[t - 1] == b->token_seq[t] && last->n < CV_ATTN_TILE && token->keys[pool] == m->step.tokens[t - 1].keys[pool] + 1;
        if (follows) last->n++;
        else tables->tiles[pool][tables->n_tiles[pool]++] = (cv_tile){(uint32_t)t, 1};
    }
}

/* Never fails by itself: what is wrong is said by the operations after it and, in words, by finish. */
int cv_metal_op_begin(cv_backend *b, const cv_batch *batch) {
    cv_metal *m = self(b);
    cv_metal_tables *s = &m->step;
    m->batch = batch;
    if (cv_metal_begin(m->d)) return CV_OK;
    size_t n = 0;
    for (size_t i = 0; i < batch->n_seqs; i++) {
        n += batch->seqs[i].n_full_pages + batch->seqs[i].n_chunk_pages;
        if (batch->seqs[i].first_position + batch->seqs[i].n_tokens > UINT32_MAX) cv_metal_refuse(m->d, CV_E_UNSUPPORTED, "the Metal kernels count positions with 32 bits");
    }
    if (cv_metal_grow_pages(m, most(n, 1))) cv_metal_refuse(m->d, CV_E_MEMORY, "no memory for the step's page table");
    if (cv_metal_failed(m->d)) return CV_OK;
    s->n_pages = 0;
    memset(s->n_tiles, 0, sizeof s->n_tiles);
    memset(s->n_parts, 0, sizeof s->n_parts);
    for (size_t i = 0; i < batch->n_seqs; i++) {
        const cv_seq *seq = &batch->seqs[i];
        const uint32_t first[2] = {(uint32_t)s->n_pages, (uint32_t)(s->n_pages + seq->n_full_pages)};
        memcpy(s->pages + s->n_pages, seq->full_pages, seq->n_full_pages * sizeof *s->pages);
        memcpy(s->pages + first[1], seq->chunk_pages, seq->n_chunk_pages * sizeof *s->pages);
        s->n_pages += seq->n_full_pages + seq->n_chunk_pages;
        for (size_t t = seq->first_token; t < seq->first_token + seq->n_tokens; t++) fill_token(m, t, first);
    }
    return CV_OK;
}

int cv_metal_op_finish(cv_backend *b, char *err, size_t err_size) {
    cv_metal *m = self(b);
    m->batch = NULL;
    return cv_metal_finish(m->d, &b->joined, (cv_err){err, err_size});
}

/* Of long steps the GPU's time is long beside a hand-over's, and it need not wait for the host: only few tokens' numbers are taken along. */
int cv_metal_op_join(cv_backend *b, const cv_host_work *work, float *x, size_t n) { return cv_metal_join(self(b)->d, work, x, n, CV_FEW * b->shape->hidden); }
