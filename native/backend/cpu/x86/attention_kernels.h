/* attention_kernels.h — attention over one run of keys and values on sixteen float lanes. Included after a vec16 header and
 * float_kernels.h (for v16_exp). */
#ifndef CV_X86_ATTENTION_KERNELS_H
#define CV_X86_ATTENTION_KERNELS_H

CV_INLINE v16 load_kv(const void *base, size_t i, uint32_t type) {
    return type == CV_F32 ? v16_load((const float *)base + i) : v16_load16((const uint16_t *)base + i, type);
}

/* Dots of `n_q` <= V16_BLOCK queries with four keys [4, d] float32; `keys` <= 4 of them are wanted. */
CV_INLINE void scores4(const float *queries, int n_q, size_t ldq, const float *key, size_t keys, size_t d, float scale, float *s, size_t lds) {
    v16 acc[V16_BLOCK][4];
    for (int q = 0; q < n_q; q++)
        for (int i = 0; i < 4; i++) acc[q][i] = v16_zero();
    for (size_t k = 0; k < d; k += 16) {
        v16 v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) v[i] = v16_load(key + (size_t)i * d + k);
#pragma GCC unroll 4
        for (int q = 0; q < n_q; q++) {
            const v16 x = v16_load(queries + (size_t)q * ldq + k);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) acc[q][i] = v16_fma(x, v[i], acc[q][i]);
        }
    }
    for (int q = 0; q < n_q; q++) {
        const __m128 sums = _mm_mul_ps(_mm_set1_ps(scale), v16_tree4(acc[q][0], acc[q][1], acc[q][2], acc[q][3]));
        if (keys == 4) {
            _mm_storeu_ps(s + (size_t)q * lds, sums);
        } else {
            float four[4];
            _mm_storeu_ps(four, sums);
            memcpy(s + (size_t)q * lds, four, keys * sizeof(float));
        }
    }
}

/* Four keys at a time are widened once and meet every query. */
CV_INLINE void scores(const float *queries, size_t n_q, size_t ldq, const void *keys, uint32_t type, size_t len, size_t d, float scale, float *s, size_t lds) {
    float key[4 * 256] __attribute__((aligned(64)));
    for (size_t t = 0; t < len; t += 4) {
        const size_t n = len - t < 4 ? len - t : 4;
        for (size_t i = 0; i < n * d; i += 16) v16_store(key + i, load_kv(keys, t * d + i, type));
        for (size_t i = n * d; i < 4 * d; i += 16) v16_store(key + i, v16_zero());
        size_t q = 0;
        for (; q + V16_BLOCK <= n_q; q += V16_BLOCK) scores4(queries + q * ldq, V16_BLOCK, ldq, key, n, d, scale, s + q * lds + t, lds);
        for (; q < n_q; q++) scores4(queries + q * ldq, 1, ldq, key, n, d, scale, s + q * lds + t, lds);
    }
}

CV_TARGET static void attn_scores(const float *queries, size_t n_q, size_t ldq, const void *keys, uint32_t type, size_t len, size_t d, float scale, float *s, size_t lds) {
    if (type == CV_F32) scores(queries, n_q, ldq, keys, CV_F32, len, d, scale, s, lds);
    else if (type == CV_F16) scores(queries, n_q, ldq, keys, CV_F16, len, d, scale, s, lds);
    else scores(queries, n_q, ldq, keys, CV_BF16, len, d, scale, s, lds);
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

/* out[q] += p[q] v over keys [from, to[q]) for `n_q` queries and `wide` vectors of the head. */
CV_INLINE void values_block(const float *p, int n_q, size_t ldp, size_t to, const void *values, uint32_t type, size_t d, int wide, float *out, size_t ldo) {
    v16 acc[V16_BLOCK][V16_WIDE];
    for (int q = 0; q < n_q; q++)
        for (int i = 0; i < wide; i++) acc[q][i] = v16_load(out + (size_t)q * ldo + 16 * (size_t)i);
    for (size_t t = 0; t < to; t++) {
        v16 v[V16_WIDE];
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++) v[i] = load_kv(values, t * d + 16 * (size_t)i, type);
#pragma GCC unroll 4
        for (int q = 0; q < n_q; q++) {
            const v16 weight = v16_set(p[(size_t)q * ldp + t]);
#pragma GCC unroll 4
            for (int i = 0; i < wide; i++) acc[q][i] = v16_fma(weight, v[i], acc[q][i]);
        }
    }
    for (int q = 0; q < n_q; q++)
        for (int i = 0; i < wide; i++) v16_store(out + (size_t)q * ldo + 16 * (size_t)i, acc[q][i]);
}

CV_INLINE const void *kv_at(const void *base, size_t i, uint32_t type) { return (const uint8_t *)base + i * (type == CV_F32 ? 4 : 2); }

/* One query over [from, to), all of the head. */
CV_INLINE void values_row(const float *p, size_t from, size_t to, const void *values, uint32_t type, size_t d, float *out) {
    const void *first = kv_at(values, from * d, type);
    size_t i = 0;
    for (; i + 16 * V16_WIDE <= d; i += 16 * V16_WIDE) values_block(p + from, 1, 0, to - from, kv_at(first, i, type), type, d, V16_WIDE, out + i, 0);
    for (; i < d; i += 16) values_block(p + from, 1, 0, to - from, kv_at(first, i, type), type, d, 1, out + i, 0);
}

/* V16_BLOCK queries share each value as far as all of them reach; the rest of each follows alone. */
CV_INLINE void values_all(const float *p, size_t n_q, size_t ldp, const uint32_t *len, const void *values, uint32_t type, size_t d, float *out, size_t ldo) {
    size_t q = 0;
    for (; q + V16_BLOCK <= n_q; q += V16_BLOCK) {
        size_t shared = len[q];
        for (size_t i = 1; i < V16_BLOCK; i++) shared = len[q + i] < shared ? len[q + i] : shared;
        size_t i = 0;
        for (; i + 16 * V16_WIDE <= d; i += 16 * V16_WIDE)
            values_block(p + q * ldp, V16_BLOCK, ldp, shared, kv_at(values, i, type), type, d, V16_WIDE, out + q * ldo + i, ldo);
        for (; i < d; i += 16) values_block(p + q * ldp, V16_BLOCK, ldp, shared, kv_at(values, i, type), type, d, 1, out + q * ldo + i, ldo);
        for (size_t j = q; j < q + V16_BLOCK; j++)
            if (len[j] > shared) values_row(p + j * ldp, shared, len[j], values, type, d, out + j * ldo);
    }
    for (; q < n_q; q++) values_row(p + q * ldp, 0, len[q], values, type, d, out + q * ldo);
}

CV_TARGET static void attn_values(const float *p, size_t n_q, size_t ldp, const uint32_t *len, const void *values, uint32_t type, size_t d, float *out, size_t ldo) {
    if (type == CV_F32) values_all(p, n_q, ldp, len, values, CV_F32, d, out, ldo);
    else if (type == CV_F16) values_all(p, n_q, ldp, len, values, CV_F16, d, out, ldo);
    else values_all(p, n_q, ldp, len, values, CV_BF16, d, out, ldo);
}

#endif
