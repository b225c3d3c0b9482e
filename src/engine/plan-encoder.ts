// A load plan as the bytes that cv_open reads (cv_plan in caravan.h).

import { CaravanError } from "../errors.ts";
import { type LoadPlan, type PlannedTensor, placeOf, type SourceView } from "../model/load-plan.ts";
import type { KvType } from "../model/memory-plan.ts";
import type { WeightFormat } from "../model/quantization.ts";
import { layersAt } from "../model/rank-place.ts";
import { ABI_VERSION, FILE, LAYER, NO_FILE, PLAN, PLAN_MAGIC, SOURCE, TENSOR } from "./layout.ts";

/** How the engine runs the model; sizes chosen by memory-plan.ts. */
export interface EngineOptions {
  device?: "cpu" | "metal";
  compute: "exact" | "fast";
  threads: number;
  pageTokens: number;
  fullPages: number;
  chunkPages: number;
  kvType: KvType;
  maxRows: number;
  maxTokens: number;
  maxLogits: number;
  slots: number;
  /** CV_CPU_*; 0 = the best set of the machine. */
  cpuLevel?: number;
  /** The ranks of a stage compare checksums of their hidden states after every step. */
  checkRanks?: boolean;
}

const FORMATS: Record<WeightFormat, number> = {
  f32: 1,
  f16: 2,
  bf16: 3,
  affine: 4,
  mxfp4: 5,
  mxfp8: 6,
  nvfp4: 7,
};
const TYPES = { f32: 1, f16: 2, bf16: 3, e8m0: 4, e4m3: 5, q8: 6 } as const;
const LAYER_FLAGS = { chunked: 1, rope: 2, qkNorm: 4, temperature: 8, moe: 16 } as const;
const TRANSPOSED = 1;
const ROPE_INTERLEAVED = 1;
const CHECK_RANKS = 2;

class Writer {
  readonly view: DataView;

  constructor(readonly bytes: Uint8Array) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  u32(at: number, value: number): void {
    this.view.setUint32(at, value, true);
  }

  f32(at: number, value: number): void {
    this.view.setFloat32(at, value, true);
  }

  /** Whole numbers below 2^53. */
  u64(at: number, value: number): void {
    if (!Number.isSafeInteger(value) || value < 0) {
      throw new CaravanError("internal_error", `${value} is not a size that a load plan can hold`);
    }
    this.view.setUint32(at, value % 2 ** 32, true);
    this.view.setUint32(at + 4, Math.floor(value / 2 ** 32), true);
  }
}

const aligned = (n: number): number => Math.ceil(n / 8) * 8;

export function encodePlan(plan: LoadPlan, options: EngineOptions): Uint8Array {
  const { config } = plan;
  const place = placeOf(plan);
  const layerTable = layersAt(config, place);
  const paths = plan.files.map(({ path }) => new TextEncoder().encode(`${path}\0`));
  const files = PLAN.size;
  const layers = files + plan.files.length * FILE.size;
  const tensors = layers + layerTable.length * LAYER.size;
  const frequencies = tensors + plan.tensors.length * TENSOR.size;
  let at = aligned(frequencies + config.invFreq.byteLength);
  const pathOffsets = paths.map((path) => {
    const offset = at;
    at += path.length;
    return offset;
  });
  const size = aligned(at);
  const out = new Writer(new Uint8Array(size));

  const numbers: [number, number][] = [
    [PLAN.magic, PLAN_MAGIC],
    [PLAN.version, ABI_VERSION],
    [PLAN.n_files, plan.files.length],
    [PLAN.n_layers, layerTable.length],
    [PLAN.n_tensors, plan.tensors.length],
    [PLAN.flags, (config.ropeInterleaved ? ROPE_INTERLEAVED : 0) | (options.checkRanks ? CHECK_RANKS : 0)],
    [PLAN.hidden, config.hiddenSize],
    [PLAN.head_dim, config.headDim],
    [PLAN.vocab, config.vocabSize],
    [PLAN.n_experts, config.experts],
    [PLAN.experts_per_token, config.expertsPerToken],
    [PLAN.chunk, config.chunk],
    [PLAN.page_tokens, options.pageTokens],
    [PLAN.n_full_pages, options.fullPages],
    [PLAN.n_chunk_pages, options.chunkPages],
    [PLAN.kv_type, TYPES[options.kvType]],
    [PLAN.device, options.device === "metal" ? 1 : 0],
    [PLAN.compute, options.compute === "exact" ? 1 : 0],
    [PLAN.n_threads, options.threads],
    [PLAN.max_rows, options.maxRows],
    [PLAN.max_tokens, options.maxTokens],
    [PLAN.max_logits, options.maxLogits],
    [PLAN.n_slots, options.slots],
    [PLAN.cpu_level, options.cpuLevel ?? 0],
  ];
  // All 0 says: one rank.
  if (place.tensorSize * place.stages > 1)
    numbers.push(
      [PLAN.tensor_rank, place.tensorRank],
      [PLAN.tensor_size, place.tensorSize],
      [PLAN.stage, place.stage],
      [PLAN.n_stages, place.stages],
      [PLAN.vocab_first, place.vocabFirst],
      [PLAN.vocab_rows, place.vocabRows],
    );
  for (const [offset, value] of numbers) out.u32(offset, value);
  out.u64(PLAN.total_size, size);
  out.u64(PLAN.files_offset, files);
  out.u64(PLAN.layers_offset, layers);
  out.u64(PLAN.tensors_offset, tensors);
  out.u64(PLAN.inv_freq_offset, frequencies);
  out.f32(PLAN.norm_eps, config.normEps);
  out.f32(PLAN.qk_norm_eps, config.normEps);
  out.f32(PLAN.attn_scale, config.attnScale);
  out.f32(PLAN.floor_scale, config.floorScale);

  plan.files.forEach((file, i) => {
    out.u64(files + i * FILE.size + FILE.path_offset, pathOffsets[i] ?? 0);
    out.u64(files + i * FILE.size + FILE.file_size, file.sizeBytes);
    out.bytes.set(paths[i] ?? new Uint8Array(1), pathOffsets[i] ?? 0);
  });
  layerTable.forEach((layer, i) => {
    const at = layers + i * LAYER.size;
    let flags = 0;
    for (const [name, bit] of Object.entries(LAYER_FLAGS))
      if (layer[name as keyof typeof layer]) flags |= bit;
    out.u32(at + LAYER.index, place.layers[0] + i);
    out.u32(at + LAYER.flags, flags);
    out.u32(at + LAYER.n_heads, place.heads);
    out.u32(at + LAYER.n_kv_heads, place.kvHeads);
  });
  plan.tensors.forEach((tensor, i) => {
    writeTensor(out, tensors + i * TENSOR.size, tensor);
  });
  config.invFreq.forEach((value, i) => {
    out.f32(frequencies + i * 4, value);
  });
  return out.bytes;
}

function writeTensor(out: Writer, at: number, t: PlannedTensor): void {
  out.u32(at + TENSOR.slot, t.slot);
  out.view.setInt32(at + TENSOR.layer, t.layer, true);
  out.u32(at + TENSOR.format, FORMATS[t.format]);
  out.u32(at + TENSOR.bits, t.bits);
  out.u32(at + TENSOR.group, t.group);
  out.u32(at + TENSOR.scale_type, t.scaleType === undefined ? 0 : TYPES[t.scaleType]);
  out.u32(at + TENSOR.flags, t.transposed ? TRANSPOSED : 0);
  out.u64(at + TENSOR.experts, t.experts);
  out.u64(at + TENSOR.rows, t.rows);
  out.u64(at + TENSOR.cols, t.cols);
  writeSource(out, at + TENSOR.weight, t.weight);
  writeSource(out, at + TENSOR.scales, t.scales);
  writeSource(out, at + TENSOR.biases, t.biases);
  writeSource(out, at + TENSOR.global_scale, t.globalScale);
}

function writeSource(out: Writer, at: number, source: SourceView | undefined): void {
  out.u32(at + SOURCE.file, source?.file ?? NO_FILE);
  out.u64(at + SOURCE.offset, source?.offset ?? 0);
  out.u64(at + SOURCE.outer_stride, source?.outerStride ?? 0);
  out.u64(at + SOURCE.row_stride, source?.rowStride ?? 0);
}
