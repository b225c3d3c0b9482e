// caravan runner: the process that computes. Started by the node for each loaded model; not for people.

import { runRunner } from "../engine/runner.ts";
import type { Command } from "./command.ts";

export const runner: Command = {
  name: "runner",
  summary: "compute for a node (internal)",
  positionals: "",
  count: [0, 0],
  options: {},
  internal: true,
  outlivesOutput: true,
  run: () => runRunner(),
};
