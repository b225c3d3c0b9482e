// encodePlan: the bytes that cv_open reads, decoded again and compared with the plan that they came from.

import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { shardPlan } from "../../src/cluster/shard.ts";
import { FILE, LAYER, PLAN, SOURCE, TENSOR } from "../../src/engine/layout.ts";
import { type EngineOptions, encodePlan } from "../../src/engine/plan-encoder.ts";
import { readModelConfig } from "../../src/model/config.ts";
import { type LoadPlan, makeLoadPlan, type SourceView } from "../../src/model/load-plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { headerConstant } from "../tools/native-header.ts";

const DATA = join(import.meta.dir, "../golden/data");
const OPTIONS: EngineOptions = {
  compute: "exact",
  threads: 3,
  pageTokens: 16,
  fullPages: 11,
  chunkPages: 7,
  kvType: "f16",
  maxRows: 4,
  maxTokens: 100,
  maxLogits: 50,
  slots: 9,
  cpuLevel: 2,
};

async function planOf(name: string): Promise<LoadPlan> {
  const dir = join(DATA, name);
  return makeLoadPlan(readModelConfig(dir), await openCheckpoint(dir));
}

class Reader {
  readonly #view: DataView;
  constructor(readonly bytes: Uint8Array) {
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }
  u32 = (at: number) => this.#view.getUint32(at, true);
  i32 = (at: number) => this.#view.getInt32(at, true);
  u64 = (at: number) => Number(this.#view.getBigUint64(at, true));
  f32 = (at: number) => this.#view.getFloat32(at, true);

  source(at: number): SourceView | undefined {
    if (this.u32(at + SOURCE.file) === headerConstant("CV_NO_FILE")) return undefined;
    return {
      file: this.u32(at + SOURCE.file),
      offset: this.u64(at + SOURCE.offset),
      outerStride: this.u64(at + SOURCE.outer_stride),
      rowStride: this.u64(at + SOURCE.row_stride),
    };
  }
}

const format = (name: string) => headerConstant(`CV_FORMAT_${name.toUpperCase()}`);
const type = (name: string | undefined) =>
  name === undefined ? 0 : headerConstant(`CV_${name.toUpperCase()}`);

describe.each(["scout-mixed", "scout-hf-bf16", "maverick-4bit", "llama-4bit"])("the plan of %s", (name) => {
  test("has every tensor, layer, file and frequency at its place", async () => {
    const plan = await planOf(name);
    const { config } = plan;
    const r = new Reader(encodePlan(plan, OPTIONS));
    expect(r.u64(PLAN.total_size)).toBe(r.bytes.length);

    const tensors = r.u64(PLAN.tensors_offset);
    expect(r.u32(PLAN.n_tensors)).toBe(plan.tensors.length);
    plan.tensors.forEach((tensor, i) => {
      const at = tensors + i * TENSOR.size;
      expect({
        slot: r.u32(at + TENSOR.slot),
        layer: r.i32(at + TENSOR.layer),
        format: r.u32(at + TENSOR.format),
        bits: r.u32(at + TENSOR.bits),
        group: r.u32(at + TENSOR.group),
        scaleType: r.u32(at + TENSOR.scale_type),
        flags: r.u32(at + TENSOR.flags),
        experts: r.u64(at + TENSOR.experts),
        rows: r.u64(at + TENSOR.rows),
        cols: r.u64(at + TENSOR.cols),
        weight: r.source(at + TENSOR.weight),
        scales: r.source(at + TENSOR.scales),
        biases: r.source(at + TENSOR.biases),
        globalScale: r.source(at + TENSOR.global_scale),
      }).toEqual({
        slot: tensor.slot,
        layer: tensor.layer,
        format: format(tensor.format),
        bits: tensor.bits,
        group: tensor.group,
        scaleType: type(tensor.scaleType),
        flags: tensor.transposed ? headerConstant("CV_TENSOR_TRANSPOSED") : 0,
        experts: tensor.experts,
        rows: tensor.rows,
        cols: tensor.cols,
        weight: tensor.weight,
        scales: tensor.scales,
        biases: tensor.biases,
        globalScale: tensor.globalScale,
      });
    });

    const layers = r.u64(PLAN.layers_offset);
    expect(r.u32(PLAN.n_layers)).toBe(config.layers.length);
    config.layers.forEach((layer, i) => {
      const at = layers + i * LAYER.size;
      const flags =
        (layer.chunked ? headerConstant("CV_LAYER_CHUNKED") : 0) +
        (layer.rope ? headerConstant("CV_LAYER_ROPE") : 0) +
        (layer.qkNorm ? headerConstant("CV_LAYER_QK_NORM") : 0) +
        (layer.temperature ? headerConstant("CV_LAYER_TEMPERATURE") : 0) +
        (layer.moe ? headerConstant("CV_LAYER_MOE") : 0);
      expect([r.u32(at), r.u32(at + LAYER.flags)]).toEqual([i, flags]);
      expect(r.u32(at + LAYER.n_heads)).toBe(config.heads);
      expect(r.u32(at + LAYER.n_kv_heads)).toBe(config.kvHeads);
    });

    expect(r.u32(PLAN.n_files)).toBe(plan.files.length);
    plan.files.forEach(({ path, sizeBytes }, i) => {
      const at = r.u64(PLAN.files_offset) + i * FILE.size;
      const start = r.u64(at + FILE.path_offset);
      const end = r.bytes.indexOf(0, start);
      expect(new TextDecoder().decode(r.bytes.subarray(start, end))).toBe(path);
      expect(r.u64(at + FILE.file_size)).toBe(sizeBytes);
    });
    config.invFreq.forEach((value, i) => {
      expect(r.f32(r.u64(PLAN.inv_freq_offset) + i * 4)).toBe(value);
    });
  });
});

test("the head has the model's and the engine's numbers", async () => {
  const plan = await planOf("scout-4bit");
  const r = new Reader(encodePlan(plan, OPTIONS));
  const words = (names: (keyof typeof PLAN)[]) => names.map((name) => r.u32(PLAN[name]));
  expect(words(["magic", "version"])).toEqual([
    headerConstant("CV_PLAN_MAGIC"),
    headerConstant("CV_ABI_VERSION"),
  ]);
  expect(words(["hidden", "head_dim", "vocab", "n_experts", "experts_per_token", "chunk"])).toEqual([
    64, 32, 512, 16, 1, 16,
  ]);
  expect(words(["page_tokens", "n_full_pages", "n_chunk_pages", "n_threads"])).toEqual([16, 11, 7, 3]);
  expect(words(["max_rows", "max_tokens", "max_logits", "n_slots", "cpu_level"])).toEqual([4, 100, 50, 9, 2]);
  expect(words(["flags", "kv_type", "device", "compute"])).toEqual([
    headerConstant("CV_MODEL_ROPE_INTERLEAVED"),
    headerConstant("CV_F16"),
    headerConstant("CV_DEVICE_CPU"),
    headerConstant("CV_COMPUTE_EXACT"),
  ]);
  const floats = [PLAN.norm_eps, PLAN.qk_norm_eps, PLAN.attn_scale, PLAN.floor_scale].map(r.f32);
  expect(floats).toEqual([1e-5, 1e-5, 0.1, 8].map(Math.fround));
  const fast = new Reader(encodePlan(plan, { ...OPTIONS, compute: "fast", kvType: "bf16" }));
  expect([fast.u32(PLAN.compute), fast.u32(PLAN.kv_type)]).toEqual([
    headerConstant("CV_COMPUTE_FAST"),
    headerConstant("CV_BF16"),
  ]);
});

test("a rank's plan has its own layers and heads, numbered as in the whole model, and its place in the grid", async () => {
  const whole = await planOf("scout-4bit");
  const shares = [0, 1, 2, 3].map((rank) => ({
    rank,
    stage: rank >> 1,
    tensorRank: rank & 1,
    layers: (rank < 2 ? [0, 3] : [3, 8]) as [number, number],
    weight: [1, 1, 3, 1][rank] ?? 0,
  }));
  const read = (rank: number) => {
    const r = new Reader(encodePlan(shardPlan(whole, shares, rank), { ...OPTIONS, checkRanks: rank === 3 }));
    const layers = r.u64(PLAN.layers_offset);
    return {
      place: [PLAN.tensor_rank, PLAN.tensor_size, PLAN.stage, PLAN.n_stages].map(r.u32),
      head: [PLAN.vocab_first, PLAN.vocab_rows, PLAN.vocab].map(r.u32),
      pages: [PLAN.n_full_pages, PLAN.n_chunk_pages].map(r.u32),
      layers: Array.from({ length: r.u32(PLAN.n_layers) }, (_, i) => r.u32(layers + i * LAYER.size)),
      heads: [LAYER.n_heads, LAYER.n_kv_heads].map((at) => r.u32(layers + at)),
      checked: (r.u32(PLAN.flags) & headerConstant("CV_MODEL_CHECK_RANKS")) !== 0,
    };
  };
  const pages = [11, 7];
  expect(read(1)).toEqual({
    place: [1, 2, 0, 2],
    head: [0, 0, 512],
    pages,
    layers: [0, 1, 2],
    heads: [4, 2],
    checked: false,
  });
  expect(read(3)).toEqual({
    place: [1, 2, 1, 2],
    head: [384, 128, 512],
    pages,
    layers: [3, 4, 5, 6, 7],
    heads: [2, 1],
    checked: true,
  });
  const alone = new Reader(encodePlan(whole, OPTIONS));
  expect([PLAN.tensor_size, PLAN.n_stages, PLAN.vocab_rows].map(alone.u32)).toEqual([0, 0, 0]);
});

test("offsets beyond 2^32 and paths that are not ASCII survive; sizes beyond 2^53 are refused", async () => {
  const plan = await planOf("llama-4bit");
  const [first, ...rest] = plan.tensors;
  if (first === undefined) throw new Error("no tensors");
  const far = 2 ** 52 + 12345;
  const moved = (offset: number): LoadPlan => ({
    ...plan,
    files: [{ path: "/Modelle/größer/模型.safetensors", sizeBytes: 2 ** 53 - 1 }],
    tensors: [{ ...first, weight: { ...first.weight, offset, outerStride: 2 ** 40 + 7 } }, ...rest],
  });
  const r = new Reader(encodePlan(moved(far), OPTIONS));
  const weight = r.source(r.u64(PLAN.tensors_offset) + TENSOR.weight);
  expect(weight).toMatchObject({ offset: far, outerStride: 2 ** 40 + 7 });
  const file = r.u64(PLAN.files_offset);
  const path = r.u64(file + FILE.path_offset);
  expect(new TextDecoder().decode(r.bytes.subarray(path, r.bytes.indexOf(0, path)))).toBe(
    "/Modelle/größer/模型.safetensors",
  );
  expect(r.u64(file + FILE.file_size)).toBe(2 ** 53 - 1);
  for (const wrong of [2 ** 53, -1, 1.5, Number.NaN])
    expect(() => encodePlan(moved(wrong), OPTIONS)).toThrow(/not a size/);
});
