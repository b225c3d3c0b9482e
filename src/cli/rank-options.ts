// Options of commands that can split a model over several ranks of this machine.

import type { RankOptions } from "../engine/load-options.ts";
import { TRANSPORTS } from "../engine/rank-protocol.ts";
import type { Arguments, OptionSpec } from "./command.ts";

export const RANK_OPTIONS: Record<string, OptionSpec> = {
  tensor: { value: "N", help: "tensor-parallel ranks, each a process of its own (default 1)" },
  pipeline: { value: "M", help: "pipeline stages, N ranks each (default 1)" },
  transport: { value: "KIND", help: "between ranks: auto, shm, rdma or tcp (default auto)" },
};

/** Throws invalid_argument for a number or a transport that makes no sense. */
export function rankOptions(args: Arguments): RankOptions {
  const tensor = args.integer("tensor", 1, 64);
  const pipeline = args.integer("pipeline", 1, 64);
  const transport = args.choice("transport", TRANSPORTS);
  return {
    ...(tensor === undefined ? {} : { tensor }),
    ...(pipeline === undefined ? {} : { pipeline }),
    ...(transport === undefined ? {} : { transport }),
  };
}
