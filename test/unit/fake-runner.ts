// A runner process without an engine, for the tests of RunnerClient: the model's name in the load line says how it
// behaves, and tokens count up from the prompt's first one.

import { LineSplitter } from "../../src/engine/line-splitter.ts";
import type { LoadOptions } from "../../src/engine/load-options.ts";
import type { EngineStatus, RunnerCommand, RunnerMessage } from "../../src/engine/protocol.ts";

let load: LoadOptions | undefined;
let silent = false;
const running = new Map<string, ReturnType<typeof setInterval>>();

function send(...messages: RunnerMessage[]): void {
  process.stdout.write(messages.map((message) => `${JSON.stringify(message)}\n`).join(""));
}

function status(): EngineStatus {
  return {
    model: load?.model ?? "",
    state: "ready",
    progress: 1,
    running: running.size,
    waiting: 0,
    context: 100,
  };
}

function start(options: LoadOptions): void {
  load = options;
  if (options.model === "no-file") {
    send({ type: "fatal", error: { code: "bad_file", message: "no such model", where: options.modelDir } });
    process.exit(1);
  }
  if (options.model === "crash") {
    process.stderr.write("segmentation fault in the fake\n");
    process.exit(3);
  }
  send({ type: "loading", progress: 0.5, detail: "half" }, { type: "ready", status: status() });
}

function obey(command: RunnerCommand): void {
  if (command.type === "shutdown") process.exit(0);
  if (silent) return;
  if (command.type === "status") send({ type: "status", status: status() });
  if (command.type === "cancel") finish(command.id, 0, "cancelled");
  if (command.type !== "generate") return;
  const { id, tokens, max_tokens } = command.request;
  if (load?.model === "hang") {
    silent = true;
    return;
  }
  if (load?.model === "garbage") process.stdout.write("this is no JSON\n");
  let count = 0;
  const timer = setInterval(() => {
    send({ type: "token", id, token: (tokens[0] ?? 0) + count });
    count++;
    if (count >= max_tokens) finish(id, count, "length");
  }, 1);
  running.set(id, timer);
}

function finish(id: string, count: number, reason: "length" | "cancelled"): void {
  const timer = running.get(id);
  if (timer === undefined) return;
  clearInterval(timer);
  running.delete(id);
  const usage = { prompt_tokens: 1, completion_tokens: count, cached_tokens: 0 };
  send({ type: "finish", id, reason, usage, timing: { queue_ms: 0, prefill_ms: 0, decode_ms: 0 } });
}

const lines = new LineSplitter();
for await (const chunk of Bun.stdin.stream())
  for (const line of lines.push(chunk)) load === undefined ? start(JSON.parse(line)) : obey(JSON.parse(line));
process.exit(0);
