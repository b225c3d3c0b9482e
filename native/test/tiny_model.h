/* tiny_model.h — a small random model with everything that Llama 4 has (full and chunked layers, dense ones and ones with
 * experts, in turn), as a load plan over a file in the temporary folder; and steps for it. For tests of the engine. */
#ifndef CV_TINY_MODEL_H
#define CV_TINY_MODEL_H

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../include/caravan.h"
#include "check.h"

enum { TM_HIDDEN = 64, TM_HEADS = 4, TM_KV = 2, TM_D = 32, TM_FF = 128, TM_EXPERTS = 4, TM_VOCAB = 96, TM_CHUNK = 32, TM_PAGE = 16, TM_PAGES = 24, TM_MOST_LAYERS = 8 };

typedef struct {
    char path[64];
    uint64_t file_size;
    uint8_t *plan; /* 8-aligned */
    size_t plan_size;
    /* building */
    cv_plan_tensor tensors[TM_MOST_LAYERS * 20];
    size_t n_tensors;
    float *data;
    size_t n_data;
} tiny_model;

static inline void tm_add(tiny_model *m, unsigned long long *seed, uint32_t slot, int32_t layer, size_t experts, size_t rows, size_t cols, float mean, float spread) {
    size_t n = experts * rows * cols;
    m->data = realloc(m->data, (m->n_data + n) * sizeof(float));
    cv_plan_tensor *t = &m->tensors[m->n_tensors++];
    memset(t, 0, sizeof *t);
    t->slot = slot;
    t->layer = layer;
    t->format = CV_FORMAT_F32;
    t->experts = experts;
    t->rows = rows;
    t->cols = cols;
    t->weight = (cv_plan_source){.file = 0, .offset = m->n_data * sizeof(float), .outer_stride = rows * cols * sizeof(float), .row_stride = cols * sizeof(float)};
    t->scales.file = t->biases.file = t->global_scale.file = CV_NO_FILE;
    for (size_t i = 0; i < n; i++) m->data[m->n_data + i] = mean + spread * ((float)(cv_random(seed) >> 40) / 8388608.0f - 1.0f);
    m->n_data += n;
}

/* biases: dense layers have additive vectors, too. */
static inline bool tm_make_layers(tiny_model *m, uint32_t compute, uint32_t threads, uint32_t n_layers, bool biases) {
    *m = (tiny_model){0};
    unsigned long long seed = 42;
    float s = 0.2f;
    tm_add(m, &seed, CV_T_EMBED, -1, 1, TM_VOCAB, TM_HIDDEN, 0, 1);
    tm_add(m, &seed, CV_T_FINAL_NORM, -1, 1, 1, TM_HIDDEN, 1, 0.1f);
    tm_add(m, &seed, CV_T_HEAD, -1, 1, TM_VOCAB, TM_HIDDEN, 0, s);
    for (int32_t i = 0; i < (int32_t)n_layers; i++) {
        tm_add(m, &seed, CV_T_ATTN_NORM, i, 1, 1, TM_HIDDEN, 1, 0.1f);
        tm_add(m, &seed, CV_T_FFN_NORM, i, 1, 1, TM_HIDDEN, 1, 0.1f);
        tm_add(m, &seed, CV_T_Q, i, 1, TM_HEADS * TM_D, TM_HIDDEN, 0, s);
        tm_add(m, &seed, CV_T_K, i, 1, TM_KV * TM_D, TM_HIDDEN, 0, s);
        tm_add(m, &seed, CV_T_V, i, 1, TM_KV * TM_D, TM_HIDDEN, 0, s);
        tm_add(m, &seed, CV_T_O, i, 1, TM_HIDDEN, TM_HEADS * TM_D, 0, s);
        if (i % 2 == 0) {
            tm_add(m, &seed, CV_T_GATE, i, 1, TM_FF, TM_HIDDEN, 0, s);
            tm_add(m, &seed, CV_T_UP, i, 1, TM_FF, TM_HIDDEN, 0, s);
            tm_add(m, &seed, CV_T_DOWN, i, 1, TM_HIDDEN, TM_FF, 0, s);
            static const uint32_t slots[] = {CV_T_Q_BIAS, CV_T_K_BIAS, CV_T_V_BIAS, CV_T_O_BIAS, CV_T_GATE_BIAS, CV_T_UP_BIAS, CV_T_DOWN_BIAS};
            static const size_t sizes[] = {TM_HEADS * TM_D, TM_KV * TM_D, TM_KV * TM_D, TM_HIDDEN, TM_FF, TM_FF, TM_HIDDEN};
            for (size_t b = 0; biases && b < 7; b++) tm_add(m, &seed, slots[b], i, 1, 1, sizes[b], 0, s);
            continue;
        }
        tm_add(m, &seed, CV_T_ROUTER, i, 1, TM_EXPERTS, TM_HIDDEN, 0, s);
        tm_add(m, &seed, CV_T_EXPERT_GATE, i, TM_EXPERTS, TM_FF, TM_HIDDEN, 0, s);
        tm_add(m, &seed, CV_T_EXPERT_UP, i, TM_EXPERTS, TM_FF, TM_HIDDEN, 0, s);
        tm_add(m, &seed, CV_T_EXPERT_DOWN, i, TM_EXPERTS, TM_HIDDEN, TM_FF, 0, s);
        tm_add(m, &seed, CV_T_SHARED_GATE, i, 1, TM_FF, TM_HIDDEN, 0, s);
        tm_add(m, &seed, CV_T_SHARED_UP, i, 1, TM_FF, TM_HIDDEN, 0, s);
        tm_add(m, &seed, CV_T_SHARED_DOWN, i, 1, TM_HIDDEN, TM_FF, 0, s);
    }
    strcpy(m->path, "/tmp/caravan-tiny-XXXXXX");
    int fd = mkstemp(m->path);
    m->file_size = m->n_data * sizeof(float);
    if (fd < 0 || write(fd, m->data, m->file_size) != (ssize_t)m->file_size) return false;
    close(fd);
    size_t at = sizeof(cv_plan), files = at, layers = files + sizeof(cv_plan_file), tensors = layers + n_layers * sizeof(cv_plan_layer);
    size_t freq = tensors + m->n_tensors * sizeof(cv_plan_tensor), path = freq + TM_D / 2 * sizeof(float), size = path + 64;
    m->plan = calloc(1, size);
    m->plan_size = size;
    cv_plan *p = (cv_plan *)(void *)m->plan;
    *p = (cv_plan){.magic = CV_PLAN_MAGIC, .version = CV_ABI_VERSION, .total_size = size, .n_files = 1, .n_layers = n_layers, .n_tensors = (uint32_t)m->n_tensors, .flags = CV_MODEL_ROPE_INTERLEAVED,
                   .files_offset = files, .layers_offset = layers, .tensors_offset = tensors, .inv_freq_offset = freq, .hidden = TM_HIDDEN, .head_dim = TM_D, .vocab = TM_VOCAB, .n_experts = TM_EXPERTS,
                   .experts_per_token = 1, .chunk = TM_CHUNK, .page_tokens = TM_PAGE, .n_full_pages = TM_PAGES, .n_chunk_pages = TM_PAGES, .kv_type = CV_F32, .device = CV_DEVICE_CPU, .compute = compute,
                   .n_threads = threads, .max_rows = 4, .max_tokens = 64, .max_logits = 64, .n_slots = 4, .norm_eps = 1e-5f, .qk_norm_eps = 1e-5f, .attn_scale = 0.1f, .floor_scale = 8};
    *(cv_plan_file *)(void *)(m->plan + files) = (cv_plan_file){path, m->file_size};
    cv_plan_layer *l = (cv_plan_layer *)(void *)(m->plan + layers);
    for (uint32_t i = 0; i < n_layers; i++)
        l[i] = (cv_plan_layer){i, i % 2 ? CV_LAYER_CHUNKED | CV_LAYER_ROPE | CV_LAYER_QK_NORM | CV_LAYER_MOE : CV_LAYER_TEMPERATURE, TM_HEADS, TM_KV};
    memcpy(m->plan + tensors, m->tensors, m->n_tensors * sizeof(cv_plan_tensor));
    for (int i = 0; i < TM_D / 2; i++) ((float *)(void *)(m->plan + freq))[i] = 1.0f / (float)(1 << (2 * i));
    memcpy(m->plan + path, m->path, strlen(m->path) + 1);
    return true;
}

static inline bool tm_make(tiny_model *m, uint32_t compute, uint32_t threads) { return tm_make_layers(m, compute, threads, 2, false); }

static inline void tm_free(tiny_model *m) {
    unlink(m->path);
    free(m->plan);
    free(m->data);
}

/* One row of a step: tokens at positions first…, pages of sequence `seq` (each has its own 6 full and 6 chunked pages). */
typedef struct {
    uint64_t first;
    const uint32_t *tokens;
    uint32_t n, seq, flags;
    float temperature;
    uint64_t seed;
    uint32_t top_logprobs;
} tm_row;

/* Lays a step out in buf (8-aligned, 16 KiB are plenty); returns its size. */
static inline size_t tm_step(uint8_t *buf, const tm_row *rows, uint32_t n_rows, const cv_step_copy *copies, uint32_t n_copies) {
    size_t at = sizeof(cv_step) + n_rows * sizeof(cv_step_row);
    cv_step *s = (cv_step *)(void *)buf;
    cv_step_row *r = (cv_step_row *)(void *)(buf + sizeof(cv_step));
    memset(buf, 0, at);
    for (uint32_t i = 0; i < n_rows; i++) {
        const tm_row *in = &rows[i];
        uint64_t last = in->first + in->n - 1, base = in->first / TM_CHUNK * TM_CHUNK;
        r[i] = (cv_step_row){.first_position = in->first, .n_tokens = in->n, .slot = in->seq, .logits = CV_LOGITS_ALL, .flags = in->flags, .seed = in->seed, .temperature = in->temperature, .top_p = 1,
                             .repetition_penalty = 1, .n_top_logprobs = in->top_logprobs, .chunk_base = base};
        r[i].tokens_offset = at;
        memcpy(buf + at, in->tokens, in->n * 4);
        at += in->n * 4;
        r[i].full_pages_offset = at;
        r[i].n_full_pages = (uint32_t)(last / TM_PAGE + 1);
        for (uint32_t p = 0; p < r[i].n_full_pages; p++, at += 4) *(uint32_t *)(void *)(buf + at) = in->seq * 6 + p % 6;
        r[i].chunk_pages_offset = at;
        r[i].n_chunk_pages = (uint32_t)((last - base) / TM_PAGE + 1);
        for (uint32_t p = 0; p < r[i].n_chunk_pages; p++, at += 4) *(uint32_t *)(void *)(buf + at) = in->seq * 6 + (uint32_t)(base / TM_PAGE + p) % 6;
    }
    size_t copies_at = at;
    if (n_copies) memcpy(buf + at, copies, n_copies * sizeof *copies);
    at += n_copies * sizeof *copies;
    at = (at + 7) & ~(size_t)7;
    *s = (cv_step){CV_STEP_MAGIC, CV_ABI_VERSION, at, n_rows, n_copies, sizeof(cv_step), copies_at, 0, 0};
    return at;
}

#endif
