// What values sampling parameters may have, in one place for every API family, model files and the terminal. The
// ranges are OpenAI's where OpenAI has the parameter.

import * as v from "valibot";

export const SAMPLING_RANGES = {
  temperature: [0, 2],
  top_p: [0, 1],
  min_p: [0, 1],
  presence_penalty: [-2, 2],
  frequency_penalty: [-2, 2],
  xtc_probability: [0, 1],
  xtc_threshold: [0, 1],
} as const satisfies Record<string, readonly [low: number, high: number]>;

/** Above 0; 1 is off. */
const MAX_REPETITION_PENALTY = 10;

export const range = (low: number, high: number) => v.pipe(v.number(), v.minValue(low), v.maxValue(high));
export const whole = (low: number, high = Number.MAX_SAFE_INTEGER) =>
  v.pipe(v.number(), v.safeInteger(), v.minValue(low), v.maxValue(high));

const ranged = (name: keyof typeof SAMPLING_RANGES) => {
  const [low, high] = SAMPLING_RANGES[name];
  return range(low, high);
};

/** What the engine can compute with; model files may say more than clients. */
export const fileValues = {
  temperature: range(0, 100),
  repetition_penalty: v.pipe(v.number(), v.gtValue(0), v.maxValue(1000)),
};

/** Schemas of the values, none of them optional. top_k −1 and 0 are off. */
export const samplingValues = {
  temperature: ranged("temperature"),
  top_p: ranged("top_p"),
  top_k: whole(-1),
  min_p: ranged("min_p"),
  presence_penalty: ranged("presence_penalty"),
  frequency_penalty: ranged("frequency_penalty"),
  repetition_penalty: v.pipe(v.number(), v.gtValue(0), v.maxValue(MAX_REPETITION_PENALTY)),
  xtc_probability: ranged("xtc_probability"),
  xtc_threshold: ranged("xtc_threshold"),
  seed: v.pipe(v.number(), v.safeInteger()),
};
