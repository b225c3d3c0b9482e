// config.json of Llama and Llama 4: defaults, per-layer rules, rotation frequencies and refusals, as Hugging Face has them.

import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { CaravanError } from "../../src/errors.ts";
import { type LayerConfig, parseModelConfig, readModelConfig } from "../../src/model/config.ts";

const WHERE = "/model/config.json";

const LLAMA = {
  architectures: ["LlamaForCausalLM"],
  hidden_size: 128,
  intermediate_size: 256,
  num_hidden_layers: 4,
  num_attention_heads: 8,
  vocab_size: 512,
};
/** Sizes only: everything else is left to the defaults. */
const SMALL4 = {
  hidden_size: 64,
  intermediate_size: 128,
  num_hidden_layers: 8,
  num_attention_heads: 8,
  num_key_value_heads: 4,
  head_dim: 32,
  vocab_size: 512,
};
const llama = (change: object = {}) => parseModelConfig({ ...LLAMA, ...change }, WHERE);
const llama4 = (change: object = {}) =>
  parseModelConfig({ architectures: ["Llama4ForCausalLM"], ...SMALL4, ...change }, WHERE);
const which = (layers: LayerConfig[], key: keyof LayerConfig) =>
  layers.map((layer) => (layer[key] ? 1 : 0)).join("");

function refusal(run: () => unknown): CaravanError {
  try {
    run();
  } catch (thrown) {
    if (thrown instanceof CaravanError) return thrown;
    throw thrown;
  }
  throw new Error("nothing was refused");
}

describe("a Llama 4 config", () => {
  test("with an empty text_config is Scout's shape, as transformers fills it in", () => {
    const config = parseModelConfig(
      { architectures: ["Llama4ForConditionalGeneration"], text_config: {} },
      WHERE,
    );
    expect(config).toMatchObject({
      hiddenSize: 5120,
      expertSize: 8192,
      intermediateSize: 16384,
      heads: 40,
      kvHeads: 8,
      headDim: 128,
      vocabSize: 202048,
      experts: 16,
      expertsPerToken: 1,
      chunk: 8192,
      floorScale: 8192,
      attnScale: 0.1,
      contextLength: 131072,
      tieWordEmbeddings: false,
      attentionBias: false,
      ropeInterleaved: true,
    });
    expect(config.normEps).toBe(1e-5);
    expect(config.invFreq[1]).toBeCloseTo(500000 ** (-2 / 128), 6);
    expect(config.mlpBias).toBe(false);
    expect(config.layers.length).toBe(48);
    expect(which(config.layers, "moe")).toBe("1".repeat(48));
    for (const key of ["rope", "chunked", "qkNorm"] as const)
      expect(which(config.layers, key)).toBe("1110".repeat(12));
    expect(which(config.layers, "temperature")).toBe("0001".repeat(12));
  });

  test("tells its parts alike nested, flat, by model_type, and with null where Meta wrote null", () => {
    const flat = llama4();
    const nested = parseModelConfig({ model_type: "llama4", text_config: SMALL4 }, WHERE);
    const typed = parseModelConfig({ model_type: "llama4_text", ...SMALL4, rope_scaling: null }, WHERE);
    expect(nested).toEqual(flat);
    expect(typed).toEqual(flat);
  });

  test("puts NoPE layers where no_rope_layers, else the interval says; an empty list is no list", () => {
    expect(which(llama4({ no_rope_layers: [] }).layers, "rope")).toBe("11101110");
    expect(which(llama4({ no_rope_layer_interval: 3 }).layers, "rope")).toBe("11011011");
    const own = llama4({ no_rope_layers: [1, 0, 0, 1, 1, 1, 1, 0], no_rope_layer_interval: 3 });
    expect(which(own.layers, "rope")).toBe("10011110");
    expect(which(own.layers, "chunked")).toBe("10011110");
    expect(which(own.layers, "temperature")).toBe("01100001");
  });

  test("chunks RoPE layers, unless layer_types says otherwise or attention_chunk_size is null", () => {
    const types = Array.from({ length: 8 }, (_, i) => (i < 2 ? "chunked_attention" : "full_attention"));
    const typed = llama4({ layer_types: types });
    expect(which(typed.layers, "chunked")).toBe("11000000");
    expect(which(typed.layers, "rope")).toBe("11101110");
    const none = llama4({ attention_chunk_size: null });
    expect(none.chunk).toBe(0);
    expect(which(none.layers, "chunked")).toBe("00000000");
    expect(llama4({ no_rope_layers: Array(8).fill(0) }).chunk).toBe(0);
    expect(llama4({ attention_chunk_size: 1 << 20 }).chunk).toBe(1 << 20);
  });

  test("has experts where moe_layers, else the step says", () => {
    expect(which(llama4().layers, "moe")).toBe("11111111");
    expect(which(llama4({ interleave_moe_layer_step: 2 }).layers, "moe")).toBe("01010101");
    expect(which(llama4({ interleave_moe_layer_step: 3 }).layers, "moe")).toBe("00100100");
    const listed = llama4({ interleave_moe_layer_step: 2, moe_layers: [0, 5] });
    expect(which(listed.layers, "moe")).toBe("10000100");
    const dense = llama4({
      moe_layers: [],
      num_local_experts: 0,
      num_experts_per_tok: 0,
      interleave_moe_layer_step: 0,
    });
    expect(dense).toMatchObject({ experts: 0, expertsPerToken: 0 });
    expect(llama4({ num_experts_per_tok: 8 })).toMatchObject({ experts: 16, expertsPerToken: 8 });
  });

  test("takes every number from its key", () => {
    const text = {
      ...SMALL4,
      intermediate_size_mlp: 256,
      num_local_experts: 12,
      num_experts_per_tok: 3,
      attention_chunk_size: 48,
      floor_scale: 100,
      attn_scale: 0.25,
      rms_norm_eps: 1e-6,
      rope_theta: 1000,
      max_position_embeddings: 999,
      attention_bias: true,
    };
    const config = parseModelConfig(
      { architectures: ["Llama4ForConditionalGeneration"], tie_word_embeddings: true, text_config: text },
      WHERE,
    );
    expect(config).toMatchObject({
      hiddenSize: 64,
      expertSize: 128,
      intermediateSize: 256,
      heads: 8,
      kvHeads: 4,
      headDim: 32,
      vocabSize: 512,
      experts: 12,
      expertsPerToken: 3,
      chunk: 48,
      floorScale: 100,
      attnScale: 0.25,
      normEps: 1e-6,
      contextLength: 999,
      attentionBias: true,
      tieWordEmbeddings: true,
    });
    expect(config.layers.length).toBe(8);
    expect(config.invFreq[1]).toBeCloseTo(1000 ** (-2 / 32), 6);
  });

  test("without a width of its own for dense layers has the experts'", () => {
    expect(llama4({ intermediate_size_mlp: null }).intermediateSize).toBe(128);
  });

  test("says what it was run in, inside or outside text_config; bfloat16 where nothing does", () => {
    const nested = (outer: object, text: object) =>
      parseModelConfig({ model_type: "llama4", ...outer, text_config: { ...SMALL4, ...text } }, WHERE).dtype;
    expect(nested({ torch_dtype: "float16" }, {})).toBe("float16");
    expect(nested({ dtype: "float32" }, {})).toBe("float32");
    expect(nested({}, { torch_dtype: "float16" })).toBe("float16");
    expect(nested({}, { dtype: "float32" })).toBe("float32");
    expect(nested({}, {})).toBe("bfloat16");
  });

  test("takes QK norm and temperature tuning from any truthy value", () => {
    expect(which(llama4({ use_qk_norm: false }).layers, "qkNorm")).toBe("00000000");
    expect(which(llama4({ attn_temperature_tuning: 4 }).layers, "temperature")).toBe("00010001");
    for (const off of [0, false])
      expect(which(llama4({ attn_temperature_tuning: off }).layers, "temperature")).toBe("00000000");
  });
});

describe("a Llama config", () => {
  test("has Hugging Face's defaults: eps 1e-6, an untied head, as many key-value heads as heads", () => {
    expect(llama()).toMatchObject({
      normEps: 1e-6,
      tieWordEmbeddings: false,
      kvHeads: 8,
      headDim: 16,
      experts: 0,
      chunk: 0,
      ropeInterleaved: false,
      contextLength: 2048,
      mlpBias: false,
    });
    expect(llama().invFreq[1]).toBeCloseTo(10000 ** (-2 / 16), 6);
    expect(which(llama().layers, "rope")).toBe("1111");
    for (const key of ["chunked", "qkNorm", "temperature", "moe"] as const)
      expect(which(llama().layers, key)).toBe("0000");
    expect(llama({ attention_bias: true, mlp_bias: true })).toMatchObject({
      attentionBias: true,
      mlpBias: true,
    });
    expect(llama({ head_dim: 64, num_key_value_heads: 2 })).toMatchObject({ headDim: 64, kvHeads: 2 });
  });

  test("ends answers with generation_config's tokens, else its own", () => {
    const eos = (json: object, generation?: unknown) =>
      parseModelConfig({ ...LLAMA, ...json }, WHERE, generation).eosTokens;
    expect(eos({ eos_token_id: 2 }, { eos_token_id: [7, 8] })).toEqual([7, 8]);
    expect(eos({ eos_token_id: 2 }, { temperature: 1 })).toEqual([2]);
    expect(eos({ eos_token_id: [2, 3] })).toEqual([2, 3]);
    expect(eos({ eos_token_id: null })).toEqual([]);
    const nested = { architectures: ["Llama4ForConditionalGeneration"], text_config: { eos_token_id: 9 } };
    expect(parseModelConfig(nested, WHERE).eosTokens).toEqual([9]);
  });
});

describe("rotation frequencies", () => {
  const llama3 = {
    rope_type: "llama3",
    factor: 8,
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_max_position_embeddings: 8192,
  };
  const base = { head_dim: 128, rope_theta: 500000 };

  test("are theta^(-2j/d) in float32", () => {
    const { invFreq } = llama(base);
    expect(invFreq.length).toBe(64);
    expect(invFreq[0]).toBe(1);
    invFreq.forEach((value, j) => {
      const exact = 500000 ** ((-2 * j) / 128);
      expect(Math.abs(value / exact - 1)).toBeLessThan(2e-6);
    });
  });

  test("with llama3 scaling keep short waves, divide long ones, and blend between", () => {
    const plain = llama(base).invFreq;
    const { invFreq } = llama({ ...base, rope_scaling: llama3 });
    const kinds = new Set<string>();
    invFreq.forEach((value, j) => {
      const frequency = plain[j] ?? 0;
      const wave = (2 * Math.PI) / frequency;
      const smooth = (8192 / wave - 1) / 3;
      const kind = wave < 8192 / 4 ? "short" : wave > 8192 ? "long" : "between";
      kinds.add(kind);
      const wanted = {
        short: frequency,
        long: frequency / 8,
        between: ((1 - smooth) * frequency) / 8 + smooth * frequency,
      };
      expect(Math.abs(value / wanted[kind] - 1)).toBeLessThan(1e-6);
    });
    expect([...kinds].sort()).toEqual(["between", "long", "short"]);
  });

  test("with llama3 scaling have low 1, high 4 and 8192 positions where the config leaves them out", () => {
    const { factor, rope_type } = llama3;
    expect(llama({ ...base, rope_scaling: { factor, rope_type } }).invFreq).toEqual(
      llama({ ...base, rope_scaling: llama3 }).invFreq,
    );
  });

  test("rotate halves in Llama, neighbours in Llama 4 and where rope_traditional says so", () => {
    expect(llama().ropeInterleaved).toBe(false);
    expect(llama({ rope_traditional: true }).ropeInterleaved).toBe(true);
    expect(llama4({ rope_traditional: false }).ropeInterleaved).toBe(true);
  });

  test("with low == high (Scout) have no band between and no NaN, even where a wave is exactly that long", () => {
    const scout = { ...llama3, factor: 16, high_freq_factor: 1 };
    const { invFreq } = llama({ ...base, rope_scaling: scout });
    const plain = llama(base).invFreq;
    invFreq.forEach((value, j) => {
      const frequency = plain[j] ?? 0;
      expect(value).toBe((2 * Math.PI) / frequency < 8192 ? frequency : Math.fround(frequency / 16));
    });
    const edge = Math.fround(2 * Math.PI);
    const exact = llama({ ...base, rope_scaling: { ...scout, original_max_position_embeddings: edge } });
    expect(exact.invFreq[0]).toBe(1 / 16);
    expect(exact.invFreq.every(Number.isFinite)).toBe(true);
  });

  test("are the same from rope_scaling, rope_parameters and the older key `type`", () => {
    const wanted = llama({ ...base, rope_scaling: llama3 }).invFreq;
    const { rope_type, ...rest } = llama3;
    expect(llama({ ...base, rope_scaling: { type: rope_type, ...rest } }).invFreq).toEqual(wanted);
    const parameters = { ...llama3, rope_theta: 500000 };
    expect(llama({ head_dim: 128, rope_theta: 1, rope_parameters: parameters }).invFreq).toEqual(wanted);
    const plain = llama(base).invFreq;
    expect(llama({ ...base, rope_scaling: { rope_type: "default" } }).invFreq).toEqual(plain);
    const linear = llama({ ...base, rope_scaling: { type: "linear", factor: 4 } }).invFreq;
    expect(linear).toEqual(plain.map((value) => value / 4));
  });
});

describe("what cannot be run is refused with file, key and what can", () => {
  const cases: [string, () => unknown, string, RegExp][] = [
    [
      "an architecture that every object has a property of",
      () => llama({ architectures: ["constructor"] }),
      "unsupported_model",
      /architectures: "constructor"/,
    ],
    [
      "a model_type that every object has a property of",
      () => llama({ architectures: undefined, model_type: "toString" }),
      "unsupported_model",
      /model_type: "toString"/,
    ],
    [
      "an unknown architecture",
      () => llama({ architectures: ["Qwen3ForCausalLM"] }),
      "unsupported_model",
      /architectures: "Qwen3ForCausalLM"/,
    ],
    [
      "an unknown model_type",
      () => parseModelConfig({ model_type: "gemma" }, WHERE),
      "unsupported_model",
      /model_type: "gemma"/,
    ],
    [
      "an unknown rope_type",
      () => llama({ rope_scaling: { rope_type: "yarn", factor: 2 } }),
      "unsupported_model",
      /rope_scaling.rope_type: "yarn"/,
    ],
    [
      "sliding windows",
      () => llama({ layer_types: Array(4).fill("sliding_attention") }),
      "unsupported_model",
      /layer_types: "sliding_attention"/,
    ],
    ["another activation", () => llama({ hidden_act: "gelu" }), "unsupported_model", /hidden_act: "gelu"/],
    ["a head size", () => llama({ head_dim: 40 }), "unsupported_model", /head_dim: 40/],
    ["a chunk", () => llama4({ attention_chunk_size: 40 }), "unsupported_model", /attention_chunk_size: 40/],
    [
      "another maker's quantization",
      () => llama({ quantization_config: { quant_method: "compressed-tensors" } }),
      "unsupported_model",
      /quantization_config.quant_method: "compressed-tensors"/,
    ],
  ];
  test.each(cases)("%s", (_, run, code, message) => {
    const error = refusal(run);
    expect(error.code).toBe(code as CaravanError["code"]);
    expect(error.where).toBe(WHERE);
    expect(error.message).toMatch(message);
    expect(error.hint).toMatch(/^Supported: ./);
  });

  const damaged: [string, () => unknown, RegExp][] = [
    ["a missing size", () => parseModelConfig({ architectures: ["LlamaForCausalLM"] }, WHERE), /hidden_size/],
    [
      "a nested size",
      () => parseModelConfig({ model_type: "llama4", text_config: { vocab_size: -1 } }, WHERE),
      /text_config\.vocab_size/,
    ],
    ["heads", () => llama({ num_key_value_heads: 3 }), /3 does not divide 8/],
    ["layer_types too short", () => llama({ layer_types: [] }), /layer_types: 0 entries for 4/],
    ["no_rope_layers too short", () => llama4({ no_rope_layers: [1] }), /no_rope_layers: 1 entries for 8/],
    ["a layer that is not there", () => llama4({ moe_layers: [8] }), /no layer 8 among 8/],
    ["more experts than there are", () => llama4({ num_experts_per_tok: 17 }), /17 of 16 experts/],
    ["no expert chosen", () => llama4({ num_experts_per_tok: 0 }), /0 of 16 experts/],
    ["scaling without factor", () => llama({ rope_scaling: { type: "llama3" } }), /factor is missing/],
    ["not an object", () => parseModelConfig([], WHERE), /not a JSON object/],
  ];
  test.each(damaged)("%s (damaged)", (_, run, message) => {
    const error = refusal(run);
    expect(error.code).toBe("bad_file");
    expect(error.where).toBe(WHERE);
    expect(error.message).toMatch(message);
  });

  test("a file that is not there, by its path", () => {
    const error = refusal(() => readModelConfig("/no/such/folder"));
    expect(error).toMatchObject({ code: "bad_file", where: "/no/such/folder/config.json" });
  });
});

test("MLX's quantization object is kept, and its copy for the hub stands in for it", () => {
  const quantization = { group_size: 64, bits: 4, "model.layers.0.mlp.up_proj": false };
  expect(llama({ quantization }).quantization).toEqual(quantization);
  expect(llama({ quantization_config: quantization }).quantization).toEqual(quantization);
  const both = llama({ quantization, quantization_config: { quant_method: "awq" } });
  expect(both.quantization).toEqual(quantization);
  expect(llama().quantization).toBeUndefined();
});

test("the goldens' configs are read: Scout", () => {
  const config = readModelConfig(join(import.meta.dir, "../golden/data/scout-4bit"));
  expect(config).toMatchObject({
    architecture: "llama4",
    chunk: 16,
    floorScale: 8,
    experts: 16,
    eosTokens: [2, 3],
  });
  expect(which(config.layers, "chunked")).toBe("11101110");
});
