// A rank process of tests that computes nothing: it speaks the protocol of rank-protocol.ts and misbehaves where its argument
// says so. `bun fake-rank.ts BEHAVIOUR`.

import { writeFileSync } from "node:fs";
import { LineSplitter } from "../../src/engine/line-splitter.ts";

const behaviour = process.argv[2] ?? "";
const say = (message: unknown) => process.stdout.write(`${JSON.stringify(message)}\n`);
const lines = new LineSplitter();
let rank: number | undefined;

function obey(command: { type: string; addresses?: string[]; load?: { modelDir: string } }): void {
  switch (command.type) {
    case "connect":
      if (behaviour === "refuse") {
        const error = { code: "engine_failed", message: "rank 0 refused the key", hint: "start again" };
        say({ type: "fatal", error });
        process.exit(1);
      }
      say({ type: "connected", transport: "tcp", note: `${command.addresses?.length}`, round_trip_us: 7 });
      return;
    case "load":
      say({ type: "loading", bytes: 5 });
      if (behaviour === "die") process.kill(process.pid, "SIGKILL");
      say({
        type: "ready",
        memory: { weights_mapped: 1, weights_copied: 2, kv: 3, scratch: 4 },
        threads: 1,
        cpu: command.load?.modelDir,
      });
      if (behaviour === "leave") process.exit(0);
      return;
    case "shutdown":
      // Tells that it went by itself, and was not killed.
      if (behaviour.startsWith("tell ")) writeFileSync(behaviour.slice(5), "told to leave");
      if (behaviour !== "deaf") process.exit(0);
  }
}

if (behaviour === "deaf") process.on("SIGTERM", () => {});
for await (const chunk of Bun.stdin.stream())
  for (const line of lines.push(chunk)) {
    const value = JSON.parse(line);
    if (rank !== undefined) {
      obey(value);
      continue;
    }
    rank = value.rank;
    if (behaviour === "garbage") process.stdout.write("this is not JSON\n");
    else say({ type: "address", address: Buffer.from(`rank ${rank}`).toString("base64") });
  }
