// Whole imports of tiny GGUF models: names, values, config, tokenizer, what is refused, and what is left behind.

import { afterAll, beforeEach, describe, expect, test } from "bun:test";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import { CaravanError } from "../../src/errors.ts";
import { type ImportOptions, importGguf } from "../../src/model/gguf/importer.ts";
import { fitRopeScaling, type Llama3RopeScaling, llama3Factors } from "../../src/model/gguf/rope-scaling.ts";
import { isAligned, openCheckpoint } from "../../src/model/safetensors.ts";
import {
  buildGguf,
  floats,
  type Kv,
  type TensorInput,
  type TinyModel,
  tinyModel,
} from "../tools/gguf-writer.ts";

let dir = mkdtempSync(join(tmpdir(), "caravan-import-"));
const root = dir;
let count = 0;
beforeEach(() => {
  dir = join(root, String(count++));
  mkdirSync(dir);
});
afterAll(() => rmSync(root, { recursive: true, force: true }));

const out = () => join(dir, "out");

function run({ metadata, tensors }: TinyModel, options: ImportOptions = {}) {
  const path = join(dir, "in.gguf");
  writeFileSync(path, buildGguf(metadata, tensors));
  return importGguf(path, out(), options);
}

function readJson(name: string): Record<string, unknown> {
  return JSON.parse(readFileSync(join(out(), name), "utf8")) as Record<string, unknown>;
}

async function tensorFloats(name: string): Promise<Float32Array> {
  const t = (await openCheckpoint(out())).tensors.get(name);
  if (t === undefined) throw new Error(`no tensor ${name}`);
  return new Float32Array(
    Uint8Array.from(readFileSync(t.file).subarray(t.offset, t.offset + t.sizeBytes)).buffer,
  );
}

/** Replaces a tensor, or adds it. */
function withTensor(model: TinyModel, tensor: TensorInput): TinyModel {
  return { ...model, tensors: [...model.tensors.filter((t) => t.name !== tensor.name), tensor] };
}

function withMetadata(model: TinyModel, metadata: Record<string, Kv>): TinyModel {
  return { ...model, metadata: { ...model.metadata, ...metadata } };
}

async function refusal(model: TinyModel, options: ImportOptions = {}): Promise<CaravanError> {
  const error = await run(model, options).then(
    () => undefined,
    (e: unknown) => e,
  );
  if (!(error instanceof CaravanError)) throw new Error(`expected a CaravanError, got ${error}`);
  expect(readdirSync(dir)).toEqual(["in.gguf"]); // nothing that looks like a model is left
  return error;
}

/** The row of the source whose values a row of a tinyModel tensor has. */
const sourceRows = (values: Float32Array, columns: number): number[] => {
  const base = Math.floor(values[0] ?? 0);
  return Array.from({ length: values.length / columns }, (_, r) =>
    Math.round((((values[r * columns] ?? 0) - base) * 65536) / columns),
  );
};

describe("importing a Llama", () => {
  test("gives MLX's names, an aligned file and the config", async () => {
    const progress: number[] = [];
    const report = await run(tinyModel("llama"), {
      onProgress: (p) => progress.push(p.doneBytes / p.totalBytes),
    });
    expect(report).toMatchObject({
      architecture: "llama",
      name: "tiny",
      tensors: 21,
      lossless: true,
      notes: [],
      path: out(),
    });
    expect(progress.at(-1)).toBe(1);
    const checkpoint = await openCheckpoint(out());
    expect([...checkpoint.tensors.values()].every(isAligned)).toBe(true);
    expect(checkpoint.tensors.has("model.layers.1.mlp.down_proj.weight")).toBe(true);
    expect(checkpoint.tensors.get("model.layers.0.self_attn.k_proj.weight")?.shape).toEqual([16, 32]);
    const config = readJson("config.json");
    expect(config).toMatchObject({
      model_type: "llama",
      hidden_size: 32,
      head_dim: 16,
      num_key_value_heads: 1,
      rms_norm_eps: 1e-5,
      rope_theta: 500000,
      tie_word_embeddings: false,
      vocab_size: 8,
      eos_token_id: 7,
      torch_dtype: "float32",
    });
    expect(config.quantization).toBeUndefined();
    expect(existsSync(join(out(), "generation_config.json"))).toBe(true);
  });

  test("puts the rows of q and k back into half-split order, and leaves v alone", async () => {
    await run(tinyModel("llama"));
    const halfSplit = (heads: number) =>
      Array.from(
        { length: heads * 16 },
        (_, r) => Math.floor(r / 16) * 16 + (r % 16 < 8 ? 2 * (r % 16) : 2 * ((r % 16) - 8) + 1),
      );
    const layer = "model.layers.0.self_attn";
    expect(sourceRows(await tensorFloats(`${layer}.q_proj.weight`), 32)).toEqual(halfSplit(2));
    expect(sourceRows(await tensorFloats(`${layer}.k_proj.weight`), 32)).toEqual(halfSplit(1));
    expect(sourceRows(await tensorFloats(`${layer}.v_proj.weight`), 32)).toEqual(
      Array.from({ length: 16 }, (_, i) => i),
    );
  });

  test("lists each module's bits, and what stayed float, in config.json", async () => {
    let model = withTensor(tinyModel("llama"), {
      name: "token_embd.weight",
      type: "Q8_0",
      shape: [8, 32],
      data: new Uint8Array(8 * 34),
    });
    for (const n of ["ffn_gate", "ffn_up"]) {
      model = withTensor(model, {
        name: `blk.0.${n}.weight`,
        type: "Q4_0",
        shape: [64, 32],
        data: new Uint8Array(64 * 18),
      });
    }
    const report = await run(model);
    expect(report.types.map((t) => t.from).sort()).toEqual(["F32", "Q4_0", "Q8_0"]);
    const quantization = readJson("config.json").quantization as Record<string, unknown>;
    expect(quantization).toMatchObject({
      group_size: 32,
      bits: 4,
      mode: "affine",
      "model.layers.0.mlp.down_proj": false,
    });
    expect(quantization["model.embed_tokens"]).toEqual({ group_size: 32, bits: 8, mode: "affine" });
    expect(quantization["model.layers.0.mlp.gate_proj"]).toBeUndefined();
    expect(quantization["model.norm"]).toBeUndefined();
    const scales = (await openCheckpoint(out())).tensors.get("model.layers.0.mlp.up_proj.scales");
    expect(scales).toMatchObject({ dtype: "F16", shape: [64, 1] });
  });

  test("ties the embeddings where there is no output matrix, and takes biases", async () => {
    const model = tinyModel("llama");
    model.tensors = model.tensors.filter((t) => t.name !== "output.weight");
    const biased = withTensor(model, {
      name: "blk.0.attn_q.bias",
      type: "F32",
      shape: [32],
      data: floats([32], (i) => i),
    });
    await run(biased);
    expect(readJson("config.json")).toMatchObject({ tie_word_embeddings: true, attention_bias: true });
    const bias = await tensorFloats("model.layers.0.self_attn.q_proj.bias");
    expect([...bias.slice(0, 9)]).toEqual([0, 2, 4, 6, 8, 10, 12, 14, 1]);
  });

  test("cuts shards between tensors and writes their index", async () => {
    const report = await run(tinyModel("llama"), { shardBytes: 20_000 });
    expect(report.files.filter((f) => f.endsWith(".safetensors")).length).toBeGreaterThan(1);
    expect((await openCheckpoint(out())).tensors.size).toBe(21);
  });

  test("gives a tokenizer that encodes, with its special tokens out of reach of user text", async () => {
    await run(tinyModel("llama"));
    const json = readJson("tokenizer.json");
    const tokenizer = new Tokenizer(json, readJson("tokenizer_config.json"));
    expect(tokenizer.encode("abc ab", { add_special_tokens: false }).ids).toEqual([5, 6, 4]);
    expect(tokenizer.encode("abc<|eot|>").ids).toEqual([0, 5, 7]);
    expect((json.model as { vocab: object }).vocab).not.toHaveProperty("<|eot|>");
    expect(readJson("tokenizer_config.json")).toMatchObject({
      bos_token: "<|start|>",
      eos_token: "<|eot|>",
      chat_template: "{{ messages }}",
    });
  });
});

describe("importing a Llama 4", () => {
  test("writes text_config, experts, shared expert and router", async () => {
    const report = await run(tinyModel("llama4"));
    expect(report.notes.join()).toMatch(/QK norm/);
    const { tensors } = await openCheckpoint(out());
    const layer = "language_model.model.layers.1.feed_forward";
    expect(tensors.get(`${layer}.experts.down_proj.weight`)?.shape).toEqual([4, 32, 32]);
    expect(tensors.get(`${layer}.router.weight`)?.shape).toEqual([4, 32]);
    expect(tensors.has(`${layer}.shared_expert.gate_proj.weight`)).toBe(true);
    expect(tensors.has("language_model.model.layers.0.feed_forward.up_proj.weight")).toBe(true);
    expect(tensors.has("language_model.lm_head.weight")).toBe(true);
    const config = readJson("config.json");
    expect(config.model_type).toBe("llama4");
    expect(config.text_config).toMatchObject({
      model_type: "llama4_text",
      intermediate_size: 32,
      intermediate_size_mlp: 64,
      num_local_experts: 4,
      interleave_moe_layer_step: 2,
      attention_chunk_size: 8192,
      use_qk_norm: true,
      no_rope_layers: [1, 1],
    });
    expect(config.text_config).not.toHaveProperty("moe_layers");
  });

  test("leaves q and k as they are: its RoPE is interleaved in both formats", async () => {
    await run(tinyModel("llama4"));
    const rows = sourceRows(await tensorFloats("language_model.model.layers.0.self_attn.q_proj.weight"), 32);
    expect(rows).toEqual(Array.from({ length: 32 }, (_, i) => i));
  });

  test("lists the MoE layers where they do not follow the step, and knows models without chunks", async () => {
    const model = withMetadata(tinyModel("llama4"), {
      "llama4.interleave_moe_layer_step": { type: "u32", value: 1 },
      "llama4.attention.sliding_window": { type: "u32", value: 0 },
    });
    await run(model);
    const text = readJson("config.json").text_config as Record<string, unknown>;
    expect(text).toMatchObject({
      moe_layers: [1],
      attention_chunk_size: null,
      attn_temperature_tuning: false,
    });
  });
});

describe("an import is refused, and leaves nothing,", () => {
  const tensor = (name: string, shape: number[]) => ({
    name,
    type: "F32",
    shape,
    data: floats(shape, () => 0),
  });
  const text = (value: string): Kv => ({ type: "string", value });
  const cases: [string, () => TinyModel, string, RegExp][] = [
    [
      "for another architecture",
      () => withMetadata(tinyModel("llama"), { "general.architecture": text("qwen3") }),
      "unsupported_model",
      /"qwen3"/,
    ],
    [
      "for Mixtral",
      () => withMetadata(tinyModel("llama"), { "llama.expert_count": { type: "u32", value: 8 } }),
      "unsupported_model",
      /8 experts/,
    ],
    [
      "for a tensor nobody knows",
      () => withTensor(tinyModel("llama"), tensor("blk.0.extra.weight", [4])),
      "unsupported_model",
      /blk\.0\.extra/,
    ],
    [
      "for a layer too many",
      () => withTensor(tinyModel("llama"), tensor("blk.2.attn_norm.weight", [32])),
      "unsupported_model",
      /blk\.2/,
    ],
    [
      "for a missing tensor",
      () => ({ ...tinyModel("llama"), tensors: tinyModel("llama").tensors.slice(0, -1) }),
      "bad_file",
      /blk\.1\.ffn_down\.weight is missing/,
    ],
    [
      "for a shape that is not the metadata's",
      () => withTensor(tinyModel("llama"), tensor("blk.0.attn_k.weight", [32, 32])),
      "bad_file",
      /attn_k.*\[32,32\].*\[16,32\]/,
    ],
    [
      "for a type without an MLX form",
      () =>
        withTensor(tinyModel("llama"), {
          name: "output.weight",
          type: "IQ4_NL",
          shape: [8, 32],
          data: new Uint8Array(8 * 18),
        }),
      "unsupported_model",
      /IQ4_NL/,
    ],
    [
      "for an unknown pre-tokenizer",
      () => withMetadata(tinyModel("llama"), { "tokenizer.ggml.pre": text("tekken") }),
      "unsupported_model",
      /"tekken"/,
    ],
    [
      "for an unknown tokenizer",
      () => withMetadata(tinyModel("llama"), { "tokenizer.ggml.model": text("bert") }),
      "unsupported_model",
      /"bert"/,
    ],
    [
      "for merges of unknown tokens",
      () =>
        withMetadata(tinyModel("llama"), { "tokenizer.ggml.merges": { type: "strings", value: ["a z"] } }),
      "bad_file",
      /"a z"/,
    ],
    [
      "for metadata of the wrong type",
      () => withMetadata(tinyModel("llama"), { "llama.block_count": text("two") }),
      "bad_file",
      /llama\.block_count/,
    ],
    [
      "for no layers",
      () => withMetadata(tinyModel("llama"), { "llama.block_count": { type: "u32", value: 0 } }),
      "bad_file",
      /block_count/,
    ],
    [
      "for YaRN",
      () => withMetadata(tinyModel("llama"), { "llama.rope.scaling.type": text("yarn") }),
      "unsupported_model",
      /yarn/,
    ],
    [
      "for RoPE factors of no known form",
      () =>
        withTensor(tinyModel("llama"), {
          name: "rope_freqs.weight",
          type: "F32",
          shape: [8],
          data: floats([8], (i) => 1 + ((i * 7) % 5)),
        }),
      "unsupported_model",
      /rope_freqs/,
    ],
    [
      "for a scale that is not finite",
      () =>
        withTensor(tinyModel("llama"), {
          name: "blk.1.ffn_down.weight",
          type: "Q8_0",
          shape: [32, 64],
          data: new Uint8Array(64 * 34).fill(0x7c),
        }),
      "bad_file",
      /ffn_down.*not finite/,
    ],
  ];
  for (const [what, model, code, message] of cases) {
    test(what, async () => {
      const error = await refusal(model());
      expect(error.code as string).toBe(code);
      expect(error.where).toBe(join(dir, "in.gguf"));
      expect(error.message).toMatch(message);
    });
  }

  test("when it is cancelled", async () => {
    const stop = new AbortController();
    const error = await refusal(tinyModel("llama"), { signal: stop.signal, onProgress: () => stop.abort() });
    expect(error.code).toBe("cancelled");
  });

  test("when the folder is not empty; what a dead process left is removed", async () => {
    mkdirSync(`${out()}.999999999.partial`);
    await run(tinyModel("llama"));
    expect(readdirSync(dir).sort()).toEqual(["in.gguf", "out"]);
    await expect(run(tinyModel("llama"))).rejects.toThrow(/already exists/);
    expect(existsSync(join(out(), "config.json"))).toBe(true);
  });
});

describe("RoPE scaling", () => {
  const fail = (message: string) => new CaravanError("unsupported_model", message);
  const scalings: [string, Llama3RopeScaling, number][] = [
    [
      "Llama 3.1",
      {
        rope_type: "llama3",
        factor: 8,
        low_freq_factor: 1,
        high_freq_factor: 4,
        original_max_position_embeddings: 8192,
      },
      128,
    ],
    [
      "Llama 3.2",
      {
        rope_type: "llama3",
        factor: 32,
        low_freq_factor: 1,
        high_freq_factor: 4,
        original_max_position_embeddings: 8192,
      },
      64,
    ],
    [
      "Scout",
      {
        rope_type: "llama3",
        factor: 16,
        low_freq_factor: 1,
        high_freq_factor: 1,
        original_max_position_embeddings: 8192,
      },
      128,
    ],
    [
      "a model with other constants",
      {
        rope_type: "llama3",
        factor: 4,
        low_freq_factor: 1,
        high_freq_factor: 8,
        original_max_position_embeddings: 2048,
      },
      128,
    ],
  ];
  for (const [name, scaling, headDim] of scalings) {
    test(`of ${name} is found again from its factors in float32`, () => {
      const factors = Float32Array.from(llama3Factors(scaling, 500000, headDim));
      expect(fitRopeScaling(factors, { theta: 500000, headDim, originalContext: undefined }, fail)).toEqual(
        scaling,
      );
    });
  }

  test("with low_freq_factor other than 1 gives parameters with the same factors", () => {
    const scaling: Llama3RopeScaling = {
      rope_type: "llama3",
      factor: 8,
      low_freq_factor: 2,
      high_freq_factor: 6,
      original_max_position_embeddings: 4096,
    };
    const factors = Float32Array.from(llama3Factors(scaling, 10000, 128));
    const found = fitRopeScaling(factors, { theta: 10000, headDim: 128, originalContext: undefined }, fail);
    if (found === undefined) throw new Error("nothing found");
    llama3Factors(found, 10000, 128).forEach((f, i) => {
      expect(Math.abs(f - (factors[i] ?? 0))).toBeLessThan(1e-4 * f);
    });
  });

  test("is none where all factors are 1", () => {
    expect(
      fitRopeScaling(
        new Float32Array(32).fill(1),
        { theta: 10000, headDim: 64, originalContext: undefined },
        fail,
      ),
    ).toBeUndefined();
  });
});
