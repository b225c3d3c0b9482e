// How much memory JavaScript takes, all processes together, with Llama 4's vocabulary: a model of Llama 4's kind with tiny
// layers, its real tokenizer and template, and everything that keeps tables of the vocabulary at work at once: long prompts,
// streams, answers in sixteen forms, tool calls, log-probabilities. What is resident beside the mapped weights counts, the
// little native memory of such a model and pages that processes share (once for each) included.
// usage: bun test/soak/javascript-memory.ts [tensor ranks]   (Linux, for /proc; `make fixtures` makes the tokenizer)

import { cpSync, existsSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { Place, PROGRAM } from "../tools/built-caravan.ts";
import { FORM_SCHEMAS } from "../tools/form-schemas.ts";
import { writeTinyLlama4 } from "../tools/tiny-llama4.ts";
import { type ProcessMemory, processMemory } from "./process-memory.ts";

const LIMIT_BYTES = 600e6;
const SAMPLE_MS = 250;
const VOCABULARY = 202_048;
/** Ends of text, message and turn: answers then have the length that was asked for. */
const ENDS = [200_001, 200_007, 200_008];
const TOKENIZER = join(import.meta.dir, "../../build/llama4-tokenizer");
const ranks = process.argv[2] ?? "1";

if (!existsSync(join(TOKENIZER, "tokenizer.json")) || !existsSync(PROGRAM)) {
  console.log(`${TOKENIZER} or ${PROGRAM} is missing: make fixtures dist/caravan`);
  process.exit(2);
}

const place = new Place();
const model = place.path("llama4");
mkdirSync(model);
writeTinyLlama4(model, 7, { vocab: VOCABULARY, contextTokens: 65_536, never: ENDS });
cpSync(TOKENIZER, model, { recursive: true });

/** A busy machine may take its time. */
const LOAD_SECONDS = 120;

let phase = "loading";
let most: { sum: number; each: ProcessMemory[]; phase: string } = { sum: 0, each: [], phase };
let mostOfPhase = 0;
const share = ({ resident, apart }: ProcessMemory) => resident - apart;
const look = (): number => {
  const each = processMemory(server.pid, model);
  const sum = each.reduce((total, one) => total + share(one), 0);
  if (sum > most.sum) most = { sum, each, phase };
  mostOfPhase = Math.max(mostOfPhase, sum);
  return sum;
};
const server = place.start([
  "serve",
  model,
  "--port=0",
  "--context=32768",
  `--tensor=${ranks}`,
  "--log-level=error",
]);
const sampler = setInterval(look, SAMPLE_MS);
const statuses: Record<string, number> = {};
const MB = (bytes: number) => `${(bytes / 1e6).toFixed(0)} MB`;

let url = "";

async function isReady(): Promise<boolean> {
  url ||= /http:\/\/\S+/.exec(server.out())?.[0] ?? "";
  return url !== "" && (await fetch(`${url}/ready`)).ok;
}

async function ask(path: string, body: object): Promise<void> {
  const reply = await fetch(`${url}${path}`, { method: "POST", body: JSON.stringify(body) });
  const text = await reply.text();
  if (reply.status !== 200) console.log(`${path}: ${reply.status} ${text.slice(0, 300)}`);
  statuses[reply.status] = (statuses[reply.status] ?? 0) + 1;
}

const words = (count: number) =>
  "Sixteen words about rain in the hills, häuser am See, 雨が降る。 ".repeat(count / 8);
const chat = (text: string, more: object = {}) =>
  ask("/v1/chat/completions", {
    model: "llama4",
    messages: [{ role: "user", content: text }],
    max_tokens: 100,
    ...more,
  });
const tool = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather of a place",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const PHASES: [name: string, work: () => Promise<void>[]][] = [
  ["sixteen streams", () => Array.from({ length: 16 }, (_, i) => chat(words(40 * i), { stream: true }))],
  [
    "sixteen forms at once",
    () =>
      FORM_SCHEMAS.map(({ name, schema }) =>
        chat(words(40), {
          stream: true,
          response_format: { type: "json_schema", json_schema: { name: name.replace(/\W/g, "_"), schema } },
        }),
      ),
  ],
  [
    "tool calls",
    () =>
      ["auto", "required", "required", "none"].map((tool_choice) =>
        chat(words(200), { tools: [tool], tool_choice }),
      ),
  ],
  ["log-probabilities", () => [chat(words(40), { logprobs: true, top_logprobs: 20, n: 4 })]],
  ["a prompt of 12,000 words", () => [chat(words(12_000), { stream: true })]],
  ["tokens of 2 MB of text", () => [ask("/v1/tokenize", { model: "llama4", prompt: words(250_000) })]],
];

try {
  for (let tries = 0; !(await isReady()); tries++) {
    if (tries > LOAD_SECONDS * 10) throw new Error(`the model is not loaded: ${server.err()}`);
    await Bun.sleep(100);
  }
  const now = look();
  console.log(`loaded: ${MB(now)} beside the weights, at most ${MB(mostOfPhase)} while loading`);
  for (const [name, work] of PHASES) {
    phase = name;
    mostOfPhase = 0;
    await Promise.all(work());
    const left = look();
    console.log(`${name}: at most ${MB(mostOfPhase)}, ${MB(left)} afterwards`);
  }
  clearInterval(sampler);
  for (const one of most.each)
    console.log(
      `${one.name} (${one.pid}): ${MB(share(one))} when most was taken, besides ${MB(one.apart)} of mapped weights; ` +
        `most ever, weights included: ${MB(one.peak)}`,
    );
  const planned = /^caravan_model_memory_bytes\{[^}]*\} (\d+)$/m.exec(
    await (await fetch(`${url}/metrics`)).text(),
  );
  console.log(
    `planned native memory of the model, weights included: ${MB(Number(planned?.[1] ?? Number.NaN))}`,
  );
  console.log("statuses:", statuses);
  // A busy machine may refuse a form, whose compilation has a limit in time.
  const answered = Object.keys(statuses).every((status) => status === "200" || status === "400");
  const ok = most.sum <= LIMIT_BYTES && answered;
  console.log(
    `${ok ? "ok" : "FAIL"}: JavaScript's share at most ${MB(most.sum)} (${most.phase}; limit ${MB(LIMIT_BYTES)})`,
  );
  process.exitCode = ok ? 0 : 1;
} finally {
  clearInterval(sampler);
  server.kill("SIGTERM");
  await server.ended;
  place.remove();
}
