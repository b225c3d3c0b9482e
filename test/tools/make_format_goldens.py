#!/usr/bin/env python3
"""Tiny random checkpoints in the weight formats that no other golden has, with logits by reference_forward.py.

Each is a whole model with one format nearly everywhere: two layers of Llama 4 (dense with RoPE in chunks of 16, then four
experts, two a token, with NoPE and temperature tuning), and a Llama with biases. The same seed gives the same bytes.

usage: make_format_goldens.py OUT_DIR        writes OUT_DIR/formats-*/{config.json,model.safetensors,golden.safetensors}
Needs numpy. Not needed by `make test`.
"""
import json
import os
import sys
import zlib

import numpy as np

from reference_forward import E2M1, E4M3, NVFP4_RANGE, Model

VOCAB, PROMPT, DECODED = 128, 40, 30
SEED = 4

LLAMA4_TEXT = {
    "model_type": "llama4_text",
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_layers": [1],
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 16,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8,
    "attn_scale": 0.1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": [2, 3],
}
LLAMA4 = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": LLAMA4_TEXT}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "attention_bias": True,
    "mlp_bias": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": [2, 3],
}


# ---- number formats --------------------------------------------------------------------------------------------------


def bf16(x):
    """float32 to the nearest bfloat16 (ties to even), as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def stored_float(x, kind):
    """(safetensors type, array as stored, the same as float64)"""
    if kind == "bf16":
        stored = bf16(x)
        return "BF16", stored, (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    stored = x.astype(np.float16 if kind == "f16" else np.float32)
    return kind.upper(), stored, stored.astype(np.float64)


def pack(codes, bits):
    """[.., n] to uint32 [.., n*bits/32]: a row is one little-endian stream of bits."""
    stream = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little").view(np.uint32)


def nearest(table, x):
    """Index of the nearest value of an ascending table."""
    at = np.clip(np.searchsorted(table, x), 1, len(table) - 1)
    return np.where(x - table[at - 1] <= table[at] - x, at - 1, at)


def signed_codes(magnitudes, x, sign_bit):
    return nearest(magnitudes, np.abs(x)) | np.where(x < 0, sign_bit, 0)


def grouped(x, group):
    return x.reshape(*x.shape[:-1], -1, group)


def affine(x, bits, group, scales):
    """MLX's rule: the end of larger magnitude is exact, so scales may be negative."""
    levels = 2**bits - 1
    groups = grouped(x, group)
    low, high = groups.min(-1), groups.max(-1)
    scale = np.maximum((high - low) / levels, 1e-7)
    from_low = np.abs(low) > np.abs(high)
    edge = np.where(from_low, low, high)
    scale = np.where(from_low, scale, -scale)
    steps = np.round(edge / scale)
    scale = np.where(steps != 0, edge / np.where(steps == 0, 1, steps), scale)
    kind, stored_scale, scale = stored_float(scale, scales)
    _, stored_bias, bias = stored_float(np.where(steps != 0, edge, 0), scales)
    codes = np.clip(np.round((groups - bias[..., None]) / scale[..., None]), 0, levels).reshape(x.shape)
    return {"weight": ("U32", pack(codes, bits)), "scales": (kind, stored_scale), "biases": (kind, stored_bias)}


def mxfp(x, bits):
    """Groups of 32 with a power of two; its exponent puts the largest value into the format's top binade."""
    groups = grouped(x, 32)
    top = 2 if bits == 4 else 8
    exponent = np.floor(np.log2(np.abs(groups).max(-1))) - top
    scaled = groups / 2.0 ** exponent[..., None]
    codes = signed_codes(E2M1, scaled, 8) if bits == 4 else signed_codes(E4M3[:127], scaled, 128)
    scales = (exponent + 127).astype(np.uint8)
    return {"weight": ("U32", pack(codes.reshape(x.shape), bits)), "scales": ("U8", scales)}


def nvfp4(x, own_scale):
    """Groups of 16 with an e4m3 scale; own_scale: and one float32 a matrix, its largest magnitude."""
    groups = grouped(x, 16)
    largest = np.abs(x).max((-2, -1), keepdims=True)[..., None] if own_scale else np.float64(NVFP4_RANGE)
    largest = largest.astype(np.float32).astype(np.float64)
    factor = largest / NVFP4_RANGE
    codes = nearest(E4M3[:127], (np.abs(groups).max(-1, keepdims=True) / 6 / factor))
    scaled = groups / np.maximum(E4M3[codes] * factor, 1e-12)
    out = {
        "weight": ("U32", pack(signed_codes(E2M1, scaled, 8).reshape(x.shape), 4)),
        "scales": ("U8", codes[..., 0].astype(np.uint8)),
    }
    if own_scale:
        out["global_scale"] = ("F32", largest.reshape(-1).astype(np.float32))
    return out


# ---- what is where ---------------------------------------------------------------------------------------------------


def quantized(mode, **numbers):
    return {"mode": mode, **numbers}


def two_bits(path):
    if path.endswith("lm_head"):
        return quantized("affine", bits=8, group_size=32, scales="f32")
    if path.endswith("router"):
        return "f32"
    return quantized("affine", bits=2, group_size=32, scales="f32")


def three_bits(path):
    wide = path.endswith(("o_proj", "layers.0.feed_forward.down_proj"))  # 128 inputs
    if path.endswith("embed_tokens"):
        return quantized("affine", bits=6, group_size=64, scales="f16")
    return quantized("affine", bits=3, group_size=128 if wide else 64, scales="f16")


VARIANTS = {
    "formats-f16-f32": (LLAMA4, lambda path: "f16" if "self_attn" in path or path.endswith(("up_proj", "embed_tokens")) else "f32"),
    "formats-2bit": (LLAMA4, two_bits),
    "formats-3bit": (LLAMA4, three_bits),
    "formats-5bit": (LLAMA4, lambda path: quantized("affine", bits=5, group_size=32, scales="bf16")),
    "formats-mxfp4": (LLAMA4, lambda path: quantized("mxfp4", bits=4, group_size=32)),
    "formats-mxfp8": (LLAMA4, lambda path: quantized("mxfp8", bits=8, group_size=32)),
    # Attention without, experts and the rest with a scale of the matrix.
    "formats-nvfp4": (LLAMA4, lambda path: quantized("nvfp4", bits=4, group_size=16)),
    "formats-llama-biases": (LLAMA, lambda path: quantized("affine", bits=4, group_size=128, scales="f16")),
}


def encode(x, how, path):
    if isinstance(how, str):
        kind, stored, _ = stored_float(x, how)
        return {"weight": (kind, stored)}
    if how["mode"] == "affine":
        return affine(x, how["bits"], how["group_size"], how["scales"])
    return nvfp4(x, "self_attn" not in path) if how["mode"] == "nvfp4" else mxfp(x, how["bits"])


def entry(how):
    """A module's entry in config.json's `quantization`."""
    return False if isinstance(how, str) else {key: value for key, value in how.items() if key != "scales"}


def modules(config):
    """(path, shape) of every matrix and its bias, (path, length) of every norm, in the order of the model."""
    text = config.get("text_config", config)
    llama4 = "text_config" in config
    hidden, ff = text["hidden_size"], text["intermediate_size"]
    head_dim = text.get("head_dim", hidden // text["num_attention_heads"])
    q, kv = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    mlp = lambda base, width, *lead: [
        (base + "gate_proj", (*lead, width, hidden)),
        (base + "up_proj", (*lead, width, hidden)),
        (base + "down_proj", (*lead, hidden, width)),
    ]
    out = [("model.embed_tokens", (VOCAB, hidden))]
    for layer in range(text["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        out += [(base + "input_layernorm", (hidden,)), (base + "post_attention_layernorm", (hidden,))]
        for name, shape in (("q", (q, hidden)), ("k", (kv, hidden)), ("v", (kv, hidden)), ("o", (hidden, q))):
            out.append((f"{base}self_attn.{name}_proj", shape))
        feed = base + ("feed_forward." if llama4 else "mlp.")
        if llama4 and layer in text["moe_layers"]:
            experts = text["num_local_experts"]
            out += [(feed + "router", (experts, hidden)), *mlp(feed + "experts.", ff, experts), *mlp(feed + "shared_expert.", ff)]
        else:
            out += mlp(feed, text["intermediate_size_mlp"] if llama4 else ff)
    out.append(("model.norm", (hidden,)))
    if not text["tie_word_embeddings"]:
        out.append(("lm_head", (VOCAB, hidden)))
    return out


def random_tensor(path, shape, tied=False):
    """float32 values of a size that keeps every part of the model in play. A tied embedding is the head too."""
    x = np.random.default_rng(zlib.crc32(path.encode()) + SEED).standard_normal(shape).astype(np.float32)
    if "norm" in path:
        return 1 + 0.1 * x
    if "embed" in path:
        return x * np.float32(0.25 if tied else 1.5)
    return x * np.float32((2.5 if path.endswith("lm_head") else 1.5) * shape[-1] ** -0.5)


def write_safetensors(path, tensors):
    """name to (type, array); the header is padded, so that every tensor lies on its own alignment where types allow."""
    header, at = {"__metadata__": {"format": "mlx"}}, 0
    for name, (kind, array) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def make(folder, config, format_of):
    os.makedirs(folder, exist_ok=True)
    prefix = "language_model." if "text_config" in config else ""
    tensors, entries = {}, {}
    for path, shape in modules(config):
        x = random_tensor(path, shape, config.get("tie_word_embeddings", False))
        if len(shape) == 1:
            kind, stored, _ = stored_float(x, "f32")
            tensors[f"{prefix}{path}.weight"] = (kind, stored)
            continue
        how = format_of(path)
        entries[prefix + path] = entry(how)
        for part, stored in encode(x.astype(np.float64), how, path).items():
            tensors[f"{prefix}{path}.{part}"] = stored
        if config.get("attention_bias") and "layers" in path:
            kind, stored, _ = stored_float(0.3 * random_tensor(path + ".bias", (shape[0], 1))[:, 0], "f16")
            tensors[f"{prefix}{path}.bias"] = (kind, stored)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    usual = next((each for each in entries.values() if each), None)
    quantization = {"quantization": {**usual, **{path: each for path, each in entries.items() if each != usual}}} if usual else {}
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump({**config, "torch_dtype": "float16", **quantization}, file, indent=1)


def golden(folder):
    model = Model(folder)
    prompt = np.random.default_rng(SEED).integers(4, VOCAB, PROMPT)
    tokens = list(prompt)
    for _ in range(DECODED + 1):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    logits = model.logits(tokens[:-1]).astype(np.float32)
    out = {
        "prompt": ("I32", prompt.astype(np.int32)),
        "tokens": ("I32", np.array(tokens[PROMPT:], np.int32)),
        "numpy_prefill": ("F32", logits[:PROMPT]),
        "numpy_decode": ("F32", logits[PROMPT:]),
    }
    write_safetensors(os.path.join(folder, "golden.safetensors"), out)
    return logits


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    for name, (config, format_of) in VARIANTS.items():
        folder = os.path.join(sys.argv[1], name)
        make(folder, config, format_of)
        logits = golden(folder)
        size = os.path.getsize(os.path.join(folder, "model.safetensors"))
        print(f"{name}: {size} bytes, logits' deviation {logits.std():.2f}")


if __name__ == "__main__":
    main()
