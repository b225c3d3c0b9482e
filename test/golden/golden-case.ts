// One golden checkpoint as a test uses it: its tokens, what other programs computed from them, and the engine's own
// logits, each computed once however many tests look at them.

import { existsSync } from "node:fs";
import { join } from "node:path";
import { runLogits } from "../../src/engine/logits.ts";
import {
  FURTHER,
  floats,
  type GoldenTensors,
  goldenFolders,
  integers,
  largestDifference,
  readGolden,
} from "./read-golden.ts";

/** Most prompt tokens fed at once. The goldens' chunks are of 16 tokens: 7 and 10 straddle edges, 16 ends on them. */
export const PIECES = [40, 1, 7, 10, 16];

export interface Reference {
  by: string;
  /** float32 [prompt + decoded, vocab] */
  logits: Float32Array;
}

export interface RunOptions {
  compute: "exact" | "fast";
  /** Default: the whole prompt. */
  piece?: number;
  /** Kernel set, by name; default: the machine's best. */
  cpu?: string;
  threads?: number;
}

export class GoldenCase {
  readonly #runs = new Map<string, Promise<Float32Array>>();

  private constructor(
    readonly dir: string,
    /** Tokens that are the prompt; the others were decoded one at a time. */
    readonly prefill: number,
    readonly tokens: number[],
    readonly references: Reference[],
  ) {}

  static async read(dir: string): Promise<GoldenCase> {
    const own = await readGolden(join(dir, "golden.safetensors"));
    const prompt = integers(own, "prompt");
    // The last greedy token was never fed.
    const tokens = [...prompt, ...integers(own, "tokens").slice(0, -1)];
    const all = references(own, await readGolden(join(dir, "golden_hf.safetensors")));
    return new GoldenCase(dir, prompt.length, tokens, all);
  }

  /** Logits float32 [tokens, vocab], the decoded ones through the cache. */
  run({ compute, piece = this.prefill, cpu, threads = 2 }: RunOptions): Promise<Float32Array> {
    const key = JSON.stringify([compute, piece, cpu, threads]);
    const done = this.#runs.get(key);
    if (done !== undefined) return done;
    const { dir: modelDir, tokens, prefill } = this;
    const options = {
      modelDir,
      tokens,
      prefill,
      piece,
      compute,
      threads,
      ...(cpu === undefined ? {} : { cpu }),
    };
    const run = runLogits(options).then(({ data }) => data);
    this.#runs.set(key, run);
    return run;
  }
}

/** What to compare with, the best authority first: Hugging Face; mlx-lm with the model's own eps in QK norm (its release
 * has another), or reference_forward.py in the folders that it made. */
function references(own: GoldenTensors, hf: GoldenTensors): Reference[] {
  const fixed = own.has("fixeps_prefill") ? "fixeps_" : "";
  const pairs: [string, GoldenTensors, string][] = [
    ["Hugging Face", hf, "hf_"],
    ["mlx-lm", own, fixed],
    ["reference_forward.py", own, "numpy_"],
  ];
  return pairs.flatMap(([by, tensors, prefix]) => {
    const prefill = floats(tensors, `${prefix}prefill`);
    const decode = floats(tensors, `${prefix}decode`);
    return prefill === undefined || decode === undefined
      ? []
      : [{ by, logits: Float32Array.from([...prefill, ...decode]) }];
  });
}

/** Folders with a golden.safetensors: the committed ones, and the larger set where it lies beside the repository. */
export function goldenCases(): { name: string; load: () => Promise<GoldenCase> }[] {
  if (!existsSync(FURTHER)) console.log(`skipped: further goldens, since there is no ${FURTHER}`);
  return goldenFolders("golden.safetensors").map(({ name, dir }) => {
    let loaded: Promise<GoldenCase> | undefined;
    return {
      name,
      load: () => {
        loaded ??= GoldenCase.read(dir);
        return loaded;
      },
    };
  });
}

/** "the same bits", or by how much two rows of logits differ. */
export function bitsOf(mine: Float32Array, other: Float32Array): string {
  const bytes = (a: Float32Array) => new Uint8Array(a.buffer, a.byteOffset, a.byteLength);
  if (Buffer.compare(bytes(mine), bytes(other)) === 0) return "the same bits";
  return mine.length === other.length
    ? `off by up to ${largestDifference(mine, other)}`
    : `${mine.length} values, not ${other.length}`;
}
