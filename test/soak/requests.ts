// Soak: many requests of mixed lengths through HTTP against the built executable, some cancelled, some left without a
// word, some that must be refused. Between rounds nothing runs: then every process collects its garbage and says what it has
// resident. The warm-up lasts until that has levelled out. Fails when it never does, when a request has no end, when a round
// leaves a request or a page behind, when the memory of a process grows by more than 1 % for 1,000 requests behind the
// warm-up, or when the server does not answer at the end.
// usage: bun test/soak/requests.ts MODEL [requests]   (MODEL: a folder or a name; requests: behind the warm-up; Linux, for /proc)

import { growth, levelled, mean } from "./growth.ts";
import { type Rest, WatchedServer } from "./watched-server.ts";

/** More than run at once, so that some wait. The cache of this context is small enough to be in use from end to end
 * within the warm-up: pages that are touched for the first time later would look like a leak. */
const CONCURRENT = 24;
const SLOPE_LIMIT = 0.01;
/** A request that has no end by then has none. */
const REQUEST_LIMIT_MS = 900_000;
const ROUNDS = 15;
/** Code is compiled, tables and the cache come into use, and the node remembers as many requests as it ever will (KEPT of
 * src/api/ops/request-trace.ts); the allocators' arenas fill a while longer. */
const WARM_UP_LEAST = 1000;
const WARM_UP_ROUND = 500;
const WARM_UP_MOST = 8000;
/** One request in so many has up to 800 words and 60 tokens; the others are short, so that there can be many of them. */
const LONG_ONE_IN = 3;

const [model = ".models/smollm2", count = "3000"] = process.argv.slice(2);
const measured = Number(count);
const server = await WatchedServer.start(model);

let state = 12345;
/** 0 … below-1, reproducible. */
function random(below: number): number {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return Math.floor((state / 2 ** 32) * below);
}

const tally: Record<string, number> = {};

async function one(url: string, id: string, short: boolean): Promise<void> {
  const words = "the quick brown fox jumps over the lazy dog while it rains".split(" ");
  const content = Array.from(
    { length: 1 + random(short ? 5 : random(8) === 0 ? 800 : 150) },
    () => words[random(words.length)],
  ).join(" ");
  const kind = random(10);
  const abort = new AbortController();
  const body = {
    model: id,
    messages: [{ role: "user", content }],
    max_tokens: 1 + random(short ? 4 : 60),
    stream: kind !== 0,
    n: kind === 1 ? 3 : 1,
    seed: random(1000),
    ...(kind === 2 ? { logprobs: true, top_logprobs: 5 } : {}),
    ...(kind === 3 ? { presence_penalty: 0.5, stop: ["fox"] } : {}),
  };
  let end = "answered";
  try {
    const reply = await fetch(`${url}/v1/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: AbortSignal.any([abort.signal, AbortSignal.timeout(REQUEST_LIMIT_MS)]),
      // Bun's own is too short for a machine that does other work.
      timeout: false,
    });
    if (!reply.ok) end = `refused ${reply.status}`;
    const reader = reply.body?.getReader();
    const leaveAfter = kind === 4 || kind === 5 ? 1 + random(6) : Number.POSITIVE_INFINITY;
    for (let chunks = 0; reader !== undefined; chunks++) {
      const { done } = await reader.read();
      if (done) break;
      if (chunks >= leaveAfter) {
        abort.abort();
        end = "left";
        break;
      }
    }
  } catch (thrown) {
    end = abort.signal.aborted ? "left" : `lost: ${thrown}`;
  }
  tally[end] = (tally[end] ?? 0) + 1;
}

const { url, id } = server;
const MB = (bytes: number) => (bytes / 1e6).toFixed(1);
const samples: { requests: number; processes: Rest[] }[] = [];
const left: string[] = [];

let started = 0;
async function worker(until: number): Promise<void> {
  while (started < until) {
    started++;
    await one(url, id, started % LONG_ONE_IN !== 0);
  }
}

/** Requests until so many have been sent, and what is left when they have ended. */
async function round(until: number): Promise<{ requests: number; processes: Rest[] }> {
  await Promise.all(Array.from({ length: CONCURRENT }, () => worker(until)));
  const processes = await server.collect();
  for (const what of [
    "caravan_generations_running",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
  ]) {
    const value = await server.metric(what);
    if (value !== 0) left.push(`${what} is ${value} after ${until} requests`);
  }
  const words = processes.map(
    ({ name, before, after, heap, objects }) =>
      `${name} ${MB(after)} MB (${MB(before)} with garbage; heap ${MB(heap)} MB, ${objects} objects)`,
  );
  console.log(`${until} requests: ${words.join(", ")}`);
  return { requests: until, processes };
}

const warmUp = [await round(WARM_UP_LEAST)];
const isLevel = () =>
  (warmUp[0]?.processes ?? []).every(({ pid }) =>
    levelled(warmUp.map(({ processes }) => processes.find((one) => one.pid === pid)?.after ?? 0)),
  );
while (!isLevel() && started < WARM_UP_MOST) warmUp.push(await round(started + WARM_UP_ROUND));
if (!isLevel()) left.push(`memory has not levelled out after ${started} requests`);
console.log(`the warm-up took ${started} requests`);

const first = started;
for (let i = 0; i <= ROUNDS; i++) samples.push(await round(first + Math.round((measured * i) / ROUNDS)));

/** Growth of a process for 1,000 requests behind the warm-up, as a share of its mean. */
function slope(pid: number, of: "before" | "after" | "heap"): number {
  const kept = samples.flatMap(({ requests, processes }) =>
    processes.filter((one) => one.pid === pid).map((one) => ({ at: requests / 1000, bytes: one[of] })),
  );
  return growth(kept) / mean(kept);
}

const last = await fetch(`${url}/v1/chat/completions`, {
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify({ model: id, messages: [{ role: "user", content: "Hello" }], max_tokens: 5 }),
});
const code = await server.stop();
const ended = Object.values(tally).reduce((sum, n) => sum + n, 0);
const slopes = (samples.at(-1)?.processes ?? []).map(({ pid, name }) => ({
  process: name,
  resident: slope(pid, "after"),
  heap: slope(pid, "heap"),
  with_garbage: slope(pid, "before"),
}));
console.log(
  JSON.stringify({ tally, ended, growth_per_1000_requests: slopes, last: last.status, exit: code }),
);
const processes = new Set(samples.flatMap((each) => each.processes.map(({ pid }) => pid)));
const failures = [
  ...left,
  ...Object.keys(tally).filter((end) => end.startsWith("lost")),
  ...(last.status === 200 ? [] : [`the last request was answered with ${last.status}`]),
  ...(code === 0 ? [] : [`the server ended with ${code}`]),
  ...(processes.size === slopes.length ? [] : ["a process was replaced"]),
  ...slopes
    .filter(({ resident }) => !(resident <= SLOPE_LIMIT))
    .map(
      ({ process, resident }) => `${process} grows by ${(resident * 100).toFixed(2)} % for 1,000 requests`,
    ),
];
for (const failure of failures) console.log(`FAIL ${failure}`);
process.exit(failures.length === 0 ? 0 : 1);
