// Load: many connections at once against the built executable, streams and whole replies mixed, some cancelled, some
// read slowly. Fails when a request is neither answered nor refused with 429, when the memory of the node grows behind
// the warm-up, or when the headers of streams take too long while the model generates.
// usage: bun test/soak/load.ts MODEL [seconds] [connections]   (MODEL: a folder or a name; Linux, for /proc)

import { readFileSync } from "node:fs";
import { join } from "node:path";

/** CARAVAN_HEADERS_P99_MS is for machines that do other work meanwhile. */
const HEADERS_P99_MS = Number(process.env.CARAVAN_HEADERS_P99_MS ?? "50");
/** Before this, code is still being compiled: times do not count yet. */
const WARM_UP_SECONDS = 3;
/** Least squares over the second half of the run. */
const GROWTH_LIMIT_BYTES_PER_MINUTE = 8e6;
/** A client that reads a piece, and the next after this. */
const SLOW_READ_MS = 100;
const SAMPLE_MS = 500;

const [model = ".models/smollm2", lasting = "120", many = "64"] = process.argv.slice(2);
const seconds = Number(lasting);
const connections = Number(many);
const executable = process.env.CARAVAN_TEST_PROGRAM ?? join(import.meta.dir, "../../dist/caravan");

const server = Bun.spawn(
  [executable, "serve", model, "--port", "0", "--context", "1024", "--log-level", "error"],
  { stdout: "pipe", stderr: "inherit", env: { ...process.env, CARAVAN_MAX_QUEUE: "24" } },
);

async function address(): Promise<string> {
  let text = "";
  for await (const chunk of server.stdout) {
    text += new TextDecoder().decode(chunk);
    const found = /http:\/\/\S+/.exec(text);
    if (found !== null) return found[0];
  }
  throw new Error(`the server ended: ${text}`);
}

function residentBytes(pid: number): number {
  return Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1] ?? 0) * 1024;
}

let state = 2463534242;
/** 0 … below-1, reproducible. */
function random(below: number): number {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return (state >>> 0) % below;
}

const KINDS = ["stream", "stream", "stream", "slow", "cancel", "whole", "whole"] as const;
type Kind = (typeof KINDS)[number];

let countFrom = Number.POSITIVE_INFINITY;
const tally: Record<string, number> = {};
const headerMs: number[] = [];
const wrong: string[] = [];

async function one(url: string, id: string): Promise<void> {
  const kind: Kind = KINDS[random(KINDS.length)] ?? "stream";
  const words = "the quick brown fox jumps over the lazy dog while it rains".split(" ");
  const content = Array.from({ length: 1 + random(60) }, () => words[random(words.length)]).join(" ");
  const abort = new AbortController();
  const started = performance.now();
  let end: string;
  try {
    const reply = await fetch(`${url}/v1/chat/completions`, {
      method: "POST",
      signal: abort.signal,
      body: JSON.stringify({
        model: id,
        messages: [{ role: "user", content }],
        max_tokens: 8 + random(40),
        stream: kind !== "whole",
        seed: random(1000),
      }),
    });
    if (kind !== "whole" && reply.status === 200 && started > countFrom) {
      headerMs.push(performance.now() - started);
    }
    end = await finish(kind, reply, abort);
  } catch (thrown) {
    end = abort.signal.aborted ? "cancelled" : "lost";
    if (end === "lost") wrong.push(String(thrown));
  }
  tally[end] = (tally[end] ?? 0) + 1;
}

async function finish(kind: Kind, reply: Response, abort: AbortController): Promise<string> {
  if (reply.status === 429) {
    await reply.text();
    const pause = Number(reply.headers.get("retry-after") ?? "1");
    await Bun.sleep(Math.min(pause, 1) * 1000);
    return "refused with 429";
  }
  if (reply.status !== 200) {
    wrong.push(`${reply.status}: ${(await reply.text()).slice(0, 200)}`);
    return `status ${reply.status}`;
  }
  if (kind === "whole") {
    const body = (await reply.json()) as { choices?: { finish_reason?: string }[] };
    if (body.choices?.[0]?.finish_reason === undefined) wrong.push("a whole reply without an end");
    return "whole";
  }
  const decoder = new TextDecoder();
  let text = "";
  let pieces = 0;
  for await (const bytes of reply.body ?? []) {
    text += decoder.decode(bytes, { stream: true });
    pieces += 1;
    if (kind === "cancel" && pieces > 3) {
      abort.abort();
      return "cancelled";
    }
    if (kind === "slow") await Bun.sleep(SLOW_READ_MS);
  }
  if (text.includes('"code":"queue_full"')) return "refused in the stream";
  if (!text.trimEnd().endsWith("data: [DONE]")) wrong.push(`a stream that breaks off: ${text.slice(-200)}`);
  return kind;
}

/** Bytes a minute, of (seconds, bytes). */
function slope(samples: readonly (readonly [number, number])[]): number {
  const n = samples.length;
  const meanX = samples.reduce((sum, [x]) => sum + x, 0) / n;
  const meanY = samples.reduce((sum, [, y]) => sum + y, 0) / n;
  const over = samples.reduce((sum, [x, y]) => sum + (x - meanX) * (y - meanY), 0);
  const under = samples.reduce((sum, [x]) => sum + (x - meanX) ** 2, 0);
  return under === 0 ? 0 : (over / under) * 60;
}

function percentile(sorted: readonly number[], share: number): number {
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? Number.NaN;
}

const url = await address();
const { data } = (await (await fetch(`${url}/v1/models`)).json()) as { data: { id: string }[] };
const id = data[0]?.id ?? model;
while (!(await fetch(`${url}/ready`)).ok) await Bun.sleep(200);
await one(url, id);

const begun = performance.now();
countFrom = begun + WARM_UP_SECONDS * 1000;
const elapsed = () => (performance.now() - begun) / 1000;
const memory: [number, number][] = [];
const sampler = setInterval(() => memory.push([elapsed(), residentBytes(server.pid)]), SAMPLE_MS);
const connection = async () => {
  while (elapsed() < seconds) await one(url, id);
};
await Promise.all(Array.from({ length: connections }, connection));
clearInterval(sampler);

const metrics = await (await fetch(`${url}/metrics`)).text();
const open = Number(/^caravan_generations_running (\d+)$/m.exec(metrics)?.[1] ?? Number.NaN);
server.kill("SIGTERM");
const code = await server.exited;

headerMs.sort((a, b) => a - b);
const half = memory.filter(([at]) => at > elapsed() / 2);
const growth = slope(half);
const total = Object.values(tally).reduce((sum, count) => sum + count, 0);
console.log(`${total} requests over ${connections} connections in ${elapsed().toFixed(0)} s:`, tally);
console.log(
  `time to a stream's headers: p50 ${percentile(headerMs, 0.5).toFixed(1)} ms, p99 ${percentile(headerMs, 0.99).toFixed(1)} ms, ` +
    `most ${(headerMs.at(-1) ?? Number.NaN).toFixed(1)} ms over ${headerMs.length}`,
);
console.log(
  `the node's memory: ${((memory[0]?.[1] ?? 0) / 1e6).toFixed(0)} MB at first, ` +
    `${((memory.at(-1)?.[1] ?? 0) / 1e6).toFixed(0)} MB at last, ${(growth / 1e6).toFixed(2)} MB a minute in the second half`,
);
const failures = [
  ...wrong.slice(0, 10),
  ...(open === 0 ? [] : [`${open} generations are still running at the end`]),
  ...(code === 0 ? [] : [`the server ended with ${code}`]),
  ...(seconds >= 60 && growth > GROWTH_LIMIT_BYTES_PER_MINUTE ? ["memory grows"] : []),
  ...(percentile(headerMs, 0.99) > HEADERS_P99_MS ? [`p99 of the headers is over ${HEADERS_P99_MS} ms`] : []),
];
for (const failure of failures) console.log(`FAIL ${failure}`);
process.exit(failures.length === 0 ? 0 : 1);
