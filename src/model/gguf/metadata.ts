// Typed access to GGUF metadata: each key is read with a valibot schema, and a missing or wrong one is an error
// that names the file and the key.

import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import type { GgufModel } from "./split.ts";

export const Count = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
export const Positive = v.pipe(v.number(), v.safeInteger(), v.minValue(1));
export const Real = v.pipe(v.number(), v.finite());
export const Text = v.string();
export const Flag = v.boolean();

type Schema<T> = v.GenericSchema<unknown, T>;

export class Metadata {
  readonly path: string;
  readonly #values: GgufModel["metadata"];

  constructor(model: Pick<GgufModel, "metadata" | "paths">) {
    this.path = model.paths[0] ?? "";
    this.#values = model.metadata;
  }

  has(key: string): boolean {
    return this.#values.has(key);
  }

  /** Undefined where the key is missing. @throws CaravanError bad_file where it has another type or range */
  optional<T>(key: string, schema: Schema<T>): T | undefined {
    const value = this.#values.get(key);
    if (value === undefined) return undefined;
    const parsed = v.safeParse(schema, value);
    if (!parsed.success) throw this.bad(`${key}: ${parsed.issues[0].message}`);
    return parsed.output;
  }

  /** @throws CaravanError bad_file where the key is missing or of another type */
  required<T>(key: string, schema: Schema<T>): T {
    const value = this.optional(key, schema);
    if (value === undefined) throw this.bad(`metadata has no ${key}`);
    return value;
  }

  /** A number that GGUF may give once for all layers or once a layer; only the uniform case is supported. */
  uniform(key: string, schema: Schema<number>): number | undefined {
    const perLayer = this.optional(key, v.union([schema, v.array(schema)]));
    if (!Array.isArray(perLayer)) return perLayer;
    if (new Set(perLayer).size !== 1)
      throw this.unsupported(`${key} differs between layers: [${perLayer.slice(0, 8)}…]`);
    return perLayer[0];
  }

  bad(message: string): CaravanError {
    return new CaravanError("bad_file", message, { where: this.path });
  }

  unsupported(message: string): CaravanError {
    return new CaravanError("unsupported_model", message, {
      where: this.path,
      hint: "`caravan import` takes GGUF files of the architectures llama (Llama 2 and 3) and llama4.",
    });
  }
}

/** The shortest decimal that is this float32, so that 1e-5 does not become 0.000009999999747378752. */
export function shortestDecimal(x: number): number {
  for (let digits = 1; digits < 10; digits++) {
    const short = Number(x.toPrecision(digits));
    if (Math.fround(short) === Math.fround(x)) return short;
  }
  return x;
}
