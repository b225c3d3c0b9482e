/* place.c — see place.h. */
#include "place.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PIECE = 4 << 20 /* bytes of a message at most: larger things travel in pieces, below any group's max_message */ };
enum { WORD_MAGIC = 0x44574352, RESULT_MAGIC = 0x53524352 };
static const size_t most_word = (size_t)64 << 20;

typedef struct {
    uint64_t magic, ticket, bytes, reserved;
} result_head; /* 32 bytes */

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* FNV-1a over 64-bit words, then the rest; a checksum, not a secret. */
static uint64_t hash(uint64_t h, const void *data, size_t bytes) {
    const uint8_t *p = data;
    for (; bytes >= 8; p += 8, bytes -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        h = (h ^ word) * 0x100000001b3u;
        h ^= h >> 29;
    }
    for (; bytes; p++, bytes--) h = (h ^ *p) * 0x100000001b3u;
    return h;
}

static uint64_t fingerprint(const cv_plan *p) {
    const uint32_t same[] = {p->hidden, p->head_dim, p->vocab, p->n_experts, p->experts_per_token, p->chunk, p->page_tokens, p->n_full_pages, p->n_chunk_pages, p->kv_type, p->compute,
                             p->max_rows, p->max_tokens, p->max_logits, p->n_slots, p->tensor_size, p->n_stages, p->flags};
    return hash(0xcbf29ce484222325u, same, sizeof same);
}

int cv_place_open(const cv_plan *plan, cv_group *group, cv_place *p, cv_err err) {
    *p = (cv_place){.group = group, .tensor_size = plan->tensor_size ? plan->tensor_size : 1, .n_stages = plan->n_stages ? plan->n_stages : 1, .tensor_rank = plan->tensor_rank, .stage = plan->stage};
    if (p->tensor_size > 64 || p->n_stages > 64 || p->tensor_rank >= p->tensor_size || p->stage >= p->n_stages)
        return cv_fail(err, CV_E_PLAN, "tensor rank %u of %u in stage %u of %u: not possible", p->tensor_rank, p->tensor_size, p->stage, p->n_stages);
    p->rank = p->stage * p->tensor_size + p->tensor_rank;
    p->tensor = (cv_members){p->stage * p->tensor_size, p->tensor_size};
    p->model = fingerprint(plan);
    p->check = (plan->flags & CV_MODEL_CHECK_RANKS) != 0;
    uint32_t ranks = p->tensor_size * p->n_stages;
    if (!group && ranks > 1) return cv_fail(err, CV_E_PLAN, "a plan for one of %u ranks needs their group", ranks);
    if (group && (cv_group_size(group) != ranks || cv_group_rank(group) != p->rank))
        return cv_fail(err, CV_E_PLAN, "the plan is for rank %u of %u, the group's is %u of %u", p->rank, ranks, cv_group_rank(group), cv_group_size(group));
    return CV_OK;
}

static int spent(cv_place *p, uint64_t start, int code) {
    atomic_fetch_add_explicit(&p->exchange_ns, now_ns() - start, memory_order_relaxed);
    return code;
}

int cv_place_reduce(cv_place *p, float *x, size_t n) {
    uint64_t start = now_ns();
    return spent(p, start, cv_all_reduce(p->group, p->tensor, x, n, p->timeout_ms));
}

int cv_place_gather(cv_place *p, const void *mine, size_t bytes, void *out) {
    uint64_t start = now_ns();
    return spent(p, start, cv_all_gather(p->group, p->tensor, mine, bytes, out, p->timeout_ms));
}

int cv_place_compare(cv_place *p, const float *x, size_t n, cv_err err) {
    uint64_t mine = hash(0xcbf29ce484222325u, x, n * sizeof *x), all[64];
    int code = cv_place_gather(p, &mine, sizeof mine, all);
    if (code) return cv_place_failed(p, code, err);
    for (uint32_t i = 0; i < p->tensor_size; i++)
        if (all[i] != mine) return cv_fail(err, CV_E_GROUP, "ranks %u and %u have different hidden states", p->rank, p->tensor.first + i);
    atomic_fetch_add_explicit(&p->checks, 1, memory_order_relaxed);
    return CV_OK;
}

static int send_pieces(cv_place *p, uint32_t peer, uint32_t channel, const uint8_t *data, size_t bytes) {
    int code = CV_OK;
    for (size_t at = 0, n; !code && at < bytes; at += n) {
        n = bytes - at < PIECE ? bytes - at : PIECE;
        code = cv_send(p->group, peer, channel, data + at, n, p->timeout_ms);
    }
    return code;
}

static int receive_pieces(cv_place *p, uint32_t peer, uint32_t channel, uint8_t *data, size_t bytes, uint32_t timeout_ms) {
    int code = CV_OK;
    for (size_t at = 0, n; !code && at < bytes; at += n) {
        n = bytes - at < PIECE ? bytes - at : PIECE;
        code = cv_recv(p->group, peer, channel, data + at, n, timeout_ms);
    }
    return code;
}

int cv_place_hand_over(cv_place *p, const float *h, size_t n) {
    uint64_t start = now_ns();
    return spent(p, start, send_pieces(p, p->rank + p->tensor_size, CV_CHANNEL_HIDDEN, (const uint8_t *)h, n * sizeof *h));
}

int cv_place_take_over(cv_place *p, float *h, size_t n) {
    uint64_t start = now_ns();
    return spent(p, start, receive_pieces(p, p->rank - p->tensor_size, CV_CHANNEL_HIDDEN, (uint8_t *)h, n * sizeof *h, p->timeout_ms));
}

int cv_place_send_word(cv_place *p, uint32_t stage, cv_word *word, size_t bytes) {
    uint64_t start = now_ns();
    word->magic = WORD_MAGIC;
    word->model = p->model;
    int code = CV_OK;
    for (uint32_t i = 0; !code && i < p->tensor_size; i++) {
        uint32_t peer = stage * p->tensor_size + i;
        if (peer != p->rank) code = cv_send_any(p->group, peer, CV_CHANNEL_STEP, word, bytes, p->timeout_ms);
    }
    return spent(p, start, code);
}

int cv_place_receive_word(cv_place *p, cv_word **word, cv_err err) {
    void *data = NULL;
    size_t bytes = 0;
    int code = cv_recv_any(p->group, 0, CV_CHANNEL_STEP, &data, &bytes, most_word, 0);
    if (code) return cv_place_failed(p, code, err);
    const cv_word *w = data;
    bool ok = bytes >= sizeof *w && w->magic == WORD_MAGIC;
    if (ok && w->model != p->model) {
        free(data);
        return cv_fail(err, CV_E_GROUP, "rank %u has a plan of another model or of other limits than rank 0", p->rank);
    }
    ok = ok && (w->kind == CV_WORD_END || ((w->kind == CV_WORD_STEP || w->kind == CV_WORD_MASKS) && w->step_size % 8 == 0 && w->step_size <= bytes - sizeof *w && w->n_rows == (bytes - sizeof *w - w->step_size) / sizeof(uint32_t)));
    if (!ok) {
        free(data);
        return cv_fail(err, CV_E_GROUP, "rank %u: rank 0 sent something that is no step", p->rank);
    }
    *word = data;
    return CV_OK;
}

int cv_place_send_result(cv_place *p, uint64_t ticket, const void *result, size_t bytes) {
    uint64_t start = now_ns();
    size_t first = bytes < PIECE ? bytes : PIECE;
    result_head *head = malloc(sizeof *head + first);
    if (!head) return CV_E_MEMORY;
    *head = (result_head){.magic = RESULT_MAGIC, .ticket = ticket, .bytes = bytes};
    memcpy(head + 1, result, first);
    int code = cv_send_any(p->group, 0, CV_CHANNEL_RESULT, head, sizeof *head + first, p->timeout_ms);
    free(head);
    if (!code) code = send_pieces(p, 0, CV_CHANNEL_RESULT, (const uint8_t *)result + first, bytes - first);
    return spent(p, start, code);
}

int cv_place_receive_result(cv_place *p, uint64_t *ticket, void **result, size_t *bytes, uint32_t timeout_ms, cv_err err) {
    uint32_t peer = (p->n_stages - 1) * p->tensor_size;
    void *data = NULL;
    size_t got = 0;
    int code = cv_recv_any(p->group, peer, CV_CHANNEL_RESULT, &data, &got, sizeof(result_head) + PIECE, timeout_ms);
    if (code) return cv_place_failed(p, code, err);
    const result_head *head = data;
    size_t first = got - sizeof *head;
    if (got < sizeof *head || head->magic != RESULT_MAGIC || head->bytes < first || (head->bytes > first && first != PIECE) || head->bytes > SIZE_MAX / 2) {
        free(data);
        return cv_fail(err, CV_E_GROUP, "rank %u sent something that is no result", peer);
    }
    *ticket = head->ticket;
    *bytes = (size_t)head->bytes;
    *result = malloc(*bytes);
    if (!*result) code = cv_fail(err, CV_E_MEMORY, "no memory for a result of %zu bytes", *bytes);
    if (!code) memcpy(*result, (const uint8_t *)data + sizeof *head, first);
    free(data);
    if (!code && (code = receive_pieces(p, peer, CV_CHANNEL_RESULT, (uint8_t *)*result + first, *bytes - first, timeout_ms))) {
        free(*result);
        return cv_place_failed(p, code, err);
    }
    return code;
}

int cv_place_failed(const cv_place *p, int code, cv_err err) {
    char text[256];
    cv_group_error(p->group, text, sizeof text);
    return cv_fail(err, code, "%s", text[0] ? text : "the ranks' group failed");
}
