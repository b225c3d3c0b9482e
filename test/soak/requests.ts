// Soak: many requests of mixed lengths through HTTP against the built executable, some cancelled, some left without a
// word, some that must be refused. Prints resident memory as it goes and fails when a request has no end, when memory
// grows by more than 1 % for 1,000 requests behind the warm-up, or when the server does not answer at the end.
// usage: bun test/soak/requests.ts MODEL [requests]   (MODEL: a folder or a name; Linux, for /proc)

import { readFileSync } from "node:fs";
import { join } from "node:path";

/** More than run at once, so that some wait. The cache of this context is small enough to be in use from end to end
 * within the warm-up: pages that are touched for the first time later would look like a leak. */
const CONCURRENT = 24;
const SLOPE_LIMIT = 0.01;

const [model = ".models/smollm2", count = "1000"] = process.argv.slice(2);
const total = Number(count);
const executable = join(import.meta.dir, "../../dist/caravan");

const server = Bun.spawn(
  [executable, "serve", model, "--port", "0", "--context", "1024", "--log-level", "error"],
  {
    stdout: "pipe",
    stderr: "inherit",
  },
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

/** Resident bytes of the node and its runner. */
function resident(): { node: number; runner: number } {
  const rss = (pid: number): number =>
    Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1] ?? 0) * 1024;
  const children = readFileSync(`/proc/${server.pid}/task/${server.pid}/children`, "utf8")
    .trim()
    .split(" ")
    .map(Number);
  return {
    node: rss(server.pid),
    runner: children.filter((pid) => pid > 0).reduce((sum, pid) => sum + rss(pid), 0),
  };
}

let state = 12345;
/** 0 … below-1, reproducible. */
function random(below: number): number {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return Math.floor((state / 2 ** 32) * below);
}

const tally: Record<string, number> = {};

async function one(url: string, id: string): Promise<void> {
  const words = "the quick brown fox jumps over the lazy dog while it rains".split(" ");
  const content = Array.from(
    { length: 1 + random(random(8) === 0 ? 800 : 150) },
    () => words[random(words.length)],
  ).join(" ");
  const kind = random(10);
  const abort = new AbortController();
  const body = {
    model: id,
    messages: [{ role: "user", content }],
    max_tokens: 1 + random(60),
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
      signal: abort.signal,
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
    if (!abort.signal.aborted) throw thrown;
    end = "left";
  }
  tally[end] = (tally[end] ?? 0) + 1;
}

const url = await address();
while (!(await fetch(`${url}/ready`)).ok) await Bun.sleep(100);
const { data } = (await (await fetch(`${url}/v1/models`)).json()) as {
  data: { id: string; state: string }[];
};
const id = data.find((each) => each.state === "ready")?.id ?? "";

const samples: { requests: number; node: number; runner: number }[] = [];
let started = 0;
async function worker(): Promise<void> {
  while (started < total) {
    started++;
    if (started % Math.max(1, Math.floor(total / 20)) === 0) {
      const memory = resident();
      samples.push({ requests: started, ...memory });
      console.log(
        `${started} requests: node ${(memory.node / 1e6).toFixed(1)} MB, runner ${(memory.runner / 1e6).toFixed(1)} MB`,
      );
    }
    await one(url, id);
  }
}
await Promise.all(Array.from({ length: CONCURRENT }, worker));

/** Growth for 1,000 requests behind the first fifth, as a share of the mean (least squares). */
function slope(of: "node" | "runner"): number {
  const kept = samples.slice(Math.floor(samples.length / 5));
  const meanX = kept.reduce((sum, each) => sum + each.requests, 0) / kept.length;
  const meanY = kept.reduce((sum, each) => sum + each[of], 0) / kept.length;
  const top = kept.reduce((sum, each) => sum + (each.requests - meanX) * (each[of] - meanY), 0);
  const bottom = kept.reduce((sum, each) => sum + (each.requests - meanX) ** 2, 0);
  return ((top / bottom) * 1000) / meanY;
}

const last = await fetch(`${url}/v1/chat/completions`, {
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify({ model: id, messages: [{ role: "user", content: "Hello" }], max_tokens: 5 }),
});
server.kill("SIGTERM");
const code = await server.exited;
const ended = Object.values(tally).reduce((sum, n) => sum + n, 0);
console.log(
  JSON.stringify({
    tally,
    ended,
    slope_node: slope("node"),
    slope_runner: slope("runner"),
    last: last.status,
    exit: code,
  }),
);
const failed =
  ended !== total ||
  last.status !== 200 ||
  code !== 0 ||
  slope("node") > SLOPE_LIMIT ||
  slope("runner") > SLOPE_LIMIT;
process.exit(failed ? 1 : 0);
