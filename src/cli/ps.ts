// caravan ps: the nodes of this user on this machine, and the models that they have loaded.

import { asCaravanError } from "../errors.ts";
import { type RunningNode, runningNodes } from "../node/running-nodes.ts";
import type { Command } from "./command.ts";
import { modelsOf, type NodeModel } from "./node-client.ts";
import { table } from "./table.ts";

interface Seen {
  node: RunningNode;
  models: NodeModel[];
  /** Why the models are not known. */
  error?: string;
}

async function look(node: RunningNode): Promise<Seen> {
  try {
    return { node, models: (await modelsOf(node)).filter(({ state }) => state !== "available") };
  } catch (thrown) {
    return { node, models: [], error: asCaravanError(thrown).message };
  }
}

function stateText({ state, progress, error }: NodeModel): string {
  if (state === "loading") return `loading, ${Math.floor((progress ?? 0) * 100)} %`;
  return state === "failed" && error !== undefined ? `failed: ${error}` : state;
}

export const ps: Command = {
  name: "ps",
  summary: "list the nodes that run here and their loaded models",
  positionals: "",
  count: [0, 0],
  options: { json: { help: "print JSON" } },
  async run(args) {
    const seen = await Promise.all((await runningNodes()).map(look));
    if (args.flag("json")) {
      const nodes = seen.map(({ node: { url, pid, started }, models, error }) => ({
        url,
        pid,
        started,
        models,
        ...(error === undefined ? {} : { error }),
      }));
      process.stdout.write(`${JSON.stringify(nodes)}\n`);
      return 0;
    }
    if (seen.length === 0) {
      process.stderr.write("caravan: no node runs here; `caravan serve` starts one\n");
      return 0;
    }
    const rows = seen.flatMap(({ node, models, error }) => {
      const about = [node.url, String(node.pid)];
      if (error !== undefined) return [[...about, "", error]];
      if (models.length === 0) return [[...about, "", "no model loaded"]];
      return models.map((model) => [...about, model.id, stateText(model)]);
    });
    process.stdout.write(table([["NODE", "PID", "MODEL", "STATE"], ...rows]));
    return 0;
  },
};
