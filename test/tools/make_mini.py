#!/usr/bin/env python3
"""A Scout-shaped random checkpoint, written twice: as MLX 4-bit (groups of 64), and as a float16 GGUF file for llama.cpp.

The shape is Scout's divided by four (hidden 1280, 10 heads of 128 over 2 key-value heads, 16 experts of 2048) with 12 layers,
so that one decode step reads about 160 MB and the whole model takes about 0.9 GB at 4 bits: small enough to benchmark on a
small machine, large enough that weights come from memory. Both files hold the same numbers before quantization.

usage: make_mini.py OUT_DIR TOKENIZER_GGUF [--layers 12]
Writes OUT_DIR/mlx-4bit/{config.json,model.safetensors} and OUT_DIR/mini-f16.gguf, whose tokenizer is that of TOKENIZER_GGUF
(SmolLM2's). Needs numpy, safetensors and gguf. Not needed by `make test`.
"""
import argparse
import json
import os

import numpy as np
from gguf import GGUFReader, GGUFWriter
from safetensors.numpy import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 1280, 10, 2, 128
EXPERT_FF, DENSE_FF, EXPERTS = 2048, 4096, 16
VOCAB = 49152
CONTEXT, CHUNK = 32768, 8192
NORM_EPS, ROPE_THETA = 1e-5, 500000.0
BITS, GROUP = 4, 64
SEED = 7


def quantize(x):
    """MLX's affine rule: the end of larger magnitude is exact, scales may be negative. Codes, first in the low nibble."""
    levels = 2**BITS - 1
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    low, high = groups.min(-1), groups.max(-1)
    scale = np.maximum((high - low) / levels, 1e-7)
    from_low = np.abs(low) > np.abs(high)
    edge = np.where(from_low, low, high)
    scale = np.where(from_low, scale, -scale)
    steps = np.round(edge / scale)
    scale = np.where(steps != 0, edge / np.where(steps == 0, 1, steps), scale).astype(np.float16)
    bias = np.where(steps != 0, edge, 0).astype(np.float16)
    wide = [array[..., None].astype(np.float32) for array in (scale, bias)]
    codes = np.clip(np.round((groups - wide[1]) / wide[0]), 0, levels).astype(np.uint32)
    codes = codes.reshape(*x.shape[:-1], x.shape[-1] * BITS // 32, 32 // BITS)
    words = np.zeros(codes.shape[:-1], np.uint32)
    for i in range(32 // BITS):
        words |= codes[..., i] << np.uint32(BITS * i)
    return words, scale, bias


class TwoFiles:
    """Takes each tensor once and writes it into both checkpoints."""

    def __init__(self, writer):
        self.writer = writer
        self.mlx = {}
        self.random = np.random.default_rng(SEED)

    def norm(self, gguf_name, path):
        x = (1 + 0.05 * self.random.standard_normal(HIDDEN)).astype(np.float32)
        self.mlx[path + ".weight"] = x.astype(np.float16)
        self.writer.add_tensor(gguf_name, x)

    def matrix(self, gguf_name, path, shape, gguf_type=np.float16):
        x = self.random.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
        for part, array in zip((".weight", ".scales", ".biases"), quantize(x)):
            self.mlx[path + part] = array
        self.writer.add_tensor(gguf_name, x.astype(gguf_type))

    def layer(self, index):
        gguf, mlx = f"blk.{index}.", f"language_model.model.layers.{index}."
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        self.norm(gguf + "attn_norm.weight", mlx + "input_layernorm")
        self.norm(gguf + "ffn_norm.weight", mlx + "post_attention_layernorm")
        self.matrix(gguf + "attn_q.weight", mlx + "self_attn.q_proj", (q, HIDDEN))
        self.matrix(gguf + "attn_k.weight", mlx + "self_attn.k_proj", (kv, HIDDEN))
        self.matrix(gguf + "attn_v.weight", mlx + "self_attn.v_proj", (kv, HIDDEN))
        self.matrix(gguf + "attn_output.weight", mlx + "self_attn.o_proj", (HIDDEN, q))
        feed = mlx + "feed_forward."
        self.matrix(gguf + "ffn_gate_inp.weight", feed + "router", (EXPERTS, HIDDEN), np.float32)
        for name in ("gate", "up"):
            self.matrix(f"{gguf}ffn_{name}_exps.weight", f"{feed}experts.{name}_proj", (EXPERTS, EXPERT_FF, HIDDEN))
            self.matrix(f"{gguf}ffn_{name}_shexp.weight", f"{feed}shared_expert.{name}_proj", (EXPERT_FF, HIDDEN))
        self.matrix(gguf + "ffn_down_exps.weight", feed + "experts.down_proj", (EXPERTS, HIDDEN, EXPERT_FF))
        self.matrix(gguf + "ffn_down_shexp.weight", feed + "shared_expert.down_proj", (HIDDEN, EXPERT_FF))


def open_gguf(path, layers, tokenizer_path):
    writer = GGUFWriter(path, "llama4")
    writer.add_name("scout-mini")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(DENSE_FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(VOCAB)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(1)
    writer.add_expert_feed_forward_length(EXPERT_FF)
    writer.add_interleave_moe_layer_step(1)
    writer.add_uint32("llama4.attention.chunk_size", CHUNK)
    reader = GGUFReader(tokenizer_path)
    field = lambda key: reader.fields[key].contents()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(field("tokenizer.ggml.tokens"))
    writer.add_token_types(field("tokenizer.ggml.token_type"))
    writer.add_token_merges(field("tokenizer.ggml.merges"))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return writer


def make_config(layers):
    quantization = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    text = {
        "model_type": "llama4_text",
        "hidden_size": HIDDEN,
        "intermediate_size": EXPERT_FF,
        "intermediate_size_mlp": DENSE_FF,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": CHUNK,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "no_rope_layers": [],
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [2],
        "pad_token_id": 2,
    }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "eos_token_id": [2],
        "torch_dtype": "float16",
        "quantization": quantization,
        "quantization_config": quantization,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("tokenizer", help="a GGUF file with SmolLM2's tokenizer")
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    mlx_dir = os.path.join(args.out, "mlx-4bit")
    os.makedirs(mlx_dir, exist_ok=True)
    writer = open_gguf(os.path.join(args.out, "mini-f16.gguf"), args.layers, args.tokenizer)
    files = TwoFiles(writer)
    files.matrix("token_embd.weight", "language_model.model.embed_tokens", (VOCAB, HIDDEN))
    for index in range(args.layers):
        files.layer(index)
    files.norm("output_norm.weight", "language_model.model.norm")
    files.matrix("output.weight", "language_model.lm_head", (VOCAB, HIDDEN))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(files.mlx, os.path.join(mlx_dir, "model.safetensors"), metadata={"format": "mlx"})
    with open(os.path.join(mlx_dir, "config.json"), "w", encoding="utf-8") as file:
        json.dump(make_config(args.layers), file, indent=1)


if __name__ == "__main__":
    main()
