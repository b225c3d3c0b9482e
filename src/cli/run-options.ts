// Options that `serve`, `run` and `bench` share: how a model is run on this machine.

import type { RunOptions } from "../node/open-model.ts";
import type { LoadedSettings } from "../settings.ts";
import type { Arguments, OptionSpec } from "./command.ts";
import { RANK_OPTIONS, rankOptions } from "./rank-options.ts";

export const RUN_OPTIONS: Record<string, OptionSpec> = {
  context: { value: "N", help: "most tokens of prompt and answer together (default: what memory allows)" },
  threads: { value: "T", help: "compute threads (default: the machine's)" },
  scheduling: { value: "MODE", help: "sequential or batched (default: by the model's cache)" },
  "kv-bits": { value: "8|16", help: "bits of the cache: 8 halves its memory (default 16)" },
  "prefix-cache": {
    value: "on|off",
    help: "reuse the beginnings of prompts that are still in the cache (default on)",
  },
  speculate: {
    value: "on|off",
    help: "guess tokens from earlier text and check several at once (default on)",
  },
  device: { value: "DEVICE", help: "auto, cpu or metal (default auto)" },
  ...RANK_OPTIONS,
};

export function runOptions(args: Arguments, { settings }: LoadedSettings): RunOptions {
  const device = args.choice("device", ["auto", "cpu", "metal"]);
  const context = args.integer("context", 1, 2 ** 40) ?? (settings.context || undefined);
  const threads = args.integer("threads", 1, 256) ?? (settings.threads || undefined);
  const scheduling = args.choice("scheduling", ["sequential", "batched"]);
  const kvBits = args.choice("kv-bits", ["8", "16"]);
  const prefixCache = args.choice("prefix-cache", ["on", "off"]);
  const speculate = args.choice("speculate", ["on", "off"]);
  return {
    ...(device === undefined ? {} : { device }),
    ...(speculate === undefined ? {} : { speculate: speculate === "on" }),
    ...(prefixCache === undefined ? {} : { prefixCache: prefixCache === "on" }),
    ...(kvBits === undefined ? {} : { kvBits: kvBits === "8" ? 8 : 16 }),
    ...(context === undefined ? {} : { context }),
    ...(threads === undefined ? {} : { threads }),
    ...(scheduling === undefined ? {} : { scheduling }),
    ...rankOptions(args),
    maxQueue: settings.max_queue,
  };
}
