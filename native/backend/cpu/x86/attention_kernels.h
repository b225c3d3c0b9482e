/* attention_kernels.h — attention over one run of keys and values on sixteen float lanes. Included after a vec16 header and
 * float_kernels.h (for v16_exp). */
#ifndef CV_X86_ATTENTION_KERNELS_H
#define CV_X86_ATTENTION_KERNELS_H

CV_INLINE v16 load_kv(const void *base, size_t i, uint32_t type) {
    return type == CV_F32 ? v16_load((const float *)base + i) : v16_load16((const uint16_t *)base + i, type);
}

CV_INLINE size_t kv_bytes(uint32_t type) { return type == CV_F32 ? 4 : 2; }
CV_INLINE const void *kv_at(const void *base, size_t i, uint32_t type) { return (const uint8_t *)base + i * kv_bytes(type); }

/* Calls of a function that is inlined for a constant number of queries, 1 to 5. */
#define FOR_QUERIES(n, call) \
    switch (n) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    default: call(5); break; \
    }

/* Dots of `n_q` <= V16_SCORES queries with the keys t … t+3, of which `n_keys` <= 4 are there (the last is repeated). */
CV_INLINE void scores4(const float *queries, int n_q, size_t ldq, const void *keys, uint32_t type, size_t t, size_t n_keys, size_t d, float scale, float *s, size_t lds) {
    v16 acc[5][4];
    size_t at[4];
    for (size_t i = 0; i < 4; i++) at[i] = (t + (i < n_keys ? i : n_keys - 1)) * d;
#pragma GCC unroll 5
    for (int q = 0; q < n_q; q++)
        for (int i = 0; i < 4; i++) acc[q][i] = v16_zero();
    for (size_t k = 0; k < d; k += 16) {
        v16 v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) v[i] = load_kv(keys, at[i] + k, type);
#pragma GCC unroll 5
        for (int q = 0; q < n_q; q++) {
            const v16 x = v16_load(queries + (size_t)q * ldq + k);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) acc[q][i] = v16_fma(x, v[i], acc[q][i]);
        }
    }
#pragma GCC unroll 5
    for (int q = 0; q < n_q; q++) {
        const __m128 sums = _mm_mul_ps(_mm_set1_ps(scale), v16_tree4(acc[q][0], acc[q][1], acc[q][2], acc[q][3]));
        if (n_keys == 4) {
            _mm_storeu_ps(s + (size_t)q * lds + t, sums);
        } else {
            float four[4];
            _mm_storeu_ps(four, sums);
            memcpy(s + (size_t)q * lds + t, four, n_keys * sizeof(float));
        }
    }
}

/* Four keys at a time meet every query, as few of these at a time as can be and equally many. Where only one query fits,
 * keys are widened to float32 first. */
CV_INLINE void scores(const float *queries, size_t n_q, size_t ldq, const void *keys, uint32_t type, size_t len, size_t d, float scale, float *s, size_t lds, const void *next) {
    float wide[4 * 256] __attribute__((aligned(64)));
    const size_t pieces = (n_q + V16_SCORES - 1) / V16_SCORES;
    for (size_t t = 0; t < len; t += 4) {
        const size_t n = len - t < 4 ? len - t : 4;
        if (next) cv_prefetch(kv_at(next, t * d, type), n * d * kv_bytes(type)); /* a little at a time, so that memory and arithmetic overlap */
        if (V16_SCORES == 1) {
            for (size_t i = 0; i < n * d; i += 16) v16_store(wide + i, load_kv(keys, t * d + i, type));
            for (size_t q = 0; q < n_q; q++) scores4(queries + q * ldq, 1, ldq, wide, CV_F32, 0, n, d, scale, s + q * lds + t, lds);
            continue;
        }
        for (size_t i = 0, q = 0; i < pieces; i++) {
            const size_t end = (i + 1) * n_q / pieces;
#define SCORES(count) scores4(queries + q * ldq, count, ldq, keys, type, t, n, d, scale, s + q * lds, lds)
            FOR_QUERIES(end - q, SCORES)
#undef SCORES
            q = end;
        }
    }
}

CV_TARGET static void attn_scores(const float *queries, size_t n_q, size_t ldq, const void *keys, uint32_t type, size_t len, size_t d, float scale, float *s, size_t lds, const void *next) {
    if (type == CV_F32) scores(queries, n_q, ldq, keys, CV_F32, len, d, scale, s, lds, next);
    else if (type == CV_F16) scores(queries, n_q, ldq, keys, CV_F16, len, d, scale, s, lds, next);
    else scores(queries, n_q, ldq, keys, CV_BF16, len, d, scale, s, lds, next);
}

CV_TARGET static float attn_softmax(float *s, size_t len, float *m) {
    float top = s[0];
    if (len >= 16) {
        v16 most = v16_load(s);
        for (size_t t = 16; t + 16 <= len; t += 16) most = v16_max(v16_load(s + t), most);
        top = v16_largest(most);
    }
    for (size_t t = len / 16 * 16; t < len; t++) top = s[t] > top ? s[t] : top;
    if (top == 0)
        for (size_t t = 0; t < len; t++)
            if (s[t] == 0) {
                top = s[t]; /* of zeros of both signs the first is the maximum */
                break;
            }
    v16 sum = v16_zero();
    for (size_t t = 0; t < len; t += 16) {
        const size_t n = len - t;
        v16 e = v16_exp(v16_sub(n >= 16 ? v16_load(s + t) : v16_load_part(s + t, n), v16_set(top)));
        if (n < 16) e = v16_keep(e, n);
        v16_store(s + t, e);
        sum = v16_add(sum, e);
    }
    *m = top;
    return v16_tree(sum);
}

/* out[q] += p[q] v over `to` keys for `n_q` <= V16_VALUES queries and `wide` vectors of the head. */
CV_INLINE void values_block(const float *p, int n_q, size_t ldp, size_t to, const void *values, uint32_t type, size_t d, int wide, float *out, size_t ldo, const void *next) {
    v16 acc[5][V16_WIDE];
#pragma GCC unroll 5
    for (int q = 0; q < n_q; q++)
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++) acc[q][i] = v16_load(out + (size_t)q * ldo + 16 * (size_t)i);
    for (size_t t = 0; t < to; t++) {
        if (next) cv_prefetch(kv_at(next, t * d, type), d * kv_bytes(type));
        v16 v[V16_WIDE];
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++) v[i] = load_kv(values, t * d + 16 * (size_t)i, type);
#pragma GCC unroll 5
        for (int q = 0; q < n_q; q++) {
            const v16 weight = v16_set(p[(size_t)q * ldp + t]);
#pragma GCC unroll 4
            for (int i = 0; i < wide; i++) acc[q][i] = v16_fma(weight, v[i], acc[q][i]);
        }
    }
#pragma GCC unroll 5
    for (int q = 0; q < n_q; q++)
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++) v16_store(out + (size_t)q * ldo + 16 * (size_t)i, acc[q][i]);
}

/* `n_q` queries over the first `to` keys, all of the head. */
CV_INLINE void values_head(const float *p, int n_q, size_t ldp, size_t to, const void *values, uint32_t type, size_t d, float *out, size_t ldo, const void *next) {
    size_t i = 0; /* `next` is asked for once, by the first part of the head */
    for (; i + 16 * V16_WIDE <= d; i += 16 * V16_WIDE) values_block(p, n_q, ldp, to, kv_at(values, i, type), type, d, V16_WIDE, out + i, ldo, i == 0 ? next : NULL);
    for (; i < d; i += 16) values_block(p, n_q, ldp, to, kv_at(values, i, type), type, d, 1, out + i, ldo, i == 0 ? next : NULL);
}

/* Up to V16_VALUES queries share each value as far as all of them reach; the rest of each follows alone. */
CV_INLINE void values_all(const float *p, size_t n_q, size_t ldp, const uint32_t *len, const void *values, uint32_t type, size_t d, float *out, size_t ldo, const void *next) {
    const size_t pieces = (n_q + V16_VALUES - 1) / V16_VALUES;
    for (size_t i = 0, q = 0; i < pieces; i++) {
        const size_t end = (i + 1) * n_q / pieces;
        size_t shared = len[q];
        for (size_t j = q + 1; j < end; j++) shared = len[j] < shared ? len[j] : shared;
        if (V16_VALUES == 2) {
            if (end - q == 2) values_head(p + q * ldp, 2, ldp, shared, values, type, d, out + q * ldo, ldo, next);
            else values_head(p + q * ldp, 1, ldp, shared, values, type, d, out + q * ldo, ldo, next);
        } else {
#define VALUES(count) values_head(p + q * ldp, count, ldp, shared, values, type, d, out + q * ldo, ldo, next)
            FOR_QUERIES(end - q, VALUES)
#undef VALUES
        }
        next = NULL;
        for (; q < end; q++)
            if (len[q] > shared) values_head(p + q * ldp + shared, 1, 0, len[q] - shared, kv_at(values, shared * d, type), type, d, out + q * ldo, 0, NULL);
    }
}

CV_TARGET static void attn_values(const float *p, size_t n_q, size_t ldp, const uint32_t *len, const void *values, uint32_t type, size_t d, float *out, size_t ldo, const void *next) {
    if (type == CV_F32) values_all(p, n_q, ldp, len, values, CV_F32, d, out, ldo, next);
    else if (type == CV_F16) values_all(p, n_q, ldp, len, values, CV_F16, d, out, ldo, next);
    else values_all(p, n_q, ldp, len, values, CV_BF16, d, out, ldo, next);
}

#endif
