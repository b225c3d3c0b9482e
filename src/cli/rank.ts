// caravan rank: one rank > 0 of a model that several processes compute. Started by the process of rank 0 or by a node; not for people.

import { runRank } from "../engine/rank.ts";
import type { Command } from "./command.ts";

export const rank: Command = {
  name: "rank",
  summary: "compute one rank's part of a model (internal)",
  positionals: "",
  count: [0, 0],
  options: {},
  internal: true,
  outlivesOutput: true,
  // The pipe that commands come through stays open until the parent closes it: that must not keep the process.
  run: async () => process.exit(await runRank()),
};
