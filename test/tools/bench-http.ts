// What HTTP takes of a real model's speed: the same answers, read from the engine in this process and as streams over a
// socket by another process, in turns; tokens a second of both, and the difference of their medians. On a machine that
// does other work the medians say little; the processor time of the node beside that of the runner says more (Linux).
//   bun test/tools/bench-http.ts MODEL-FOLDER [streams] [tokens] [rounds]

import { readFileSync } from "node:fs";
import { createApp } from "../../src/api/app.ts";
import { generate } from "../../src/api/generation.ts";
import { Lifecycle } from "../../src/api/lifecycle.ts";
import { resolveSampling } from "../../src/api/sampling-defaults.ts";
import { startServer } from "../../src/api/server.ts";
import { createLogger } from "../../src/log.ts";
import { openModel } from "../../src/node/open-model.ts";

const TARGET = 0.05;
const PROMPT = "Tell me a long story about a caravan that crosses a desert.";

interface Load {
  model: string;
  streams: number;
  tokens: number;
}

/** The other process: reads all streams to their ends. */
async function readStreams(url: string, { model, streams, tokens }: Load): Promise<void> {
  const read = async () => {
    const reply = await fetch(`${url}/v1/chat/completions`, {
      method: "POST",
      body: JSON.stringify({
        model,
        messages: [{ role: "user", content: PROMPT }],
        stream: true,
        ignore_eos: true,
        max_tokens: tokens,
        seed: 1,
      }),
    });
    if (!reply.ok) throw new Error(await reply.text());
    let end = "";
    for await (const bytes of reply.body ?? []) end = new TextDecoder().decode(bytes);
    if (!end.includes("[DONE]")) throw new Error("a stream broke off");
  };
  for await (const _ of Bun.stdin.stream()) {
    // A line on standard input: once more.
    const started = performance.now();
    await Promise.all(Array.from({ length: streams }, read));
    process.stdout.write(`${performance.now() - started}\n`);
  }
}

/** Processor milliseconds of a process so far; NaN where there is no /proc. */
function cpuMs(pid: number | undefined): number {
  try {
    const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]?.split(" ") ?? [];
    return (Number(fields[11]) + Number(fields[12])) * 10;
  } catch {
    return Number.NaN;
  }
}

function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN;
}

async function main(): Promise<void> {
  const [first = ".models/smollm2", second = "1", third = "64", fourth = "7"] = process.argv.slice(2);
  if (first === "read") return readStreams(second, JSON.parse(third) as Load);
  const streams = Number(second);
  const tokens = Number(third);
  const log = createLogger({ level: "silent" });
  const model = await openModel(
    { name: "bench", path: first, source: "folder", bytes: 0, created: 0 },
    { threads: 1, context: 2048, speculate: false, prefixCache: true },
  );
  const lifecycle = new Lifecycle();
  const app = createApp({
    models: {
      list: () => [],
      statuses: () => [model.engine.status()],
      find: async () => model,
      unload: async () => false,
    },
    lifecycle,
    log,
  });
  const server = startServer({
    app,
    lifecycle,
    host: "127.0.0.1",
    port: 0,
    drainSeconds: 1,
    keyed: false,
    log,
  });
  const load: Load = { model: "bench", streams, tokens };
  const reader = Bun.spawn([process.execPath, import.meta.path, "read", server.url, JSON.stringify(load)], {
    stdin: "pipe",
    stdout: "pipe",
    stderr: "inherit",
  });
  const lines = reader.stdout.getReader();

  const prompt = await model.text.renderChat({
    messages: [{ role: "user", content: PROMPT }],
    addGenerationPrompt: true,
  });
  const sampling = resolveSampling({ seed: 1 }, model.defaults);
  const inProcess = async (): Promise<number> => {
    const started = performance.now();
    const one = async () => {
      const events = generate(model, prompt.ids, { sampling, maxTokens: tokens, ignoreEos: true });
      for await (const event of events) if (event.type === "finish") return;
    };
    await Promise.all(Array.from({ length: streams }, one));
    return performance.now() - started;
  };
  const runner = "pid" in model.engine ? Number(model.engine.pid) : undefined;
  const used = { node: 0, runner: 0 };
  const overHttp = async (): Promise<number> => {
    const before = { node: cpuMs(process.pid), runner: cpuMs(runner) };
    reader.stdin.write("\n");
    await reader.stdin.flush();
    const ms = Number(new TextDecoder().decode((await lines.read()).value));
    used.node += cpuMs(process.pid) - before.node;
    used.runner += cpuMs(runner) - before.runner;
    return ms;
  };

  await inProcess();
  await overHttp();
  used.node = 0;
  used.runner = 0;
  const rates = { engine: [] as number[], http: [] as number[] };
  for (let round = 0; round < Number(fourth); round += 1) {
    const turns = [
      async () => rates.engine.push((streams * tokens * 1000) / (await inProcess())),
      async () => rates.http.push((streams * tokens * 1000) / (await overHttp())),
    ];
    // Each goes first in every second round.
    for (const turn of round % 2 === 0 ? turns : turns.reverse()) await turn();
  }
  reader.stdin.end();
  await server.drain();
  await model.close();
  const cost = 1 - median(rates.http) / median(rates.engine);
  const shown = (values: number[]) => values.map((value) => value.toFixed(1)).join(", ");
  console.log(`${streams} streams of ${tokens} tokens, one engine thread, prompt and tokenizing included`);
  console.log(`engine  ${median(rates.engine).toFixed(1)} tokens/s (${shown(rates.engine)})`);
  console.log(`HTTP    ${median(rates.http).toFixed(1)} tokens/s (${shown(rates.http)})`);
  const made = streams * tokens * Number(fourth);
  console.log(
    `processor time over HTTP: node ${((used.node * 1000) / made).toFixed(0)} µs a token, ` +
      `runner ${((used.runner * 1000) / made).toFixed(0)} µs: ${((100 * used.node) / used.runner).toFixed(1)} %`,
  );
  console.log(`HTTP costs ${(cost * 100).toFixed(1)} % (target: less than ${TARGET * 100} %)`);
}

await main();
