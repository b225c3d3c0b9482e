// What the API itself costs a token: the server with a scripted engine in this process, the readers in another.
//   bun test/tools/bench-api.ts [streams] [tokens a stream]
// Prints (1) processor time a token with the engine as fast as it can be (many tokens go into one write), less what
// the scripted engine costs alone, median of several rounds; (2) with a token for each stream every 20 ms, as from a
// batch: the delay from the engine's event to the reader, and processor time a token; (3) the same with the engine in a
// process of its own (clock-runner.ts), as runners are: the delay then begins before the token is written to the pipe.
// The delay ends where the socket has the bytes, by the system's own clock (Linux); "to the reader" ends where the other process
// has them, its turn included when many tokens come at once. The targets: p50 at most 0.5 ms, p99 at most 5 ms, 150 µs of
// processor time a token.

import { join } from "node:path";
import { createApp } from "../../src/api/app.ts";
import { Lifecycle } from "../../src/api/lifecycle.ts";
import { startServer } from "../../src/api/server.ts";
import { RunnerClient } from "../../src/engine/runner-client.ts";
import { createLogger } from "../../src/log.ts";
import { clockDelay, clockToken } from "./clock-runner.ts";
import { MODEL, scriptedModels } from "./scripted-models.ts";
import { readTimed } from "./timed-sockets.ts";

const STEP_MS = 20;
const ROUNDS = 5;
const PACED_TOKENS = 300;

interface Load {
  streams: number;
  tokens: number;
  paced: boolean;
  /** The engine is a process. */
  runner: boolean;
}

function percentile(sorted: readonly number[], share: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN;
}

/** Microseconds from the engine to the socket, and to the reader. */
interface Delays {
  socket: number[];
  reader: number[];
}

/** The other process: reads all streams from bare sockets and prints the delays it saw as JSON. */
async function readStreams(url: string, { streams, tokens, paced }: Load): Promise<void> {
  const delays: Delays = { socket: [], reader: [] };
  const { hostname, port } = new URL(url);
  const body = JSON.stringify({
    model: MODEL,
    messages: [{ role: "user", content: "Hi" }],
    stream: true,
    ignore_eos: true,
    max_tokens: tokens,
  });
  const head = `POST /v1/chat/completions HTTP/1.1\r\nHost: ${hostname}\r\nConnection: close\r\nContent-Length: ${body.length}\r\n\r\n`;
  const tails = Array.from({ length: streams }, () => "");
  /** Notes the tokens of bytes of a stream; true at its end. */
  const note = (stream: number, bytes: string, sentUs: number, readUs: number): boolean => {
    const text = tails[stream] + bytes;
    if (paced) {
      for (const match of text.matchAll(/"content":"(\d+)"/g)) {
        delays.reader.push(clockDelay(Number(match[1]), readUs % 2 ** 31));
        if (!Number.isNaN(sentUs)) delays.socket.push(clockDelay(Number(match[1]), sentUs % 2 ** 31));
      }
    }
    // What may be the beginning of a mark that the next bytes complete; no whole one fits.
    tails[stream] = text.slice(text.lastIndexOf("\n") + 1);
    return text.includes("data: [DONE]");
  };
  if (paced && process.platform === "linux") {
    readTimed(Number(port), streams, head + body, (bytes) => {
      note(bytes.socket, bytes.text, bytes.sentUs, bytes.readUs);
    });
    process.stdout.write(JSON.stringify(delays));
    return;
  }
  const read = async (_: unknown, stream: number) => {
    const over = Promise.withResolvers<void>();
    await Bun.connect({
      hostname,
      port: Number(port),
      socket: {
        open: (socket) => void socket.write(head + body),
        data: (socket, bytes) => {
          if (note(stream, bytes.toString("latin1"), Number.NaN, clockToken())) socket.end();
        },
        close: () => over.resolve(),
        error: (_, error) => over.reject(error),
      },
    });
    await over.promise;
  };
  await Promise.all(Array.from({ length: streams }, read));
  process.stdout.write(JSON.stringify(delays));
}

/** Runs the readers in a process of their own; processor microseconds of this one, and the delays. */
async function serve(load: Load): Promise<{ cpuUs: number; delays: Delays }> {
  const runner = load.runner
    ? new RunnerClient({
        model: "clock",
        modelDir: ".",
        command: [process.execPath, join(import.meta.dir, "clock-runner.ts")],
      })
    : undefined;
  await runner?.ready();
  const models = scriptedModels(
    {
      answer: function* () {
        for (;;) yield 97;
      },
      ...(load.paced ? { gate: () => nextStep() } : {}),
    },
    load.paced
      ? // The text of a token is the time at which the engine gave it.
        {
          contextLength: 1e6,
          newDetokenizer: () => ({
            push: (token) => String(load.runner ? token : clockToken()),
            flush: () => "",
          }),
          ...(runner === undefined ? {} : { engine: runner }),
        }
      : { contextLength: 1e6 },
  );
  const lifecycle = new Lifecycle();
  const log = createLogger({ level: "silent" });
  const app = createApp({ models, lifecycle, log });
  const server = startServer({
    app,
    lifecycle,
    host: "127.0.0.1",
    port: 0,
    drainSeconds: 1,
    keyed: true,
    log,
  });
  const before = process.cpuUsage();
  const reader = Bun.spawn([process.execPath, import.meta.path, "read", server.url, JSON.stringify(load)], {
    stdout: "pipe",
    stderr: "inherit",
  });
  const delays = JSON.parse(await new Response(reader.stdout).text()) as Delays;
  const used = process.cpuUsage(before);
  await server.drain();
  await runner?.close();
  const expected = load.streams * load.tokens;
  const produced = runner === undefined ? models.engine.produced : delays.reader.length;
  if (produced !== expected) throw new Error(`${produced} tokens, not ${expected}`);
  return { cpuUs: used.user + used.system, delays };
}

let step: Promise<void> | undefined;
/** The same promise for all streams that wait now: they get their token in one turn, as from one batch. */
function nextStep(): Promise<void> {
  step ??= new Promise((resolve) =>
    setTimeout(() => {
      step = undefined;
      resolve();
    }, STEP_MS),
  );
  return step;
}

/** Processor microseconds that the scripted engine costs with a reader that does nothing. */
async function engineAlone(streams: number, tokens: number): Promise<number> {
  const { engine } = scriptedModels({
    answer: function* () {
      for (;;) yield 97;
    },
  });
  const before = process.cpuUsage();
  const drainOne = async (id: string) => {
    const { GREEDY } = await import("../../src/engine/protocol.ts");
    const request = { id, tokens: [1], max_tokens: tokens, stop_tokens: [], sampling: GREEDY };
    for await (const event of engine.generate(request)) if (event.type === "finish") return;
  };
  await Promise.all(Array.from({ length: streams }, (_, index) => drainOne(String(index))));
  const used = process.cpuUsage(before);
  return used.user + used.system;
}

async function main(): Promise<void> {
  const [first, second, third] = process.argv.slice(2);
  if (first === "read") return readStreams(second ?? "", JSON.parse(third ?? "{}") as Load);
  const streams = Number(first ?? 16);
  const tokens = Number(second ?? 4000);
  const costs: number[] = [];
  for (let round = 0; round <= ROUNDS; round += 1) {
    const alone = await engineAlone(streams, tokens);
    const { cpuUs } = await serve({ streams, tokens, paced: false, runner: false });
    // The first round warms the compiler up.
    if (round > 0) costs.push((cpuUs - alone) / (streams * tokens));
  }
  costs.sort((a, b) => a - b);
  console.log(
    `${streams} streams of ${tokens} tokens: ${percentile(costs, 0.5).toFixed(2)} µs of processor time a token ` +
      `(${ROUNDS} rounds: ${costs.map((cost) => cost.toFixed(2)).join(", ")})`,
  );
  for (const runner of [false, true]) {
    const { delays, cpuUs } = await serve({ streams, tokens: PACED_TOKENS, paced: true, runner });
    const said = (values: number[]) => {
      values.sort((a, b) => a - b);
      const [p50, p99, most] = [0.5, 0.99, 1].map((share) => percentile(values, share).toFixed(0));
      return `p50 ${p50} µs, p99 ${p99} µs, most ${most} µs`;
    };
    const { socket, reader } = delays;
    console.log(
      `${streams} streams, a token each every ${STEP_MS} ms from ${runner ? "a runner process" : "this process"}: ` +
        `${socket.length === 0 ? "" : `delay to the socket ${said(socket)}; `}to the reader ${said(reader)}, ` +
        `over ${reader.length} tokens; ${(cpuUs / reader.length).toFixed(1)} µs of processor time a token`,
    );
  }
}

await main();
