// caravan stop: ends the nodes of this user on this machine in order, or has them unload one model.

import { CaravanError } from "../errors.ts";
import { type RunningNode, runningNodes } from "../node/running-nodes.ts";
import { loadSettings } from "../settings.ts";
import type { Command } from "./command.ts";
import { unload } from "./node-client.ts";

const POLL_MS = 50;
/** Beyond the time that running requests have: to close models and go. */
const LAST_STEPS_SECONDS = 10;

export const stop: Command = {
  name: "stop",
  summary: "stop the nodes that run here, or unload a model",
  positionals: "[MODEL]",
  count: [0, 1],
  options: {
    port: { value: "PORT", help: "only the node that listens there" },
    now: { help: "do not wait for running requests" },
  },
  details: `Without MODEL the nodes end: running requests may finish, up to the nodes' drain_seconds.
With MODEL it is taken out of memory, once its requests are over; the next request loads it again.`,
  async run(args) {
    const port = args.integer("port", 1, 65535);
    const nodes = (await runningNodes()).filter(
      ({ url }) => port === undefined || new URL(url).port === String(port),
    );
    if (nodes.length === 0) {
      const where = port === undefined ? "" : ` at port ${port}`;
      throw new CaravanError("invalid_argument", `no node of this user runs here${where}`, {
        hint: "`caravan ps` lists them",
      });
    }
    const [model] = args.positionals;
    if (model !== undefined) return await unloadEverywhere(nodes, model);
    for (const node of nodes) await end(node, args.flag("now"));
    return 0;
  },
};

async function unloadEverywhere(nodes: readonly RunningNode[], model: string): Promise<number> {
  for (const node of nodes) {
    const was = await unload(node, model);
    process.stdout.write(
      was ? `unloaded ${model} at ${node.url}\n` : `${model} was not loaded at ${node.url}\n`,
    );
  }
  return 0;
}

async function end(node: RunningNode, now: boolean): Promise<void> {
  process.kill(node.pid, "SIGTERM");
  if (now) process.kill(node.pid, "SIGTERM");
  const limit = loadSettings().settings.drain_seconds + LAST_STEPS_SECONDS;
  const deadline = performance.now() + limit * 1000;
  while (isAlive(node.pid)) {
    if (performance.now() > deadline) {
      throw new CaravanError("engine_failed", `the node has not ended within ${limit} s`, {
        where: node.url,
        hint: `caravan stop --now, or kill ${node.pid}`,
      });
    }
    await Bun.sleep(POLL_MS);
  }
  process.stdout.write(`stopped the node at ${node.url}\n`);
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}
