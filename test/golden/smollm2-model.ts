// Where the tests find SmolLM2-135M-Instruct, what Hugging Face transformers says that it answers, and the same model
// rewritten in Llama 4's architecture.

import { existsSync, mkdirSync, statSync } from "node:fs";
import { join } from "node:path";
import reference from "../fixtures/smollm2-reference.json";

const ROOT = join(import.meta.dir, "../..");
const MAKE_SCOUT = join(ROOT, "test/tools/make_smol_scout.py");

export interface GreedyAnswer {
  kind: string;
  ids: number[];
  /** Greedy tokens, one a step, and what they were chosen by. margin: lead over the second, as log-probability. */
  output: number[];
  steps: { logprob: number; margin: number }[];
}

/** SmolLM2 (Q4_1 decoded without loss) by transformers in float32. */
export const SMOLLM2_ANSWERS: readonly GreedyAnswer[] = reference.prompts;
export const SMOLLM2_TEXT: { ids: number[]; mean_nll: number; perplexity: number } = reference.perplexity;

const holdsModel = (dir: string) => existsSync(join(dir, "model.safetensors"));

/** The folder that `make run` imports it into, or the one that `make fixtures` links; undefined where neither is there. */
export const SMOLLM2: string | undefined = [".models/smollm2", "build/smollm2"]
  .map((name) => join(ROOT, name))
  .find(holdsModel);

/** build/smol-scout, made anew where the maker or SmolLM2 is newer (with `make fixtures`' Python, else the system's); or the reason why it cannot be had. */
export function smolScout(): { dir: string } | { missing: string } {
  if (SMOLLM2 === undefined) return { missing: "SmolLM2 is not here (make fixtures)" };
  const dir = join(ROOT, "build/smol-scout");
  const age = (path: string) => statSync(path).mtimeMs;
  const source = Math.max(age(MAKE_SCOUT), age(join(SMOLLM2, "model.safetensors")));
  // config.json is written last.
  if (existsSync(join(dir, "config.json")) && age(join(dir, "config.json")) > source) return { dir };
  mkdirSync(dir, { recursive: true });
  const own = join(ROOT, "build/venv/bin/python");
  const python = existsSync(own) ? own : Bun.which("python3");
  if (python === null) return { missing: "there is no python3 to make it with" };
  const run = Bun.spawnSync([python, MAKE_SCOUT, SMOLLM2, dir], { stdout: "ignore", stderr: "pipe" });
  if (run.exitCode === 0) return { dir };
  const said = run.stderr.toString().trim().split("\n").at(-1);
  return { missing: `make_smol_scout.py failed: ${said}` };
}
