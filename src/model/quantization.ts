// How a tensor is quantized: MLX's rule. An entry for the module's path in config.json wins; otherwise the module is
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

/** Throws unsupported_model naming the module, or bad_file where entry and shapes contradict each other. */
export function quantizationOf(
  config: Record<string, unknown> | undefined,
  shapes: QuantizedShapes,
  where: string,
): Quantization {
  const found = explicit(config, shapes.path, where) ?? inferred(shapes, where);
  check(found, shapes, where);
  return found;
}

function explicit(
  config: Record<string, unknown> | undefined,
  path: string,
  where: string,
): Quantization | undefined {
  const entry = config?.[path] ?? config?.[path.replace(/^language_model\./, "")];
  if (typeof entry !== "object" || entry === null) return undefined;
  const { mode, bits, group_size: group } = { ...config, ...entry } as Record<string, unknown>;
  return describe(mode, bits, group, path, where);
}

function describe(mode: unknown, bits: unknown, group: unknown, path: string, where: string): Quantization {
  const name = mode ?? "affine";
  const fp = typeof name === "string" ? FP_MODES[name] : undefined;
  if (fp !== undefined) return fp;
  if (name === "affine" && typeof bits === "number" && typeof group === "number")
    return { mode: "affine", bits, group };
  throw new CaravanError(
    "unsupported_model",
    `quantization of ${path}: ${JSON.stringify({ mode: name, bits, group_size: group })} is not supported`,
    {
      where,
      hint: "Supported: affine (2, 3, 4, 5, 6, 8 bits; groups of 32, 64, 128), mxfp4, mxfp8, nvfp4.",
    },
  );
}

function inferred({ path, cols, words, scales, scalesDtype }: QuantizedShapes, where: string): Quantization {
  const group = cols / scales;
  const bits = (32 * words) / cols;
  if (scalesDtype !== "U8") return { mode: "affine", bits, group };
  const fp = Object.values(FP_MODES).find((mode) => mode.bits === bits && mode.group === group);
  if (fp !== undefined) return fp;
  throw new CaravanError(
    "unsupported_model",
    `quantization of ${path}: ${bits} bits with byte scales for groups of ${group} is not supported`,
    { where },
  );
}

function check(
  q: Quantization,
  { path, cols, words, scales, scalesDtype }: QuantizedShapes,
  where: string,
): void {
  if (q.mode === "affine" && (!AFFINE_BITS.includes(q.bits) || !AFFINE_GROUPS.includes(q.group))) {
    throw new CaravanError(
      "unsupported_model",
      `quantization of ${path}: ${q.bits} bits in groups of ${q.group} is not supported`,
      {
        where,
        hint: "Supported: affine (2, 3, 4, 5, 6, 8 bits; groups of 32, 64, 128), mxfp4, mxfp8, nvfp4.",
      },
    );
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
