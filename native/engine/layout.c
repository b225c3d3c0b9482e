/* layout.c — offsets of the interface's records, for the test that compares them with src/engine/layout.ts. */
#include "../include/caravan.h"

#include <stdio.h>
#include <string.h>

typedef struct {
    const char *name;
    size_t offset, size;
} field;

#define F(record, member) {#record "." #member, offsetof(record, member), sizeof(((record *)0)->member)}
#define S(record) {#record, 0, sizeof(record)}

static const field fields[] = {
    S(cv_plan_source), F(cv_plan_source, file), F(cv_plan_source, offset), F(cv_plan_source, outer_stride), F(cv_plan_source, row_stride),
    S(cv_plan_tensor), F(cv_plan_tensor, slot), F(cv_plan_tensor, layer), F(cv_plan_tensor, format), F(cv_plan_tensor, bits), F(cv_plan_tensor, group), F(cv_plan_tensor, scale_type), F(cv_plan_tensor, flags),
    F(cv_plan_tensor, experts), F(cv_plan_tensor, rows), F(cv_plan_tensor, cols), F(cv_plan_tensor, weight), F(cv_plan_tensor, scales), F(cv_plan_tensor, biases), F(cv_plan_tensor, global_scale),
    S(cv_plan_layer), F(cv_plan_layer, index), F(cv_plan_layer, flags), F(cv_plan_layer, n_heads), F(cv_plan_layer, n_kv_heads),
    S(cv_plan_file), F(cv_plan_file, path_offset), F(cv_plan_file, size),
    S(cv_plan), F(cv_plan, magic), F(cv_plan, version), F(cv_plan, total_size), F(cv_plan, n_files), F(cv_plan, n_layers), F(cv_plan, n_tensors), F(cv_plan, flags), F(cv_plan, files_offset),
    F(cv_plan, layers_offset), F(cv_plan, tensors_offset), F(cv_plan, inv_freq_offset), F(cv_plan, hidden), F(cv_plan, head_dim), F(cv_plan, vocab), F(cv_plan, n_experts), F(cv_plan, experts_per_token),
    F(cv_plan, chunk), F(cv_plan, page_tokens), F(cv_plan, n_full_pages), F(cv_plan, n_chunk_pages), F(cv_plan, kv_type), F(cv_plan, device), F(cv_plan, compute), F(cv_plan, n_threads), F(cv_plan, max_rows),
    F(cv_plan, max_tokens), F(cv_plan, max_logits), F(cv_plan, n_slots), F(cv_plan, norm_eps), F(cv_plan, qk_norm_eps), F(cv_plan, attn_scale), F(cv_plan, floor_scale), F(cv_plan, cpu_level),
    F(cv_plan, tensor_rank), F(cv_plan, tensor_size), F(cv_plan, stage), F(cv_plan, n_stages), F(cv_plan, vocab_first), F(cv_plan, vocab_rows),
    S(cv_step_row), F(cv_step_row, first_position), F(cv_step_row, n_tokens), F(cv_step_row, slot), F(cv_step_row, tokens_offset), F(cv_step_row, full_pages_offset), F(cv_step_row, chunk_pages_offset),
    F(cv_step_row, chunk_base), F(cv_step_row, n_full_pages), F(cv_step_row, n_chunk_pages), F(cv_step_row, logits), F(cv_step_row, flags), F(cv_step_row, seed), F(cv_step_row, temperature), F(cv_step_row, top_p),
    F(cv_step_row, min_p), F(cv_step_row, xtc_probability), F(cv_step_row, xtc_threshold), F(cv_step_row, repetition_penalty), F(cv_step_row, presence_penalty), F(cv_step_row, frequency_penalty),
    F(cv_step_row, top_k), F(cv_step_row, n_top_logprobs), F(cv_step_row, bias_offset), F(cv_step_row, history_offset), F(cv_step_row, mask_offset), F(cv_step_row, n_bias), F(cv_step_row, n_history),
    F(cv_step_row, xtc_keep_offset), F(cv_step_row, n_xtc_keep),
    S(cv_step_bias), F(cv_step_bias, token), F(cv_step_bias, bias), S(cv_step_history), F(cv_step_history, token), F(cv_step_history, in_output), F(cv_step_history, in_context),
    S(cv_step_copy), F(cv_step_copy, pool), F(cv_step_copy, from), F(cv_step_copy, to),
    S(cv_step), F(cv_step, magic), F(cv_step, version), F(cv_step, total_size), F(cv_step, n_rows), F(cv_step, n_copies), F(cv_step, rows_offset), F(cv_step, copies_offset), F(cv_step, timeout_ms),
    S(cv_result_row), F(cv_result_row, token), F(cv_result_row, logprob), F(cv_result_row, n_top), F(cv_result_row, n_logits), F(cv_result_row, top_offset), F(cv_result_row, logits_offset), F(cv_result_row, status),
    S(cv_result_top), F(cv_result_top, token), F(cv_result_top, logprob),
    S(cv_result), F(cv_result, ticket), F(cv_result, total_size), F(cv_result, n_rows), F(cv_result, rows_offset), F(cv_result, compute_ns), F(cv_result, queued_ns), F(cv_result, exchange_ns), F(cv_result, mask_ns),
    S(cv_group_options), F(cv_group_options, version), F(cv_group_options, rank), F(cv_group_options, size), F(cv_group_options, transport), F(cv_group_options, epoch), F(cv_group_options, key),
    F(cv_group_options, instance), F(cv_group_options, host), F(cv_group_options, rdma_device), F(cv_group_options, no_rdma), F(cv_group_options, silence_ms), F(cv_group_options, max_message), F(cv_group_options, rdma_flags),
    S(cv_group_stats_record), F(cv_group_stats_record, transport), F(cv_group_stats_record, failed), F(cv_group_stats_record, reduces), F(cv_group_stats_record, reduce_ns), F(cv_group_stats_record, reduce_bytes),
    F(cv_group_stats_record, messages), F(cv_group_stats_record, message_bytes), F(cv_group_stats_record, mac_ns), F(cv_group_stats_record, round_trip_us), F(cv_group_stats_record, strangers),
    S(cv_stats_record), F(cv_stats_record, weights_mapped), F(cv_stats_record, weights_copied), F(cv_stats_record, kv_bytes), F(cv_stats_record, scratch_bytes), F(cv_stats_record, steps), F(cv_stats_record, tokens),
    F(cv_stats_record, compute_ns), F(cv_stats_record, kernel_ns), F(cv_stats_record, exchange_ns), F(cv_stats_record, rank_checks), F(cv_stats_record, n_threads), F(cv_stats_record, cpu_level),
};

size_t cv_layout(char *out, size_t out_size) {
    size_t used = 0;
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        char line[128];
        int n = snprintf(line, sizeof line, "%s=%zu,%zu\n", fields[i].name, fields[i].offset, fields[i].size);
        if (n > 0 && used + (size_t)n < out_size) memcpy(out + used, line, (size_t)n);
        used += n > 0 ? (size_t)n : 0;
    }
    if (out_size) out[used < out_size ? used : out_size - 1] = 0;
    return used + 1;
}
