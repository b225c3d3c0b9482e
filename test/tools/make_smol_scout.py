#!/usr/bin/env python3
"""A real model in Llama 4's architecture: SmolLM2, rewritten without loss as an alternating dense/MoE Llama 4 checkpoint.

There is no small Llama 4. This makes one whose text is known: it says what SmolLM2 says.

- Even layers stay dense. In odd layers the first half of the MLP's neurons becomes the shared expert. The second half
  becomes every routed expert, with its groups of 32 neurons in another order for each: the same function, different weights.
- Router rows come in pairs +v, -v with a large norm, so the choice depends on the token while the score, sigmoid(large), is 1
  (but for a rare token, on whose input all of a layer's rows happen to be nearly perpendicular).
- RoPE on every layer, rows of q and k in interleaved order; no QK norm, no temperature tuning; chunks of 8192.

A wrong router, expert index, stride, score or interleaving shows as garbage at once. When all is right the logits equal
SmolLM2's within float error. Codes, scales and biases are moved, never requantized.

usage: make_smol_scout.py SMOLLM2_DIR OUT_DIR [--experts 4]
SMOLLM2_DIR is what `caravan import` makes of the GGUF file (`make run` leaves it in .models/smollm2).
Needs numpy and safetensors. Not needed by `make test`.
"""
import argparse
import json
import os
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

GROUP = 32  # columns a scale
WORDS = 4  # uint32 words of 32 codes of 4 bits
PREFIX = "language_model."
PARTS = (".weight", ".scales", ".biases")
# With this norm every |logit| of the router is so large that its sigmoid is 0 or 1 in float32.
ROUTER_NORM = 2000
SEED = 5


class Rewriter:
    def __init__(self, weights, config, experts):
        self.source = weights
        self.config = config
        self.experts = experts
        self.out = {}
        self.random = np.random.default_rng(SEED)
        # Paths of modules whose quantization differs from the default.
        self.overrides = {}

    def take(self, path, rows=None, groups=None):
        """The module's three arrays: `rows` of outputs, and `groups` of 32 input columns, in the order given."""
        weight, scales, biases = (self.source[path + part] for part in PARTS)
        if rows is not None:
            weight, scales, biases = weight[rows], scales[rows], biases[rows]
        if groups is not None:
            if weight.shape[1] != scales.shape[1] * WORDS:
                raise SystemExit(f"{path}: 4 bits in groups of {GROUP} are expected")
            by_group = weight.reshape(weight.shape[0], -1, WORDS)
            weight = by_group[:, groups].reshape(weight.shape[0], -1)
            scales, biases = scales[:, groups], biases[:, groups]
        return weight, scales, biases

    def put(self, path, arrays):
        for part, array in zip(PARTS, arrays):
            self.out[PREFIX + path + part] = np.ascontiguousarray(array)

    def copy(self, path):
        self.put(path, self.take(path))

    def interleaved(self, heads):
        """Row numbers that turn half-split RoPE, pairs (j, j + d/2), into interleaved, pairs (2j, 2j + 1)."""
        dim = self.config["head_dim"]
        return np.arange(heads * dim).reshape(heads, 2, dim // 2).swapaxes(1, 2).reshape(-1)

    def layer(self, index):
        base = f"model.layers.{index}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            self.out[PREFIX + base + norm] = self.source[base + norm]
        attention = base + "self_attn."
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.put(attention + "q_proj", self.take(attention + "q_proj", self.interleaved(heads)))
        self.put(attention + "k_proj", self.take(attention + "k_proj", self.interleaved(kv_heads)))
        self.copy(attention + "v_proj")
        self.copy(attention + "o_proj")
        if index % 2 == 0:
            for name in ("gate_proj", "up_proj", "down_proj"):
                self.put(base + "feed_forward." + name, self.take(base + "mlp." + name))
        else:
            self.experts_of(base + "mlp.", base + "feed_forward.")

    def experts_of(self, mlp, feed_forward):
        half = self.config["intermediate_size"] // 2
        groups = half // GROUP
        for name in ("gate_proj", "up_proj"):
            self.put(f"{feed_forward}shared_expert.{name}", self.take(mlp + name, rows=np.arange(half)))
        self.put(f"{feed_forward}shared_expert.down_proj", self.take(mlp + "down_proj", groups=np.arange(groups)))

        orders = [groups + self.random.permutation(groups) for _ in range(self.experts)]
        for name in ("gate_proj", "up_proj"):
            each = [self.take(mlp + name, rows=rows_of(order)) for order in orders]
            self.put(f"{feed_forward}experts.{name}", [np.stack(parts) for parts in zip(*each)])
        each = [self.take(mlp + "down_proj", groups=order) for order in orders]
        self.put(f"{feed_forward}experts.down_proj", [np.stack(parts) for parts in zip(*each)])

        directions = self.random.standard_normal((self.experts // 2, self.config["hidden_size"]))
        directions *= ROUTER_NORM / np.linalg.norm(directions, axis=1, keepdims=True)
        router = np.stack([directions, -directions], axis=1).reshape(self.experts, -1)
        self.out[f"{PREFIX}{feed_forward}router.weight"] = router.astype(np.float16)
        self.overrides[f"{PREFIX}{feed_forward}router"] = False

    def model(self):
        self.copy("model.embed_tokens")
        self.out[PREFIX + "model.norm.weight"] = self.source["model.norm.weight"]
        for index in range(self.config["num_hidden_layers"]):
            self.layer(index)
        return self.out


def rows_of(groups):
    """Row numbers of groups of 32 neurons."""
    return (groups[:, None] * GROUP + np.arange(GROUP)).reshape(-1)


def make_config(source, experts, overrides):
    layers = source["num_hidden_layers"]
    kept = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_theta vocab_size"
    )
    ends = {key: source[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in source}
    text = {
        "model_type": "llama4_text",
        **{key: source[key] for key in kept.split()},
        "intermediate_size": source["intermediate_size"] // 2,
        "intermediate_size_mlp": source["intermediate_size"],
        "rope_scaling": None,
        "max_position_embeddings": source["max_position_embeddings"],
        "tie_word_embeddings": True,
        "num_local_experts": experts,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "moe_layers": list(range(1, layers, 2)),
        "no_rope_layers": [1] * layers,
        "attention_chunk_size": 8192,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "attention_bias": False,
        **ends,
    }
    quantization = {
        (PREFIX + key if key.startswith("model.") else key): value for key, value in source["quantization"].items()
    }
    quantization.update(overrides)
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "tie_word_embeddings": True,
        "torch_dtype": source.get("torch_dtype", "float16"),
        **ends,
        "quantization": quantization,
        "quantization_config": quantization,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of SmolLM2 in MLX format")
    parser.add_argument("out")
    parser.add_argument("--experts", type=int, default=4, help="an even number")
    args = parser.parse_args()
    if args.experts < 2 or args.experts % 2:
        parser.error("--experts must be even")
    with open(os.path.join(args.source, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    if not config.get("tie_word_embeddings"):
        raise SystemExit("a model with tied embeddings is expected")
    rewriter = Rewriter(load_file(os.path.join(args.source, "model.safetensors")), config, args.experts)
    weights = rewriter.model()
    os.makedirs(args.out, exist_ok=True)
    save_file(weights, os.path.join(args.out, "model.safetensors"), metadata={"format": "mlx"})
    with open(os.path.join(args.out, "config.json"), "w", encoding="utf-8") as file:
        json.dump(make_config(config, args.experts, rewriter.overrides), file, indent=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if os.path.exists(os.path.join(args.source, name)):
            shutil.copy(os.path.join(args.source, name), args.out)


if __name__ == "__main__":
    main()
