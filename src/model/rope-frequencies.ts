// Rotation frequencies of RoPE with their scaling (llama4.md 1.2), in the float32 steps that Hugging Face takes: at large
// positions the last bit of a frequency is visible in the angle.

import * as v from "valibot";
import { CaravanError } from "../errors.ts";

const positive = v.pipe(v.number(), v.finite(), v.gtValue(0));

/** `rope_scaling`, and `rope_parameters` of newer files, which has the base too. */
export const RopeScaling = v.looseObject({
  rope_type: v.nullish(v.string()),
  /** Older name of rope_type. */
  type: v.nullish(v.string()),
  rope_theta: v.nullish(positive),
  factor: v.nullish(positive),
  low_freq_factor: v.nullish(positive),
  high_freq_factor: v.nullish(positive),
  original_max_position_embeddings: v.nullish(positive),
});
export type RopeScaling = v.InferOutput<typeof RopeScaling>;

const f32 = Math.fround;

/**
 * float32 [headDim/2]: theta^(-2j/headDim), scaled.
 * @param key names the object in messages
 * @throws CaravanError unsupported_model for a rope_type other than default, linear and llama3; bad_file without a factor
 */
export function ropeFrequencies(
  theta: number,
  headDim: number,
  scaling: RopeScaling,
  where: string,
  key: string,
): Float32Array {
  const scale = scaler(scaling, where, key);
  return Float32Array.from({ length: headDim / 2 }, (_, j) =>
    scale(f32(1 / f32(theta ** f32((2 * j) / headDim)))),
  );
}

function scaler(scaling: RopeScaling, where: string, key: string): (frequency: number) => number {
  const type = scaling.rope_type ?? scaling.type ?? "default";
  if (type === "default") return (frequency) => frequency;
  if (type !== "linear" && type !== "llama3") {
    throw new CaravanError(
      "unsupported_model",
      `${key}.rope_type: ${JSON.stringify(type)} is not supported`,
      {
        where,
        hint: "Supported: default, linear, llama3.",
      },
    );
  }
  const factor = scaling.factor;
  if (factor === undefined || factor === null) {
    throw new CaravanError("bad_file", `${key}.factor is missing; rope_type ${type} needs it`, { where });
  }
  if (type === "linear") return (frequency) => f32(frequency / factor);
  const low = scaling.low_freq_factor ?? 1;
  const high = scaling.high_freq_factor ?? 4;
  const original = scaling.original_max_position_embeddings ?? 8192;
  return (frequency) => {
    const wavelength = f32(f32(2 * Math.PI) / frequency);
    if (wavelength < original / high) return frequency;
    // With low == high (Scout) the band between is empty, and its formula would divide by zero.
    if (wavelength > original / low || low === high) return f32(frequency / factor);
    const smooth = f32(f32(f32(original / wavelength) - low) / f32(high - low));
    return f32(f32(f32(f32(1 - smooth) * frequency) / factor) + f32(smooth * frequency));
  };
}
