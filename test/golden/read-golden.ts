// Reads a folder of golden outputs: a checkpoint, its prompt and continuation, and the logits that other programs computed.

import { existsSync, readdirSync } from "node:fs";
import { open } from "node:fs/promises";
import { join } from "node:path";
import { readSafetensorsHeader } from "../../src/model/safetensors.ts";

/** A larger set of the same form, which need not be there. */
export const FURTHER = join(import.meta.dir, "../../../shared/golden");
/** Committed goldens come first. */
const FOLDERS = [join(import.meta.dir, "data"), FURTHER];

/** Checkpoint folders that hold `file`, each name once. */
export function goldenFolders(file: string): { name: string; dir: string }[] {
  const found = new Map<string, string>();
  for (const folder of FOLDERS) {
    for (const name of existsSync(folder) ? readdirSync(folder) : []) {
      if (!found.has(name) && existsSync(join(folder, name, file))) found.set(name, join(folder, name));
    }
  }
  return [...found].map(([name, dir]) => ({ name, dir })).sort((a, b) => (a.name < b.name ? -1 : 1));
}

export type GoldenTensors = ReadonlyMap<
  string,
  { shape: readonly number[]; data: Float32Array | Int32Array }
>;

/** All tensors of a golden file; F32 and I32 only. Empty where the file is not there. */
export async function readGolden(path: string): Promise<GoldenTensors> {
  const out = new Map<string, { shape: readonly number[]; data: Float32Array | Int32Array }>();
  if (!existsSync(path)) return out;
  const { tensors } = await readSafetensorsHeader(path);
  const file = await open(path);
  try {
    for (const [name, { dtype, shape, offset, sizeBytes }] of tensors) {
      if (dtype !== "F32" && dtype !== "I32") throw new Error(`${path}: ${name} has type ${dtype}`);
      const bytes = new Uint8Array(sizeBytes);
      await file.read(bytes, 0, sizeBytes, offset);
      out.set(name, {
        shape,
        data: dtype === "F32" ? new Float32Array(bytes.buffer) : new Int32Array(bytes.buffer),
      });
    }
  } finally {
    await file.close();
  }
  return out;
}

export function floats(golden: GoldenTensors, name: string): Float32Array | undefined {
  const data = golden.get(name)?.data;
  return data instanceof Float32Array ? data : undefined;
}

export function integers(golden: GoldenTensors, name: string): number[] {
  const data = golden.get(name)?.data;
  if (!(data instanceof Int32Array)) throw new Error(`no integers ${name}`);
  return [...data];
}

/** Largest absolute difference; NaN anywhere counts as infinite. */
export function largestDifference(a: Float32Array, b: Float32Array): number {
  if (a.length !== b.length) throw new Error(`${a.length} values compared with ${b.length}`);
  let most = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs((a[i] ?? Number.NaN) - (b[i] ?? Number.NaN));
    if (!(difference <= most)) most = Number.isNaN(difference) ? Number.POSITIVE_INFINITY : difference;
  }
  return most;
}
