// The load plan: which bytes become which matrix, in MLX's and Hugging Face's layouts, at real sizes without any weights;
// and what is wrong with a checkpoint is said by the tensor's name.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CaravanError } from "../../src/errors.ts";
import { parseModelConfig, readModelConfig } from "../../src/model/config.ts";
import {
  type CheckpointLike,
  type LoadPlan,
  makeLoadPlan,
  type PlannedTensor,
  type TensorLocation,
  tensorMemory,
} from "../../src/model/load-plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { SLOT, type Slot } from "../../src/model/tensor-names.ts";
import {
  llama4Checkpoint,
  llama4Config,
  llama4Shards,
  llama4Tensors,
  tensorBytes,
} from "../tools/llama4-shapes.ts";
import { writeSparseModel } from "../tools/make-sparse-model.ts";

const DATA = join(import.meta.dir, "../golden/data");

async function goldenPlan(name: string): Promise<LoadPlan> {
  const dir = join(DATA, name);
  return makeLoadPlan(readModelConfig(dir), await openCheckpoint(dir));
}

function find(plan: LoadPlan, slot: Slot, layer = -1): PlannedTensor {
  const found = plan.tensors.find((tensor) => tensor.slot === slot && tensor.layer === layer);
  if (found === undefined) throw new Error(`no tensor for slot ${slot} of layer ${layer}`);
  return found;
}

const LLAMA = {
  architectures: ["LlamaForCausalLM"],
  hidden_size: 64,
  intermediate_size: 128,
  num_hidden_layers: 1,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  vocab_size: 96,
};
type Shapes = Record<string, [dtype: string, ...shape: number[]]>;

/** Tensors of LLAMA in bf16. */
function llamaShapes(): Shapes {
  const base = "model.layers.0.";
  return {
    "model.embed_tokens.weight": ["BF16", 96, 64],
    "model.norm.weight": ["BF16", 64],
    "lm_head.weight": ["BF16", 96, 64],
    [`${base}input_layernorm.weight`]: ["BF16", 64],
    [`${base}post_attention_layernorm.weight`]: ["BF16", 64],
    [`${base}self_attn.q_proj.weight`]: ["BF16", 64, 64],
    [`${base}self_attn.k_proj.weight`]: ["BF16", 32, 64],
    [`${base}self_attn.v_proj.weight`]: ["BF16", 32, 64],
    [`${base}self_attn.o_proj.weight`]: ["BF16", 64, 64],
    [`${base}mlp.gate_proj.weight`]: ["BF16", 128, 64],
    [`${base}mlp.up_proj.weight`]: ["BF16", 128, 64],
    [`${base}mlp.down_proj.weight`]: ["BF16", 64, 128],
  };
}

/** A checkpoint of one file in which tensor k begins at byte 1000·(k+1). */
function checkpoint(shapes: Shapes): CheckpointLike {
  const entries = Object.entries(shapes).map(([name, [dtype, ...shape]], k): [string, TensorLocation] => [
    name,
    { file: "/m/model.safetensors", dtype, shape, offset: 1000 * (k + 1) },
  ]);
  return { files: [{ path: "/m/model.safetensors", sizeBytes: 1e9 }], tensors: new Map(entries) };
}

const plan = (shapes: Shapes, config: object = {}): LoadPlan =>
  makeLoadPlan(parseModelConfig({ ...LLAMA, ...config }, "/m/config.json"), checkpoint(shapes));

/** Replaces the module's weight by codes, scales and biases. */
function quantized(
  shapes: Shapes,
  path: string,
  { bits, group, mode = "affine" }: { bits: number; group: number; mode?: string },
): Shapes {
  const [, rows = 0, cols = 0] = shapes[`${path}.weight`] ?? [""];
  const scale = mode === "affine" ? "F16" : "U8";
  return {
    ...shapes,
    [`${path}.weight`]: ["U32", rows, (cols * bits) / 32],
    [`${path}.scales`]: [scale, rows, cols / group],
    ...(mode === "affine" ? { [`${path}.biases`]: [scale, rows, cols / group] } : {}),
  };
}

function refusal(run: () => unknown): CaravanError {
  try {
    run();
  } catch (thrown) {
    if (thrown instanceof CaravanError) return thrown;
    throw thrown;
  }
  throw new Error("nothing was refused");
}

describe("a Llama checkpoint", () => {
  test("gives every matrix its rows and columns, offset and stride", () => {
    const made = plan(llamaShapes());
    expect(made.tensors.length).toBe(12);
    expect(made.unused).toEqual([]);
    expect(find(made, SLOT.k, 0)).toMatchObject({ format: "bf16", experts: 1, rows: 32, cols: 64 });
    expect(find(made, SLOT.down, 0)).toMatchObject({
      rows: 64,
      cols: 128,
      weight: { file: 0, offset: 12000, rowStride: 256 },
    });
    expect(find(made, SLOT.attnNorm, 0)).toMatchObject({ rows: 1, cols: 64 });
  });

  test("ties the head to the embedding when the config says so, and only then", () => {
    const { "lm_head.weight": _, ...tied } = llamaShapes();
    const made = plan(tied, { tie_word_embeddings: true });
    expect(find(made, SLOT.head).weight).toEqual(find(made, SLOT.embed).weight);
    expect(refusal(() => plan(tied)).message).toBe("tensor lm_head.weight is missing");
    const both = plan(llamaShapes(), { tie_word_embeddings: true });
    expect(find(both, SLOT.head).weight).toEqual(find(both, SLOT.embed).weight);
    expect(both.unused).toEqual(["lm_head.weight"]);
  });

  test("may call its head output.weight, and have language_model. before every name", () => {
    const { "lm_head.weight": _, ...rest } = llamaShapes();
    expect(find(plan({ ...rest, "output.weight": ["BF16", 96, 64] }), SLOT.head).weight.offset).toBe(12000);
    const prefixed = Object.fromEntries(
      Object.entries(llamaShapes()).map(([name, shape]) => [`language_model.${name}`, shape]),
    );
    expect(plan(prefixed).tensors.map(({ weight }) => weight)).toEqual(
      plan(llamaShapes()).tensors.map(({ weight }) => weight),
    );
  });

  test("skips vision parts and old tables silently, and lists what else it does not know", () => {
    const made = plan({
      ...llamaShapes(),
      "vision_model.patch_embedding.linear.weight": ["BF16", 4, 4],
      "multi_modal_projector.linear_1.weight": ["BF16", 4, 4],
      "model.layers.0.self_attn.rotary_emb.inv_freq": ["F32", 8],
      "model.layers.7.mlp.up_proj.weight": ["BF16", 128, 64],
    });
    expect(made.unused).toEqual(["model.layers.7.mlp.up_proj.weight"]);
  });

  test("takes biases when the config promises them, leaves them when it does not, refuses a promise without any", () => {
    const bias: Shapes = { ...llamaShapes(), "model.layers.0.self_attn.q_proj.bias": ["F32", 64] };
    const made = plan(bias, { attention_bias: true });
    expect(find(made, SLOT.qBias, 0)).toMatchObject({ format: "f32", rows: 1, cols: 64 });
    expect(plan(bias).unused).toEqual(["model.layers.0.self_attn.q_proj.bias"]);
    const message = (config: object) => refusal(() => plan(llamaShapes(), config)).message;
    expect(message({ attention_bias: true })).toContain("self_attn.q_proj.bias is missing");
    expect(message({ mlp_bias: true })).toContain("mlp.gate_proj.bias is missing");
  });
});

describe("quantization", () => {
  const up = "model.layers.0.mlp.up_proj";

  test.each([2, 3, 4, 5, 6, 8].flatMap((bits) => [32, 64].map((group) => ({ bits, group }))))(
    "of $bits bits in groups of $group is read off the shapes",
    ({ bits, group }) => {
      const made = find(plan(quantized(llamaShapes(), up, { bits, group })), SLOT.up, 0);
      expect(made).toMatchObject({ format: "affine", bits, group, scaleType: "f16", rows: 128, cols: 64 });
      expect(made.weight.rowStride).toBe((64 * bits) / 8);
      expect(made.scales?.rowStride).toBe((64 / group) * 2);
      expect(made.biases?.offset).not.toBe(made.scales?.offset as number);
    },
  );

  test.each([
    { mode: "mxfp4", bits: 4, group: 32, scaleType: "e8m0" },
    { mode: "mxfp8", bits: 8, group: 32, scaleType: "e8m0" },
    { mode: "nvfp4", bits: 4, group: 16, scaleType: "e4m3" },
  ])("in $mode is told by byte scales", ({ mode, bits, group, scaleType }) => {
    const made = find(plan(quantized(llamaShapes(), up, { bits, group, mode })), SLOT.up, 0);
    expect(made).toMatchObject({ format: mode, bits, group, scaleType, biases: undefined });
    const named = plan(quantized(llamaShapes(), up, { bits, group, mode }), {
      quantization: { [up]: { mode } },
    });
    expect(find(named, SLOT.up, 0)).toEqual(made);
  });

  test("of nvfp4 takes the tensor's own scale", () => {
    const shapes = quantized(llamaShapes(), up, { bits: 4, group: 16, mode: "nvfp4" });
    const made = find(plan({ ...shapes, [`${up}.global_scale`]: ["F32", 1] }), SLOT.up, 0);
    expect(made.globalScale?.offset).toBeGreaterThan(0);
    const wrong = refusal(() => plan({ ...shapes, [`${up}.global_scale`]: ["F32", 2] }));
    expect(wrong.message).toContain(`${up}.global_scale has shape [2]`);
  });

  test("by an entry of its own wins over the numbers at the top, which do not complete it", () => {
    const shapes = quantized(llamaShapes(), up, { bits: 8, group: 32 });
    const top = { mode: "mxfp4", bits: 4, group_size: 32 };
    const made = plan(shapes, { quantization: { ...top, [up]: { bits: 8, group_size: 32 } } });
    expect(find(made, SLOT.up, 0)).toMatchObject({ format: "affine", bits: 8, group: 32 });
    const contradicted = refusal(() =>
      plan(shapes, { quantization: { ...top, [up]: { bits: 4, group_size: 32 } } }),
    );
    expect(contradicted).toMatchObject({ code: "bad_file" });
    expect(contradicted.message).toContain(up);
  });

  test("that config.json and the checkpoint do not agree on is an error", () => {
    const shapes = quantized(llamaShapes(), up, { bits: 4, group: 32 });
    const denied = refusal(() => plan(shapes, { quantization: { [up]: false } }));
    expect(denied.message).toBe(`${up} is left in float by config.json, but has scales`);
    const promised = refusal(() =>
      plan(llamaShapes(), { quantization: { [up]: { bits: 4, group_size: 32 } } }),
    );
    expect(promised.message).toBe(`${up} is quantized by config.json, but has no scales`);
    expect(find(plan(llamaShapes(), { quantization: { [up]: false } }), SLOT.up, 0).format).toBe("bf16");
  });

  test.each([
    { bits: 1, group: 32 },
    { bits: 7, group: 32 },
    { bits: 4, group: 16 },
  ])("of $bits bits in groups of $group is refused by the module's name", ({ bits, group }) => {
    const error = refusal(() => plan(quantized(llamaShapes(), up, { bits, group })));
    expect(error).toMatchObject({ code: "unsupported_model", where: "/m/model.safetensors" });
    expect(error.message).toContain(up);
    expect(error.hint).toContain("affine (2, 3, 4, 5, 6, 8 bits");
  });
});

describe("a damaged checkpoint is refused by the tensor's name", () => {
  const down = "model.layers.0.mlp.down_proj.weight";
  const cases: [string, Shapes, RegExp][] = [
    ["a missing tensor", { [down]: undefined as never }, /down_proj.weight is missing/],
    [
      "swapped sides",
      { [down]: ["BF16", 128, 64] },
      /down_proj.weight has shape \[128, 64\].*asks for \[64, 128\]/,
    ],
    ["a dimension more", { [down]: ["BF16", 1, 1, 64, 128] }, /down_proj.weight has shape/],
    ["an integer type", { [down]: ["I32", 64, 128] }, /down_proj.weight: type I32/],
    ["a norm of another length", { "model.norm.weight": ["BF16", 32] }, /model.norm.weight has shape \[32\]/],
    [
      "biases of another shape",
      {
        ...quantized(llamaShapes(), "lm_head", { bits: 4, group: 32 }),
        "lm_head.biases": ["F16", 96, 1],
      },
      /lm_head.biases has shape/,
    ],
  ];
  test.each(cases)("%s", (_, change, message) => {
    const shapes = Object.fromEntries(
      Object.entries({ ...llamaShapes(), ...change }).filter(([, shape]) => shape !== undefined),
    );
    const error = refusal(() => plan(shapes));
    expect(error.message).toMatch(message);
    expect(error.where).toBe("/m/model.safetensors");
  });
});

describe("experts", () => {
  test("in Hugging Face's layout become transposed views: gate the first half, up the second", async () => {
    const made = await goldenPlan("scout-hf-bf16");
    const { experts, hiddenSize: hidden, expertSize: ff } = made.config;
    const gate = find(made, SLOT.expertGate, 3);
    const up = find(made, SLOT.expertUp, 3);
    expect(gate).toMatchObject({ transposed: true, experts, rows: ff, cols: hidden, format: "bf16" });
    expect(gate.weight).toMatchObject({ rowStride: 2 * ff * 2, outerStride: hidden * 2 * ff * 2 });
    expect(up.weight).toEqual({ ...gate.weight, offset: gate.weight.offset + ff * 2 });
    expect(find(made, SLOT.expertDown, 3)).toMatchObject({
      transposed: true,
      rows: hidden,
      cols: ff,
      weight: { rowStride: hidden * 2, outerStride: ff * hidden * 2 },
    });
  });

  test("in MLX's layout have one matrix after the other; modules keep widths of their own", async () => {
    const made = await goldenPlan("scout-mixed");
    const down = find(made, SLOT.expertDown, 0);
    expect(down).toMatchObject({ format: "affine", bits: 6, group: 32, experts: 16, rows: 64, cols: 128 });
    expect(down.weight.outerStride).toBe(64 * down.weight.rowStride);
    expect(find(made, SLOT.expertUp, 0)).toMatchObject({ bits: 4, group: 64 });
    expect(find(made, SLOT.router, 0).format).toBe("bf16");
    expect(find(made, SLOT.head)).toMatchObject({ bits: 6, group: 32 });
  });

  test("stand in every second layer of Maverick, with dense layers between", async () => {
    const made = await goldenPlan("maverick-4bit");
    expect(find(made, SLOT.gate, 0)).toMatchObject({ rows: 128, experts: 1 });
    expect(find(made, SLOT.expertGate, 1)).toMatchObject({ rows: 64, experts: 128 });
    expect(made.tensors.filter(({ slot }) => slot === SLOT.router).map(({ layer }) => layer)).toEqual([1, 3]);
  });
});

/** Two norms, four attention matrices, and: router, three matrices of experts, three shared; or three dense ones. */
const MOE_LAYER = 2 + 4 + 1 + 3 + 3;
const DENSE_LAYER = 2 + 4 + 3;

describe("at real size", () => {
  test.each([
    { name: "scout" as const, bytes: 60_621_260_800, tensors: 48 * MOE_LAYER + 3 },
    { name: "maverick" as const, bytes: 225_401_128_960, tensors: 24 * (MOE_LAYER + DENSE_LAYER) + 3 },
  ])("$name is planned whole: every tensor used, every view inside its file", ({ name, bytes, tensors }) => {
    const shards = llama4Shards(llama4Tensors(name));
    const made = makeLoadPlan(
      parseModelConfig(llama4Config(name), "/m/config.json"),
      llama4Checkpoint(shards, "/m"),
    );
    expect(made.unused).toEqual([]);
    expect(made.tensors.length).toBe(tensors);
    expect(tensorBytes(shards)).toBe(bytes);
    let mapped = 0;
    for (const tensor of made.tensors) {
      const memory = tensorMemory(tensor);
      mapped += memory.mapped;
      for (const view of [tensor.weight, tensor.scales, tensor.biases]) {
        if (view === undefined) continue;
        const last = view.offset + (tensor.experts - 1) * view.outerStride + tensor.rows * view.rowStride;
        expect(last).toBeLessThanOrEqual(made.files[view.file]?.sizeBytes ?? 0);
      }
    }
    // Aligned files: nothing but the norms' float32 forms is copied.
    expect(mapped).toBe(bytes);
    for (const { layout } of shards) expect(layout.sizeBytes).toBeLessThanOrEqual(5 * 2 ** 30 + 2 ** 20);
  });

  test("a matrix of one expert tensor larger than 4 GiB keeps exact offsets", () => {
    const shapes = llamaShapes();
    const rows = 40_000_000;
    shapes["model.embed_tokens.weight"] = ["BF16", rows, 64];
    shapes["lm_head.weight"] = ["BF16", rows, 64];
    const made = plan(shapes, { vocab_size: rows });
    expect(find(made, SLOT.embed).weight.outerStride).toBe(rows * 128);
    expect(rows * 128).toBeGreaterThan(2 ** 32);
  });
});

describe("a sparse model", () => {
  let dir: string;
  beforeAll(() => {
    dir = mkdtempSync(join(tmpdir(), "caravan-sparse-"));
  });
  afterAll(() => {
    rmSync(dir, { recursive: true });
  });

  test("of Maverick's 225 GB opens from its headers and is planned in place", async () => {
    const total = writeSparseModel(dir, "maverick", 48);
    const opened = await openCheckpoint(dir);
    expect(opened.sizeBytes).toBe(total);
    const made = makeLoadPlan(readModelConfig(dir), opened);
    expect(made.unused).toEqual([]);
    expect(made.config.layers.filter(({ moe }) => moe).length).toBe(24);
  });
});
