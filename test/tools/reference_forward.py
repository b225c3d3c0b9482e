#!/usr/bin/env python3
"""Logits of a small Llama or Llama 4 checkpoint in plain numpy: a second opinion on the engine, written from the formulas.

One pass over all tokens, without a cache and without pieces; float64 over the stored weights widened exactly, so that an
engine's float32 rounding is all that a comparison can show. Reads MLX's and Hugging Face's names and layouts, float and
quantized (affine, mxfp4, mxfp8, nvfp4). Slow, and everything is held in memory: for tiny checkpoints.

usage: reference_forward.py CHECKPOINT_DIR --check                compares with the goldens in that folder
       reference_forward.py CHECKPOINT_DIR --tokens 1,2,3 --out logits.npy
Needs numpy. Not needed by `make test`.
"""
import argparse
import glob
import json
import os

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4 = np.concatenate([E2M1, -E2M1])
NVFP4_RANGE = 448 * 6  # largest e4m3 times largest e2m1
SCALED_FLOATS = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "I32": "<i4", "U8": "u1"}


def e4m3_table():
    """The 256 values of float8 e4m3fn: bias 7, no infinities, 0x7f and 0xff are NaN."""
    out = np.empty(256)
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        out[byte] = np.nan if byte & 127 == 127 else -value if byte >> 7 else value
    return out


E4M3 = e4m3_table()


# ---- files -----------------------------------------------------------------------------------------------------------


def read_safetensors(path):
    """Name to array; bfloat16 becomes float32, which holds it exactly."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        array = np.frombuffer(data[first:last], TYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        out[name] = array
    return out


def unpack(words, bits):
    """uint32 [.., n*bits/32] to codes [.., n]: a row is one little-endian stream of bits."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(*words.shape[:-1], -1, bits) @ (1 << np.arange(bits))


class Weights:
    """A checkpoint's tensors by their names without `language_model.`, widened to float64."""

    def __init__(self, folder):
        self.tensors = {}
        for path in sorted(glob.glob(os.path.join(folder, "model*.safetensors"))):
            for name, array in read_safetensors(path).items():
                self.tensors[name.removeprefix("language_model.")] = array

    def get(self, name):
        """A float tensor, None where there is none."""
        found = self.tensors.get(name)
        return None if found is None else found.astype(np.float64)

    def matrix(self, path, cols):
        """[rows, cols] or [experts, rows, cols] of a module."""
        weight, scales, biases = (self.tensors.get(path + part) for part in (".weight", ".scales", ".biases"))
        if scales is None:
            return weight.astype(np.float64)
        bits, group = weight.shape[-1] * 32 // cols, cols // scales.shape[-1]
        codes = unpack(weight, bits)
        wide = lambda array: np.repeat(array.astype(np.float64), group, axis=-1)
        if biases is not None:
            return codes * wide(scales) + wide(biases)
        mode = SCALED_FLOATS[bits, group]
        if mode != "nvfp4":
            return (E4M3 if mode == "mxfp8" else FP4)[codes] * wide(2.0 ** (scales.astype(np.float64) - 127))
        total = self.tensors.get(path + ".global_scale")
        factor = 1.0 if total is None else total.astype(np.float64).reshape(-1, *[1] * (codes.ndim - 1)) / NVFP4_RANGE
        return FP4[codes] * wide(E4M3[scales]) * factor


# ---- the model -------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight


def silu(x):
    return x / (1 + np.exp(-x))


def frequencies(config, head_dim):
    """float64 [head_dim/2]"""
    scaling = dict(config.get("rope_scaling") or {})
    scaling.update(config.get("rope_parameters") or {})
    theta = config.get("rope_theta") or scaling["rope_theta"]
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / scaling["factor"]
    if kind != "llama3":
        raise SystemExit(f"rope_type {kind}")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns > high).astype(np.float64)
    return plain * (blend + (1 - blend) / scaling["factor"])


def rotate(x, angles, interleaved):
    """x [tokens, heads, d]; angles [tokens, d/2]"""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = a * cos - b * sin, a * sin + b * cos
    return np.stack(turned, -1).reshape(x.shape) if interleaved else np.concatenate(turned, -1)


class Model:
    def __init__(self, folder):
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            outer = json.load(file)
        self.llama4 = "Llama4" in outer["architectures"][0]
        self.config = config = {**outer, **outer.get("text_config", {})}
        self.weights = Weights(folder)
        self.hidden, self.eps = config["hidden_size"], config["rms_norm_eps"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.head_dim = config.get("head_dim") or self.hidden // self.heads
        self.inv_freq = frequencies(config, self.head_dim)

    def module(self, path, x):
        """x·Wᵀ + b"""
        y = x @ self.weights.matrix(path, x.shape[-1]).T
        bias = self.weights.get(path + ".bias")
        return y if bias is None else y + bias

    def has_rope(self, layer):
        listed = self.config.get("no_rope_layers") or []
        if not self.llama4:
            return True
        return bool(listed[layer]) if listed else (layer + 1) % self.config.get("no_rope_layer_interval", 4) != 0

    def is_moe(self, layer):
        if not self.llama4 or not self.config.get("num_local_experts"):
            return False
        listed = self.config.get("moe_layers")
        return layer in listed if listed is not None else (layer + 1) % self.config["interleave_moe_layer_step"] == 0

    def attention(self, layer, x):
        config, tokens = self.config, len(x)
        base = f"model.layers.{layer}.self_attn."
        q, k, v = (self.module(base + name, x).reshape(tokens, -1, self.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
        at = np.arange(tokens)
        seen = at[None, :] <= at[:, None]
        rope = self.has_rope(layer)
        if rope:
            angles = at[:, None] * self.inv_freq
            q, k = (rotate(each, angles, self.llama4) for each in (q, k))
        if self.llama4 and rope:
            if config.get("use_qk_norm", True):
                q, k = (rms_norm(each, None, self.eps) for each in (q, k))
            chunk = config.get("attention_chunk_size")
            if chunk:
                seen &= at[None, :] // chunk == at[:, None] // chunk
        elif self.llama4 and config.get("attn_temperature_tuning", True):
            q = q * (1 + config["attn_scale"] * np.log(1 + np.floor((at + 1) / config["floor_scale"])))[:, None, None]
        k, v = (np.repeat(each, self.heads // self.kv_heads, axis=1) for each in (k, v))
        scores = np.where(seen, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self.module(base + "o_proj", np.einsum("hqk,khd->qhd", weights, v).reshape(tokens, -1))

    def mlp(self, base, x):
        act = silu(self.module(base + "gate_proj", x)) * self.module(base + "up_proj", x)
        return self.module(base + "down_proj", act)

    def expert_matrices(self, base):
        """gate, up [experts, ff, hidden] and down [experts, hidden, ff]"""
        fused = self.weights.get(base + "gate_up_proj")
        ff = self.config["intermediate_size"]
        if fused is not None:
            gate_up = np.swapaxes(fused, 1, 2)
            return gate_up[:, :ff], gate_up[:, ff:], np.swapaxes(self.weights.get(base + "down_proj"), 1, 2)
        inputs = (("gate_proj", self.hidden), ("up_proj", self.hidden), ("down_proj", ff))
        return [self.weights.matrix(base + name, cols) for name, cols in inputs]

    def experts(self, base, x):
        gate, up, down = self.expert_matrices(base + "experts.")
        scores = self.module(base + "router", x)
        y = self.mlp(base + "shared_expert.", x)
        chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : self.config["num_experts_per_tok"]]
        for token, experts in enumerate(chosen):
            for e in experts:
                scaled = x[token] / (1 + np.exp(-scores[token, e]))
                y[token] += down[e] @ (silu(gate[e] @ scaled) * (up[e] @ scaled))
        return y

    def logits(self, tokens):
        """float64 [tokens, vocab]"""
        embed = self.weights.matrix("model.embed_tokens", self.hidden)
        h = embed[np.asarray(tokens)]
        for layer in range(self.config["num_hidden_layers"]):
            base = f"model.layers.{layer}."
            norm = lambda name: rms_norm(h, self.weights.get(f"{base}{name}.weight"), self.eps)
            h = h + self.attention(layer, norm("input_layernorm"))
            x = norm("post_attention_layernorm")
            feed = base + ("feed_forward." if self.llama4 else "mlp.")
            h = h + (self.experts(feed, x) if self.is_moe(layer) else self.mlp(feed, x))
        h = rms_norm(h, self.weights.get("model.norm.weight"), self.eps)
        return h @ embed.T if self.config.get("tie_word_embeddings") else self.module("lm_head", h)


# ---- command line ----------------------------------------------------------------------------------------------------


def check(folder):
    """Prints the largest difference from each golden in the folder."""
    goldens = {}
    for name in ("golden.safetensors", "golden_hf.safetensors"):
        path = os.path.join(folder, name)
        goldens.update(read_safetensors(path) if os.path.exists(path) else {})
    tokens = np.concatenate([goldens["prompt"], goldens["tokens"][:-1]])
    mine = Model(folder).logits(tokens)
    fixed = "fixeps_" if "fixeps_prefill" in goldens else ""
    for prefix in (fixed, "hf_", "numpy_"):
        if prefix + "prefill" in goldens:
            theirs = np.concatenate([goldens[prefix + "prefill"], goldens[prefix + "decode"]])
            print(f"{os.path.basename(os.path.normpath(folder))} {prefix or 'mlx_'}: {np.abs(mine - theirs).max():.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tokens", help="ids with commas between")
    parser.add_argument("--out", help=".npy file, float32 [tokens, vocab]")
    args = parser.parse_args()
    if args.check:
        check(args.folder)
        return
    if not args.tokens or not args.out:
        parser.error("--check, or --tokens and --out")
    logits = Model(args.folder).logits([int(token) for token in args.tokens.split(",")])
    np.save(args.out, logits.astype(np.float32))


if __name__ == "__main__":
    main()
