// What a token's mask costs on Llama 4's vocabulary: random answers under sixteen schemas, time to take a token and to
// make the next mask. The first time in a state and later ones are told apart: masks of a state are kept.
//   bun test/tools/bench-masks.ts [FOLDER-WITH-TOKENIZER] [tokens a schema]

import { join } from "node:path";
import { FLAG_SPECIAL } from "../../src/chat/token-table.ts";
import { GrammarService } from "../../src/grammar/grammar-service.ts";
import type { GrammarMatcher } from "../../src/grammar/matcher.ts";
import { FORM_SCHEMAS } from "./form-schemas.ts";
import { seededRandom } from "./seeded-random.ts";

const TARGET_MS = 1;
const ANSWER_TOKENS = 120;
const [dir = join(import.meta.dir, "../../build/llama4-tokenizer"), many = "600"] = process.argv.slice(2);
const tokens = Number(many);

const percentile = (sorted: readonly number[], share: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN;
const ms = (value: number): string => value.toFixed(3).padStart(8);

/** One of the set bits: a token that closes something, now and then, else any. */
function choose(mask: Uint32Array, random: () => number, closers: readonly number[]): number {
  const has = (id: number): boolean => (((mask[id >> 5] ?? 0) >>> (id & 31)) & 1) === 1;
  if (random() < 0.12) {
    const closer = closers.find(has);
    if (closer !== undefined) return closer;
  }
  const size = mask.length * 32;
  const from = Math.floor(random() * size);
  for (let i = 0; i < size; i++) if (has((from + i) % size)) return (from + i) % size;
  throw new Error("an empty mask");
}

const began = performance.now();
const probe = new GrammarService({ dir, vocab: 202_048 });
const { table } = await probe.prepare();
const vocab = table.flags.length;
const ready = performance.now() - began;
const end = table.flags.findIndex((flags) => (flags & FLAG_SPECIAL) !== 0);
const decoder = new TextDecoder();
const texts = new Map<string, number>();
for (let id = 0; id < vocab; id++) {
  const bytes = table.bytes.subarray(table.offsets[id], table.offsets[id + 1]);
  if (bytes.length < 3) texts.set(decoder.decode(bytes), id);
}
const closers = ['"', "}", "]", ",", '":'].flatMap((text) => texts.get(text) ?? []);
console.log(`${vocab} tokens; vocabulary read in ${Math.round(ready)} ms`);
console.log(
  "schema                     compile      p50      p99    worst ms a token (accept and mask); accept p99",
);

const random = seededRandom(7);
const all: number[] = [];
for (const { name, schema } of FORM_SCHEMAS) {
  const started = performance.now();
  const spec = { type: "json_schema" as const, schema, param: "schema" };
  let matcher: GrammarMatcher = await probe.matcher(spec);
  const compiled = performance.now() - started;
  const spent: number[] = [];
  const accepts: number[] = [];
  let inAnswer = 0;
  for (let i = 0; i < tokens; i++) {
    const before = performance.now();
    const mask = matcher.mask([end]);
    const masked = performance.now();
    const token = choose(mask, random, closers);
    const chosen = performance.now();
    const over = token === end || !matcher.accept(token) || matcher.complete || ++inAnswer > ANSWER_TOKENS;
    const accepted = performance.now() - chosen;
    spent.push(masked - before + accepted);
    accepts.push(accepted);
    if (over) {
      matcher = await probe.matcher(spec);
      inAnswer = 0;
    }
  }
  all.push(...spent);
  spent.sort((a, b) => a - b);
  accepts.sort((a, b) => a - b);
  console.log(
    `${name.padEnd(26)} ${compiled.toFixed(0).padStart(7)} ${ms(percentile(spent, 0.5))} ${ms(percentile(spent, 0.99))} ` +
      `${ms(spent.at(-1) ?? 0)}      ${ms(percentile(accepts, 0.99))}`,
  );
}
probe.close();
all.sort((a, b) => a - b);
const p99 = percentile(all, 0.99);
console.log(
  `${"all".padEnd(34)} ${ms(percentile(all, 0.5))} ${ms(p99)} ${ms(all.at(-1) ?? 0)}; ` +
    `${p99 <= TARGET_MS ? "met" : "not met"}: p99 <= ${TARGET_MS} ms`,
);
process.exit(p99 <= TARGET_MS ? 0 : 1);
