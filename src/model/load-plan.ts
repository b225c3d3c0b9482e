// Decides what the engine loads: which bytes of which file become which matrix, with every shape checked against the
// config. Pure: needs headers, never weights. Plans all of the model for one rank; cluster/shard.ts makes one rank's part
// of it: a function from these records to such records (every view has its own offset and strides).

import { CaravanError } from "../errors.ts";
import type { ModelConfig } from "./config.ts";
import { isQuantized, quantizationOf, type WeightFormat } from "./quantization.ts";
import { type RankPlace, wholeModel } from "./rank-place.ts";
import {
  ATTENTION_MODULES,
  BIAS_OF,
  DENSE_MODULES,
  EXPERT_MODULES,
  isSkipped,
  namePrefix,
  SHARED_MODULES,
  SLOT,
  type Slot,
} from "./tensor-names.ts";

/** What a plan needs to know of a tensor; safetensors.ts's CheckpointTensor has it. */
export interface TensorLocation {
  file: string;
  dtype: string;
  shape: readonly number[];
  /** From the start of the file, in bytes. */
  offset: number;
}

export interface CheckpointLike {
  files: readonly { path: string; sizeBytes: number }[];
  tensors: ReadonlyMap<string, TensorLocation>;
}

/** Byte b of row r of expert e: offset + e*outerStride + r*rowStride + b. Transposed: see caravan.h, cv_plan_source. */
export interface SourceView {
  file: number;
  offset: number;
  outerStride: number;
  rowStride: number;
}

export type FloatType = "f32" | "f16" | "bf16";
export type ScaleType = FloatType | "e8m0" | "e4m3";

export interface PlannedTensor {
  slot: Slot;
  /** Position in the layer table of the plan's stage, -1 for global tensors. */
  layer: number;
  name: string;
  format: WeightFormat;
  bits: number;
  group: number;
  scaleType: ScaleType | undefined;
  transposed: boolean;
  experts: number;
  rows: number;
  cols: number;
  weight: SourceView;
  scales: SourceView | undefined;
  biases: SourceView | undefined;
  globalScale: SourceView | undefined;
}

export interface LoadPlan {
  config: ModelConfig;
  files: { path: string; sizeBytes: number }[];
  tensors: PlannedTensor[];
  /** What part of the model this is; absent = all of it. `config` is the whole model's in either case. */
  place?: RankPlace;
  /** Tensors of the checkpoint that nothing here uses (vision parts not counted). */
  unused: string[];
}

const FLOATS: Record<string, FloatType> = { F32: "f32", F16: "f16", BF16: "bf16" };
const FLOAT_BYTES: Record<FloatType, number> = { f32: 4, f16: 2, bf16: 2 };
export const SCALE_BYTES: Record<ScaleType, number> = { ...FLOAT_BYTES, e8m0: 1, e4m3: 1 };
/** What the engine reads through one pointer: codes are 32-bit words, except bytes of mxfp8. */
const ELEMENT_BYTES: Record<WeightFormat, number> = {
  ...FLOAT_BYTES,
  affine: 4,
  mxfp4: 4,
  mxfp8: 1,
  nvfp4: 4,
};

/** Plans the whole model on one rank. Throws bad_file or unsupported_model naming the tensor. */
export function makeLoadPlan(config: ModelConfig, checkpoint: CheckpointLike): LoadPlan {
  return new Planner(config, checkpoint).plan();
}

/** Where the plan's rank stands. */
export function placeOf({ config, place }: Pick<LoadPlan, "config" | "place">): RankPlace {
  return place ?? wholeModel(config);
}

class Planner {
  readonly #files = new Map<string, number>();
  readonly #used = new Set<string>();
  readonly #planned: PlannedTensor[] = [];
  readonly #prefix: string;

  constructor(
    readonly config: ModelConfig,
    readonly checkpoint: CheckpointLike,
  ) {
    this.#prefix = namePrefix(checkpoint.tensors.keys());
    checkpoint.files.forEach((file, index) => {
      this.#files.set(file.path, index);
    });
  }

  plan(): LoadPlan {
    const { config } = this;
    const { hiddenSize: hidden, vocabSize: vocab } = config;
    this.#matrix(SLOT.embed, -1, "model.embed_tokens", [1, vocab, hidden]);
    this.#vector(SLOT.finalNorm, -1, "model.norm.weight", hidden);
    this.#head(vocab, hidden);
    config.layers.forEach((layer, i) => {
      const base = `model.layers.${i}.`;
      this.#vector(SLOT.attnNorm, i, `${base}input_layernorm.weight`, hidden);
      this.#vector(SLOT.ffnNorm, i, `${base}post_attention_layernorm.weight`, hidden);
      const q = config.heads * config.headDim;
      const kv = config.kvHeads * config.headDim;
      const shapes: [number, number][] = [
        [q, hidden],
        [kv, hidden],
        [kv, hidden],
        [hidden, q],
      ];
      ATTENTION_MODULES.forEach(([slot, name], k) => {
        this.#module(slot, i, base + name, shapes[k] as [number, number]);
      });
      if (layer.moe) this.#experts(i, `${base}feed_forward.`);
      else this.#dense(i, base + (config.architecture === "llama" ? "mlp." : "feed_forward."));
    });
    this.#requireBiases();
    const unused = [...this.checkpoint.tensors.keys()].filter(
      (name) => !this.#used.has(name) && !isSkipped(name),
    );
    const files = this.checkpoint.files.map(({ path, sizeBytes }) => ({ path, sizeBytes }));
    return { config, files, tensors: this.#planned, unused };
  }

  #head(vocab: number, hidden: number): void {
    const names = ["lm_head", "output", "model.output"];
    const own = names.find((name) => this.#find(`${name}.weight`) !== undefined);
    if (this.config.tieWordEmbeddings || own === undefined) {
      if (!this.config.tieWordEmbeddings) throw this.#missing("lm_head.weight");
      this.#matrix(SLOT.head, -1, "model.embed_tokens", [1, vocab, hidden]);
      return;
    }
    this.#matrix(SLOT.head, -1, own, [1, vocab, hidden]);
  }

  #dense(layer: number, base: string): void {
    const { hiddenSize: hidden, intermediateSize: ff } = this.config;
    const shapes: [number, number][] = [
      [ff, hidden],
      [ff, hidden],
      [hidden, ff],
    ];
    DENSE_MODULES.forEach(([slot, name], k) => {
      this.#module(slot, layer, base + name, shapes[k] as [number, number]);
    });
  }

  #experts(layer: number, base: string): void {
    const { hiddenSize: hidden, expertSize: ff, experts } = this.config;
    this.#matrix(SLOT.router, layer, `${base}router`, [1, experts, hidden]);
    const shapes: [number, number][] = [
      [ff, hidden],
      [ff, hidden],
      [hidden, ff],
    ];
    if (this.#find(`${base}experts.gate_up_proj`) !== undefined) {
      this.#transposed(
        SLOT.expertGate,
        layer,
        `${base}experts.gate_up_proj`,
        [experts, ff, hidden],
        0,
        2 * ff,
      );
      this.#transposed(
        SLOT.expertUp,
        layer,
        `${base}experts.gate_up_proj`,
        [experts, ff, hidden],
        ff,
        2 * ff,
      );
      this.#transposed(SLOT.expertDown, layer, `${base}experts.down_proj`, [experts, hidden, ff], 0, hidden);
    } else {
      EXPERT_MODULES.forEach(([slot, name], k) => {
        this.#matrix(slot, layer, base + name, [experts, ...(shapes[k] as [number, number])]);
      });
    }
    SHARED_MODULES.forEach(([slot, name], k) => {
      this.#matrix(slot, layer, base + name, [1, ...(shapes[k] as [number, number])]);
    });
  }

  /** A matrix and its bias. Checkpoints that come from GGUF may have biases on some modules only. */
  #module(slot: Slot, layer: number, path: string, [rows, cols]: [number, number]): void {
    this.#matrix(slot, layer, path, [1, rows, cols]);
    const bias = BIAS_OF[slot];
    const { attentionBias, mlpBias } = this.config;
    const biased = path.includes(".self_attn.") ? attentionBias : mlpBias;
    if (biased && bias !== undefined && this.#find(`${path}.bias`) !== undefined)
      this.#vector(bias, layer, `${path}.bias`, rows);
  }

  /** A config that promises biases to a checkpoint that has none is not this checkpoint's. */
  #requireBiases(): void {
    const has = (slots: readonly (Slot | undefined)[]) =>
      this.#planned.some((tensor) => slots.includes(tensor.slot));
    const kinds: [boolean, readonly [Slot, string][], string][] = [
      [this.config.attentionBias, ATTENTION_MODULES, "model.layers.0."],
      [this.config.mlpBias, DENSE_MODULES, "model.layers.0.mlp."],
    ];
    for (const [promised, modules, base] of kinds)
      if (promised && !has(modules.map(([slot]) => BIAS_OF[slot])))
        throw this.#missing(`${base}${modules[0]?.[1]}.bias`);
  }

  #find(name: string): TensorLocation | undefined {
    return this.checkpoint.tensors.get(this.#prefix + name);
  }

  #take(name: string): TensorLocation {
    const found = this.#find(name);
    if (found === undefined) throw this.#missing(name);
    this.#used.add(this.#prefix + name);
    return found;
  }

  #missing(name: string): CaravanError {
    return new CaravanError("bad_file", `tensor ${this.#prefix}${name} is missing`, {
      where: this.checkpoint.files[0]?.path ?? this.config.where,
      hint: "The checkpoint is incomplete or not of the kind that its config.json names.",
    });
  }

  #wrongShape(name: string, found: TensorLocation, expected: readonly number[]): CaravanError {
    return new CaravanError(
      "bad_file",
      `tensor ${this.#prefix}${name} has shape [${found.shape.join(", ")}] of ${found.dtype}; config.json asks for [${expected.join(", ")}]`,
      { where: found.file },
    );
  }

  #float(name: string, found: TensorLocation): FloatType {
    const type = FLOATS[found.dtype];
    if (type !== undefined) return type;
    throw new CaravanError(
      "unsupported_model",
      `tensor ${this.#prefix}${name}: type ${found.dtype} is not supported here`,
      {
        where: found.file,
      },
    );
  }

  /** [experts, rows, rowBytes] packed without gaps. */
  #packed(found: TensorLocation, rows: number, rowBytes: number): SourceView {
    return {
      file: this.#file(found),
      offset: found.offset,
      outerStride: rows * rowBytes,
      rowStride: rowBytes,
    };
  }

  #file(found: TensorLocation): number {
    const index = this.#files.get(found.file);
    if (index === undefined)
      throw new CaravanError("internal_error", `${found.file} is not among the checkpoint's files`);
    return index;
  }

  #vector(slot: Slot, layer: number, name: string, length: number): void {
    const found = this.#take(name);
    if (found.shape.length !== 1 || found.shape[0] !== length) throw this.#wrongShape(name, found, [length]);
    const format = this.#float(name, found);
    this.#planned.push({
      ...plainTensor(slot, layer, name, format, [1, 1, length]),
      weight: this.#packed(found, 1, length * FLOAT_BYTES[format]),
    });
  }

  /** Hugging Face's expert layout [E, in, width]: columns first … of `width` are this matrix's rows. */
  #transposed(
    slot: Slot,
    layer: number,
    name: string,
    [experts, rows, cols]: [number, number, number],
    first: number,
    width: number,
  ): void {
    const found = this.#take(name);
    if (!sameShape(found.shape, [experts, cols, width]))
      throw this.#wrongShape(name, found, [experts, cols, width]);
    const format = this.#float(name, found);
    const size = FLOAT_BYTES[format];
    this.#planned.push({
      ...plainTensor(slot, layer, name, format, [experts, rows, cols]),
      transposed: true,
      weight: {
        file: this.#file(found),
        offset: found.offset + first * size,
        outerStride: cols * width * size,
        rowStride: width * size,
      },
    });
  }

  #matrix(slot: Slot, layer: number, path: string, shape: [number, number, number]): void {
    const [experts, rows, cols] = shape;
    const name = `${path}.weight`;
    const found = this.#take(name);
    const expected = experts === 1 && found.shape.length === 2 ? [rows, cols] : shape;
    const scaled = this.#find(`${path}.scales`) !== undefined;
    if (isQuantized(this.config.quantization, this.#prefix + path, scaled, found.file)) {
      this.#quantized(slot, layer, path, found, shape);
      return;
    }
    if (!sameShape(found.shape, expected)) throw this.#wrongShape(name, found, expected);
    const format = this.#float(name, found);
    this.#planned.push({
      ...plainTensor(slot, layer, name, format, shape),
      weight: this.#packed(found, rows, cols * FLOAT_BYTES[format]),
    });
  }

  #quantized(
    slot: Slot,
    layer: number,
    path: string,
    found: TensorLocation,
    [experts, rows, cols]: [number, number, number],
  ): void {
    const lead = found.shape.length === 2 && experts === 1 ? [rows] : [experts, rows];
    const scales = this.#take(`${path}.scales`);
    const words = found.shape.at(-1) ?? 0;
    const perRow = scales.shape.at(-1) ?? 0;
    if (found.dtype !== "U32" || !sameShape(found.shape, [...lead, words]))
      throw this.#wrongShape(`${path}.weight`, found, [...lead, words]);
    if (!sameShape(scales.shape, [...lead, perRow]))
      throw this.#wrongShape(`${path}.scales`, scales, [...lead, perRow]);
    const q = quantizationOf(
      this.config.quantization,
      { path: this.#prefix + path, cols, words, scales: perRow, scalesDtype: scales.dtype },
      found.file,
    );
    const scaleType: ScaleType =
      q.mode === "affine" ? this.#float(`${path}.scales`, scales) : q.mode === "nvfp4" ? "e4m3" : "e8m0";
    const scaleBytes = scaleType === "e8m0" || scaleType === "e4m3" ? 1 : FLOAT_BYTES[scaleType];
    const planned: PlannedTensor = {
      ...plainTensor(slot, layer, path, q.mode, [experts, rows, cols]),
      bits: q.bits,
      group: q.group,
      scaleType,
      weight: this.#packed(found, rows, words * 4),
      scales: this.#packed(scales, rows, perRow * scaleBytes),
    };
    if (q.mode === "affine") {
      const biases = this.#take(`${path}.biases`);
      if (biases.dtype !== scales.dtype || !sameShape(biases.shape, scales.shape))
        throw this.#wrongShape(`${path}.biases`, biases, scales.shape);
      planned.biases = this.#packed(biases, rows, perRow * scaleBytes);
    }
    const global = q.mode === "nvfp4" ? this.#find(`${path}.global_scale`) : undefined;
    if (global !== undefined) {
      this.#take(`${path}.global_scale`);
      const n = global.shape.reduce((product, size) => product * size, 1);
      if (global.dtype !== "F32" || n !== experts)
        throw this.#wrongShape(`${path}.global_scale`, global, [experts]);
      planned.globalScale = this.#packed(global, 1, experts * 4);
    }
    this.#planned.push(planned);
  }
}

function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((size, i) => size === b[i]);
}

function plainTensor(
  slot: Slot,
  layer: number,
  name: string,
  format: WeightFormat,
  [experts, rows, cols]: [number, number, number],
): PlannedTensor {
  return {
    slot,
    layer,
    name,
    format,
    bits: 0,
    group: 0,
    scaleType: undefined,
    transposed: false,
    experts,
    rows,
    cols,
    weight: { file: 0, offset: 0, outerStride: 0, rowStride: 0 },
    scales: undefined,
    biases: undefined,
    globalScale: undefined,
  };
}

/** Where the engine keeps a tensor's bytes: parts on their natural alignment whose rows follow each other without gaps are
 * mapped, the others copied (weights.c). */
export function tensorMemory(t: PlannedTensor): { mapped: number; copied: number } {
  const scale = t.scaleType === undefined ? 1 : SCALE_BYTES[t.scaleType];
  const perScale = t.group === 0 ? 0 : (t.cols / t.group) * scale;
  const parts: [SourceView | undefined, number, number][] = [
    [t.weight, rowBytes(t), t.transposed ? Number.POSITIVE_INFINITY : ELEMENT_BYTES[t.format]],
    [t.scales, perScale, scale],
    [t.biases, perScale, scale],
  ];
  const out = { mapped: 0, copied: 0 };
  for (const [view, row, align] of parts) {
    if (view === undefined) continue;
    const strides = t.rows === 1 ? [] : [view.rowStride];
    if (t.experts > 1) strides.push(view.outerStride);
    const aligned = [view.offset, ...strides].every((n) => n % align === 0);
    const packed = t.rows === 1 || view.rowStride === row;
    out[aligned && packed ? "mapped" : "copied"] += t.experts * t.rows * row;
  }
  if (t.globalScale !== undefined) out[t.globalScale.offset % 4 === 0 ? "mapped" : "copied"] += t.experts * 4;
  // Norms and biases are kept as float32 beside the file's bytes, padded by 16.
  if (isVector(t.slot)) out.copied += (t.cols + 16) * 4;
  return out;
}

function isVector(slot: Slot): boolean {
  const norms: readonly Slot[] = [SLOT.finalNorm, SLOT.attnNorm, SLOT.ffnNorm];
  return norms.includes(slot) || Object.values(BIAS_OF).includes(slot);
}

function rowBytes(t: PlannedTensor): number {
  return (t.cols * elementBits(t)) / 8;
}

/** Bits of one code or value. */
export function elementBits({ format, bits }: Pick<PlannedTensor, "format" | "bits">): number {
  return format === "f32" || format === "f16" || format === "bf16" ? 8 * FLOAT_BYTES[format] : bits;
}
