// How a module is quantized: MLX's rule. An entry for the module's path in config.json wins; otherwise the module is
// quantized if it has scales, and bits and group follow from the shapes.

import { CaravanError } from "../errors.ts";

export type WeightFormat = "f32" | "f16" | "bf16" | "affine" | "mxfp4" | "mxfp8" | "nvfp4";

export interface Quantization {
  mode: "affine" | "mxfp4" | "mxfp8" | "nvfp4";
  bits: number;
  /** Columns that share a scale. */
  group: number;
}

const AFFINE_BITS = [2, 3, 4, 5, 6, 8];
const AFFINE_GROUPS = [32, 64, 128];
const FP_MODES: Record<string, Quantization> = {
  mxfp4: { mode: "mxfp4", bits: 4, group: 32 },
  mxfp8: { mode: "mxfp8", bits: 8, group: 32 },
  nvfp4: { mode: "nvfp4", bits: 4, group: 16 },
};

export interface QuantizedShapes {
  /** Module path: the tensor's name without `.weight`. */
  path: string;
  /** Inputs of the matrix. */
  cols: number;
  /** uint32 words in a row of codes. */
  words: number;
  /** Scales in a row. */
  scales: number;
  scalesDtype: string;
}

const SUPPORTED = "Supported: affine (2, 3, 4, 5, 6, 8 bits; groups of 32, 64, 128), mxfp4, mxfp8, nvfp4.";

/**
 * Whether the module is quantized.
 * @param hasScales whether the checkpoint has `<path>.scales`
 * @throws CaravanError bad_file where config.json says otherwise than the checkpoint
 */
export function isQuantized(
  config: Record<string, unknown> | undefined,
  path: string,
  hasScales: boolean,
  where: string,
): boolean {
  const entry = entryOf(config, path);
  const says = entry === false ? false : typeof entry === "object" && entry !== null ? true : hasScales;
  if (says === hasScales) return says;
  const problem = says
    ? "is quantized by config.json, but has no scales"
    : "is left in float by config.json, but has scales";
  throw new CaravanError("bad_file", `${path} ${problem}`, { where });
}

/** @throws CaravanError unsupported_model naming the module, or bad_file where entry and shapes contradict each other */
export function quantizationOf(
  config: Record<string, unknown> | undefined,
  shapes: QuantizedShapes,
  where: string,
): Quantization {
  const entry = entryOf(config, shapes.path);
  const found =
    typeof entry === "object" && entry !== null
      ? explicit(entry as Record<string, unknown>, shapes, where)
      : inferred(shapes, where);
  check(found, shapes, where);
  return found;
}

/** Entries are written with or without the prefix of multimodal checkpoints. */
function entryOf(config: Record<string, unknown> | undefined, path: string): unknown {
  return config?.[path] ?? config?.[path.replace(/^language_model\./, "")];
}

/** An entry stands alone: what it leaves out has the default, not the value at the top of the object. */
function explicit(entry: Record<string, unknown>, shapes: QuantizedShapes, where: string): Quantization {
  const mode = entry.mode ?? "affine";
  const fp = typeof mode === "string" && Object.hasOwn(FP_MODES, mode) ? FP_MODES[mode] : undefined;
  if (fp !== undefined) return fp;
  const bits = entry.bits ?? (32 * shapes.words) / shapes.cols;
  const group = entry.group_size ?? shapes.cols / shapes.scales;
  if (mode === "affine" && typeof bits === "number" && typeof group === "number") {
    return { mode: "affine", bits, group };
  }
  throw unsupported(shapes.path, JSON.stringify({ mode, bits, group_size: group }), where);
}

function unsupported(path: string, what: string, where: string): CaravanError {
  return new CaravanError("unsupported_model", `quantization of ${path}: ${what} is not supported`, {
    where,
    hint: SUPPORTED,
  });
}

function inferred({ path, cols, words, scales, scalesDtype }: QuantizedShapes, where: string): Quantization {
  const group = cols / scales;
  const bits = (32 * words) / cols;
  if (scalesDtype !== "U8") return { mode: "affine", bits, group };
  const fp = Object.values(FP_MODES).find((mode) => mode.bits === bits && mode.group === group);
  if (fp !== undefined) return fp;
  throw unsupported(path, `${bits} bits with byte scales for groups of ${group}`, where);
}

function check(
  q: Quantization,
  { path, cols, words, scales, scalesDtype }: QuantizedShapes,
  where: string,
): void {
  if (q.mode === "affine" && (!AFFINE_BITS.includes(q.bits) || !AFFINE_GROUPS.includes(q.group))) {
    throw unsupported(path, `${q.bits} bits in groups of ${q.group}`, where);
  }
  const bytes = scalesDtype === "U8";
  if (words * 32 !== cols * q.bits || scales * q.group !== cols || bytes !== (q.mode !== "affine")) {
    throw new CaravanError(
      "bad_file",
      `${path}: ${words} words and ${scales} ${scalesDtype} scales a row do not hold ${cols} columns as ${q.mode} with ${q.bits} bits in groups of ${q.group}`,
      { where },
    );
  }
}
