/* neon_attention.c — attention over one run of keys and values. */
#if defined(__aarch64__)
#include "neon_dots.h"

/* Keys are widened to float32 two at a time, then meet every query. */
CV_INLINE void scores(const float *queries, size_t n_q, size_t ldq, const void *keys, uint32_t type, size_t len, size_t d, float scale, float *s, size_t lds) {
    float wide[2 * 256];
    for (size_t t = 0; t < len; t += 2) {
        const size_t n = len - t < 2 ? 1 : 2;
        const float *at = type == CV_F32 ? (const float *)keys + t * d : wide;
        if (type != CV_F32)
            for (size_t i = 0; i < n * d; i += 16) v16_store(wide + i, v16_load_as(keys, t * d + i, type));
        dots(at, d, n, queries, ldq, n_q, d, scale, s + t, lds);
    }
}

void cv_neon_attn_scores(const float *queries, size_t n_q, size_t ldq, const void *keys, uint32_t type, size_t len, size_t d, float scale, float *s, size_t lds, const void *next) {
    cv_prefetch(next, len * d * (type == CV_F32 ? 4 : 2));
    if (type == CV_F32) scores(queries, n_q, ldq, keys, CV_F32, len, d, scale, s, lds);
    else if (type == CV_F16) scores(queries, n_q, ldq, keys, CV_F16, len, d, scale, s, lds);
    else scores(queries, n_q, ldq, keys, CV_BF16, len, d, scale, s, lds);
}

float cv_neon_attn_softmax(float *s, size_t len, float *m) {
    float top = s[0];
    if (len >= 16) {
        v16 most = v16_load(s);
        for (size_t t = 16; t + 16 <= len; t += 16)
            for (int j = 0; j < 4; j++) most.q[j] = vmaxnmq_f32(most.q[j], vld1q_f32(s + t + 4 * (size_t)j));
        top = vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(most.q[0], most.q[1]), vmaxnmq_f32(most.q[2], most.q[3])));
    }
    for (size_t t = len / 16 * 16; t < len; t++) top = s[t] > top ? s[t] : top;
    if (top == 0)
        for (size_t t = 0; t < len; t++)
            if (s[t] == 0) {
                top = s[t]; /* of zeros of both signs the first is the maximum */
                break;
            }
    v16 sum = v16_set(0);
    size_t t = 0;
    for (; t + 16 <= len; t += 16) {
        const v16 e = v16_exp(v16_sub(v16_load(s + t), v16_set(top)));
        v16_store(s + t, e);
        sum = v16_add(sum, e);
    }
    if (t < len) {
        const v16 e = v16_keep(v16_exp(v16_sub(v16_load_part(s + t, len - t), v16_set(top))), len - t);
        v16_store(s + t, e);
        sum = v16_add(sum, e);
    }
    *m = top;
    return v16_tree(sum);
}

enum { VALUES_QUERIES = 5, VALUES_WIDE = 4 }; /* queries x vectors of a block: 5 x 1, 2 x 2 or 1 x 4, at most 20 registers of sums */

/* out[q] += p[q] v over `to` keys for `n_q` queries and `wide` vectors of the head. */
CV_INLINE void values_block(const float *p, int n_q, size_t ldp, size_t to, const void *values, size_t first, uint32_t type, size_t d, int wide, float *out, size_t ldo) {
    v16 acc[VALUES_QUERIES][VALUES_WIDE];
#pragma GCC unroll 5
    for (int q = 0; q < n_q; q++)
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++) acc[q][i] = v16_load(out + (size_t)q * ldo + 16 * (size_t)i);
    for (size_t t = 0; t < to; t++) {
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++) {
            const v16 v = v16_load_as(values, t * d + first + 16 * (size_t)i, type);
#pragma GCC unroll 5
            for (int q = 0; q < n_q; q++) {
                const float weight = p[(size_t)q * ldp + t];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) acc[q][i].q[j] = vfmaq_n_f32(acc[q][i].q[j], v.q[j], weight);
            }
        }
    }
#pragma GCC unroll 5
    for (int q = 0; q < n_q; q++)
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++) v16_store(out + (size_t)q * ldo + 16 * (size_t)i, acc[q][i]);
}

/* `n_q` queries over the keys from..to-1, the whole head, `wide` vectors at a time and the rest one by one. */
CV_INLINE void values_head(const float *p, int n_q, size_t ldp, size_t from, size_t to, const void *values, uint32_t type, size_t d, int wide, float *out, size_t ldo) {
    size_t i = 0;
    for (; i + 16 * (size_t)wide <= d; i += 16 * (size_t)wide) values_block(p + from, n_q, ldp, to - from, values, from * d + i, type, d, wide, out + i, ldo);
    for (; i < d; i += 16) values_block(p + from, n_q, ldp, to - from, values, from * d + i, type, d, 1, out + i, ldo);
}

/* Up to five queries share each value as far as all of them reach; the rest of each follows alone. */
CV_INLINE void values_all(const float *p, size_t n_q, size_t ldp, const uint32_t *len, const void *values, uint32_t type, size_t d, float *out, size_t ldo) {
    const size_t pieces = (n_q + VALUES_QUERIES - 1) / VALUES_QUERIES;
    for (size_t i = 0, q = 0; i < pieces; i++) {
        const size_t end = (i + 1) * n_q / pieces;
        const float *pq = p + q * ldp;
        float *to = out + q * ldo;
        size_t shared = len[q];
        for (size_t j = q + 1; j < end; j++) shared = len[j] < shared ? len[j] : shared;
        switch (end - q) {
        case 1: shared = 0; break; /* below */
        case 2: values_head(pq, 2, ldp, 0, shared, values, type, d, 2, to, ldo); break;
        case 3: values_head(pq, 3, ldp, 0, shared, values, type, d, 1, to, ldo); break;
        case 4: values_head(pq, 4, ldp, 0, shared, values, type, d, 1, to, ldo); break;
        default: values_head(pq, 5, ldp, 0, shared, values, type, d, 1, to, ldo); break;
        }
        for (; q < end; q++)
            if (len[q] > shared) values_head(p + q * ldp, 1, 0, shared, len[q], values, type, d, 4, out + q * ldo, 0);
    }
}

void cv_neon_attn_values(const float *p, size_t n_q, size_t ldp, const uint32_t *len, const void *values, uint32_t type, size_t d, float *out, size_t ldo, const void *next) {
    cv_prefetch(next, n_q ? len[n_q - 1] * d * (type == CV_F32 ? 4 : 2) : 0); /* the last query sees most */
    if (type == CV_F32) values_all(p, n_q, ldp, len, values, CV_F32, d, out, ldo);
    else if (type == CV_F16) values_all(p, n_q, ldp, len, values, CV_F16, d, out, ldo);
    else values_all(p, n_q, ldp, len, values, CV_BF16, d, out, ldo);
}

#endif
