// What answers in a form cost a batch: sixteen streams with sixteen schemas beside sixteen without, in short windows in
// turns in one run, so that what else the machine does meets both alike. Both decode the same number of tokens in the
// same steps. Prints the medians over the pairs, how far the pairs spread, the processor time of the thread that makes
// the masks (Linux), and how long steps waited for masks.
//   bun test/tools/bench-forms.ts MODEL-FOLDER [seconds] [temperature] [streams]

import { readFileSync } from "node:fs";
import { loadModel } from "../../src/engine/load-model.ts";
import { type GenerateEvent, GREEDY } from "../../src/engine/protocol.ts";
import { GrammarService } from "../../src/grammar/grammar-service.ts";
import type { GrammarMatcher } from "../../src/grammar/matcher.ts";
import type { GrammarSpec } from "../../src/grammar/spec.ts";
import { Scheduler } from "../../src/scheduler/scheduler.ts";
import type { Step, StepEngine, StepResult } from "../../src/scheduler/step.ts";
import { StepLoop } from "../../src/scheduler/step-loop.ts";
import { FORM_SCHEMAS } from "./form-schemas.ts";

const TARGET = 0.05;
const WINDOW_TOKENS = 40;
const PROMPT_TOKENS = 24;

const [dir, lasting = "40", warmth = "0.7", wide = "16"] = process.argv.slice(2);
if (dir === undefined)
  throw new Error("usage: bun test/tools/bench-forms.ts MODEL-FOLDER [seconds] [temperature] [streams]");
const seconds = Number(lasting);
const temperature = Number(warmth);
const streams = Number(wide);

/** A list without an end: every stream decodes to its last token. */
const specs: GrammarSpec[] = FORM_SCHEMAS.map(({ schema: { $defs, ...items } }) => ({
  type: "json_schema",
  schema: { ...($defs === undefined ? {} : { $defs }), type: "array", items, minItems: 1000 },
  param: "schema",
}));

interface Decoded {
  atMs: number;
  cpuMs: number;
  computeMs: number;
  maskMs: number;
}

/** Processor milliseconds of this thread; NaN where there is no /proc. */
function threadCpuMs(): number {
  try {
    return Number(readFileSync(`/proc/self/task/${process.pid}/schedstat`, "utf8").split(" ")[0]) / 1e6;
  } catch {
    return Number.NaN;
  }
}

/** Notes the steps in which every stream decodes. */
class NotingEngine implements StepEngine {
  readonly decoded: Decoded[] = [];
  constructor(readonly inner: StepEngine) {}

  get failed(): StepEngine["failed"] {
    return this.inner.failed;
  }

  giveMasks(step: Step, row: number, masks: Uint32Array | undefined): void {
    this.inner.giveMasks(step, row, masks);
  }

  async submit(step: Step): Promise<StepResult> {
    const result = await this.inner.submit(step);
    if (step.rows.length === streams && step.rows.every(({ tokens }) => tokens.length === 1))
      this.decoded.push({
        atMs: performance.now(),
        cpuMs: threadCpuMs(),
        computeMs: result.computeNs / 1e6,
        maskMs: (result.maskNs ?? 0) / 1e6,
      });
    return result;
  }
}

const model = await loadModel({ model: "bench", modelDir: dir, context: 1024, streams });
const grammars = new GrammarService({ dir, vocab: model.limits.vocab });
await grammars.prepare();

interface Window {
  tokensASecond: number;
  /** A token. */
  cpuUs: number;
  /** A step. */
  computeMs: number;
  idleMs: number;
  maskMs: number;
}

let windows = 0;
async function decode(formed: boolean): Promise<Window> {
  const engine = new NotingEngine(model.engine);
  const matchers: (GrammarMatcher | undefined)[] = await Promise.all(
    Array.from({ length: streams }, (_, i) => {
      const spec = specs[i % specs.length];
      return formed && spec !== undefined ? grammars.matcher(spec) : undefined;
    }),
  );
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  let open = streams;
  const emit = (event: GenerateEvent): void => {
    if (event.type === "error") reject(event.error);
    if (event.type === "finish" && --open === 0) resolve();
  };
  const scheduler = new Scheduler({
    geometry: model.geometry,
    limits: model.limits,
    contextTokens: model.contextTokens,
    mode: "batched",
    maxWaiting: streams,
    now: () => performance.now(),
    emit,
  });
  const loop = new StepLoop({ scheduler, engine, depth: 2, onFatal: reject });
  const seed = ++windows;
  matchers.forEach((grammar, i) => {
    const tokens = Array.from({ length: PROMPT_TOKENS }, (_, t) => 100 + ((i * 31 + t * 7) % 4000));
    loop.add(
      {
        id: `${seed} ${i}`,
        tokens,
        max_tokens: WINDOW_TOKENS,
        stop_tokens: [...model.stopTokens],
        ...(formed ? {} : { ban_stop_tokens: true }),
        sampling: { ...GREEDY, temperature, seed: seed * 100 + i },
      },
      grammar,
    );
  });
  await promise;
  const first = engine.decoded[0];
  const last = engine.decoded.at(-1);
  if (first === undefined || last === undefined || first === last) throw new Error("no step had all streams");
  const steps = engine.decoded.length - 1;
  const ms = last.atMs - first.atMs;
  const sum = (of: (each: Decoded) => number): number =>
    engine.decoded.slice(1).reduce((total, each) => total + of(each), 0);
  const computeMs = sum((each) => each.computeMs);
  return {
    tokensASecond: (1000 * steps * streams) / ms,
    cpuUs: (1000 * (last.cpuMs - first.cpuMs)) / (steps * streams),
    computeMs: computeMs / steps,
    idleMs: (ms - computeMs) / steps,
    maskMs: sum((each) => each.maskMs) / steps,
  };
}

const quantile = (values: readonly number[], share: number): number => {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN;
};
const median = (values: readonly number[]): number => quantile(values, 0.5);

// Code is compiled and schemas are read before anything counts.
for (let i = 0; i < 2; i++) for (const formed of [false, true]) await decode(formed);
const pairs: { free: Window; formed: Window }[] = [];
for (const until = performance.now() + seconds * 1000; performance.now() < until; ) {
  // Which comes first alternates, too.
  if (pairs.length % 2 === 0) pairs.push({ free: await decode(false), formed: await decode(true) });
  else {
    const formed = await decode(true);
    pairs.push({ free: await decode(false), formed });
  }
}
const line = (name: string, of: (window: Window) => number, digits: number): void =>
  console.log(
    `${name.padEnd(46)} ${median(pairs.map(({ free }) => of(free)))
      .toFixed(digits)
      .padStart(9)} ` +
      `${median(pairs.map(({ formed }) => of(formed)))
        .toFixed(digits)
        .padStart(9)}`,
  );
console.log(
  `${streams} streams, ${FORM_SCHEMAS.length} schemas, ${pairs.length} pairs of windows of ${WINDOW_TOKENS} steps, ` +
    `${model.limits.vocab} tokens, ${model.threads} threads, temperature ${temperature}`,
);
console.log(`${"medians".padEnd(46)} ${"free".padStart(9)} ${"in form".padStart(9)}`);
line("tokens a second", (each) => each.tokensASecond, 1);
line("step, ms", (each) => each.computeMs, 3);
line("between steps, ms a step", (each) => each.idleMs, 3);
line("steps wait for masks, ms a step", (each) => each.maskMs, 3);
line("processor time of the runner's thread, µs a token", (each) => each.cpuUs, 1);
const costs = pairs.map(({ free, formed }) => 1 - formed.tokensASecond / free.tokensASecond);
const percent = (value: number): string => `${(100 * value).toFixed(1)} %`;
const cost = median(costs);
console.log(
  `forms cost ${percent(cost)} of tokens a second (quartiles ${percent(quantile(costs, 0.25))} and ` +
    `${percent(quantile(costs, 0.75))}); ${cost < TARGET ? "met" : "not met"}: below ${percent(TARGET)}`,
);
grammars.close();
await model.close();
process.exit(cost < TARGET ? 0 : 1);
