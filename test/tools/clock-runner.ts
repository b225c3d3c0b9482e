// A runner process whose tokens are the time, for measuring the way of a token from a runner to a client: every 20 ms each
// request gets one, as from a batch's step, all in one write. Writes with the runner's own MessageWriter.
//   bun test/tools/clock-runner.ts    (started by RunnerClient)

import { LineSplitter } from "../../src/engine/line-splitter.ts";
import { MessageWriter } from "../../src/engine/message-writer.ts";
import type { EngineStatus, RunnerCommand } from "../../src/engine/protocol.ts";

const STEP_MS = 20;

/** Microseconds since 1970 in 31 bits, which wrap after half an hour. */
export function clockToken(): number {
  return Math.round((performance.timeOrigin + performance.now()) * 1000) % 2 ** 31;
}

/** Microseconds from a token to `now`, another one. */
export function clockDelay(token: number, now: number): number {
  return (now - token + 2 ** 31) % 2 ** 31;
}

interface Running {
  id: string;
  left: number;
  made: number;
}

const READY: EngineStatus = {
  ...{ model: "clock", state: "ready", progress: 1, running: 0, waiting: 0, context: 1e6 },
};

async function main(): Promise<void> {
  const writer = new MessageWriter(process.stdout);
  const running: Running[] = [];
  const step = () => {
    const token = clockToken();
    for (const each of [...running]) {
      writer.add({ type: "token", id: each.id, token });
      each.made += 1;
      if (each.made < each.left) continue;
      running.splice(running.indexOf(each), 1);
      writer.add({
        type: "finish",
        id: each.id,
        reason: "length",
        usage: { prompt_tokens: 1, completion_tokens: each.made, cached_tokens: 0 },
        timing: { queue_ms: 0, prefill_ms: 0, decode_ms: 0 },
      });
    }
    writer.flush();
  };
  setInterval(step, STEP_MS);
  const lines = new LineSplitter();
  let loaded = false;
  for await (const chunk of Bun.stdin.stream())
    for (const line of lines.push(chunk)) {
      if (!loaded) {
        loaded = true;
        writer.add({ type: "ready", status: READY });
        writer.flush();
        continue;
      }
      const command = JSON.parse(line) as RunnerCommand;
      if (command.type === "shutdown") process.exit(0);
      if (command.type === "status") writer.add({ type: "status", status: READY });
      if (command.type !== "generate") continue;
      const { id, max_tokens: left } = command.request;
      running.push({ id, left, made: 0 });
    }
  process.exit(0);
}

if (import.meta.main) await main();
