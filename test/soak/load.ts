// Load: many connections at once against the built executable, streams and whole replies mixed, some cancelled, some
// read slowly. Fails when a request is neither answered nor refused with 429, when the memory of a process grows behind
// the warm-up, or when the headers of streams take too long while the model generates. A few times the connections pause,
// and every process collects its garbage and says what it has resident.
// usage: bun test/soak/load.ts MODEL [seconds] [connections]   (MODEL: a folder or a name; Linux, for /proc)

import { growth, type Sample } from "./growth.ts";
import { WatchedServer } from "./watched-server.ts";

/** CARAVAN_HEADERS_P99_MS is for machines that do other work meanwhile. */
const HEADERS_P99_MS = Number(process.env.CARAVAN_HEADERS_P99_MS ?? "50");
/** Before this, code is still being compiled: times do not count yet. */
const WARM_UP_SECONDS = 3;
/** Before so many requests, memory does not count: the node remembers the last ones (KEPT of src/api/ops/request-trace.ts). */
const WARM_UP_REQUESTS = 1000;
const ROUNDS = 8;
const GROWTH_LIMIT_BYTES_PER_MINUTE = 4e6;
/** A client that reads a piece, and the next after this. */
const SLOW_READ_MS = 100;

const [model = ".models/smollm2", lasting = "120", many = "64"] = process.argv.slice(2);
const seconds = Number(lasting);
const connections = Number(many);
const server = await WatchedServer.start(model, { CARAVAN_MAX_QUEUE: "24" });

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

function percentile(sorted: readonly number[], share: number): number {
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? Number.NaN;
}

const { url, id } = server;
await one(url, id);

const MB = (bytes: number) => `${(bytes / 1e6).toFixed(1)} MB`;
const requests = () => Object.values(tally).reduce((sum, count) => sum + count, 0);
/** Of each process, over minutes under load. */
const memory = new Map<string, Sample[]>();
let most = 0;
let loaded = 0;
for (let round = 1; round <= ROUNDS; round++) {
  const begun = performance.now();
  if (round === 1) countFrom = begun + WARM_UP_SECONDS * 1000;
  const connection = async () => {
    while (performance.now() - begun < (seconds * 1000) / ROUNDS) await one(url, id);
  };
  await Promise.all(Array.from({ length: connections }, connection));
  loaded += performance.now() - begun;
  for (const { pid, name, before, after } of await server.collect()) {
    if (pid === server.pid) most = Math.max(most, before);
    const known = memory.get(`${name} (${pid})`) ?? [];
    memory.set(`${name} (${pid})`, known);
    if (requests() > WARM_UP_REQUESTS) known.push({ at: loaded / 60_000, bytes: after });
  }
}

const open = await server.metric("caravan_generations_running");
const code = await server.stop();

headerMs.sort((a, b) => a - b);
console.log(
  `${requests()} requests over ${connections} connections in ${(loaded / 1000).toFixed(0)} s:`,
  tally,
);
console.log(
  `time to a stream's headers: p50 ${percentile(headerMs, 0.5).toFixed(1)} ms, p99 ${percentile(headerMs, 0.99).toFixed(1)} ms, ` +
    `most ${(headerMs.at(-1) ?? Number.NaN).toFixed(1)} ms over ${headerMs.length}`,
);
console.log(`the node's memory at the end of a round: at most ${MB(most)}, garbage included`);
const growths = [...memory].map(([name, samples]) => {
  const perMinute = growth(samples);
  const sizes = samples.map(({ bytes }) => (bytes / 1e6).toFixed(1)).join(", ");
  console.log(`${name} without garbage: ${sizes} MB; ${MB(perMinute)} a minute under load`);
  return { name, perMinute };
});
const failures = [
  ...wrong.slice(0, 10),
  ...(open === 0 ? [] : [`${open} generations are still running at the end`]),
  ...(code === 0 ? [] : [`the server ended with ${code}`]),
  ...growths
    .filter(({ perMinute }) => seconds >= 60 && !(perMinute <= GROWTH_LIMIT_BYTES_PER_MINUTE))
    .map(({ name }) => `the memory of ${name} grows`),
  ...(percentile(headerMs, 0.99) > HEADERS_P99_MS ? [`p99 of the headers is over ${HEADERS_P99_MS} ms`] : []),
];
for (const failure of failures) console.log(`FAIL ${failure}`);
process.exit(failures.length === 0 ? 0 : 1);
