// caravan logits: raw logits of a token sequence, the way the engine is judged.

import { accessSync, constants } from "node:fs";
import { dirname, resolve } from "node:path";
import * as v from "valibot";
import { runLogits } from "../engine/logits.ts";
import { asCaravanError, CaravanError } from "../errors.ts";
import { writeError } from "../model/atomic-file.ts";
import { NpyWriter } from "../model/npy.ts";
import type { Command } from "./command.ts";
import { interruptible } from "./interrupt.ts";
import { readJsonFile } from "./json-file.ts";
import { findWeights } from "./model-argument.ts";
import { ProgressLine } from "./progress.ts";
import { RANK_OPTIONS, rankOptions } from "./rank-options.ts";

export const logits: Command = {
  name: "logits",
  summary: "write the logits of a token sequence to a .npy file",
  positionals: "MODEL",
  count: [1, 1],
  options: {
    "tokens-file": { value: "T.json", help: '{"tokens":[…]}' },
    out: { value: "OUT.npy", help: "float32 [tokens, vocabulary], in order" },
    prefill: { value: "N", help: "tokens that are the prompt; the others go one at a time (default all)" },
    piece: { value: "K", help: "most tokens of the prompt fed at once (default 512)" },
    compute: { value: "exact|fast", help: "float32, or what serving uses (default fast)" },
    device: { value: "DEVICE", help: "auto, cpu or metal (default cpu)" },
    threads: { value: "T", help: "compute threads (default: the machine's)" },
    cpu: {
      value: "SET",
      help: "kernel set: scalar, avx2, avx512-vnni, amx-int8, neon, … (default: the best)",
    },
    "kv-bits": { value: "8|16", help: "bits of the cache (default: float32 if exact, else 16)" },
    ...RANK_OPTIONS,
  },
  async run(args) {
    const compute = args.choice("compute", ["exact", "fast"]) ?? "fast";
    const device = args.choice("device", ["auto", "cpu", "metal"]);
    const ranks = rankOptions(args);
    const out = args.required("out");
    const tokensFile = args.required("tokens-file");
    const { tokens } = readJsonFile(tokensFile, TOKENS_FILE);
    const prefill = args.integer("prefill", 0, tokens.length);
    const piece = args.integer("piece", 1, 65536);
    const threads = args.integer("threads", 1, 256);
    const cpu = args.text("cpu");
    const kvBits = args.choice("kv-bits", ["8", "16"]);
    const model = findWeights(args.positional(0));
    requireFolder(out);
    return await interruptible(async (signal) => {
      const progress = new ProgressLine();
      let writer: NpyWriter | undefined;
      let done = 0;
      try {
        await runLogits({
          modelDir: model.path,
          tokens,
          compute,
          ...(device === undefined ? {} : { device }),
          ...(prefill === undefined ? {} : { prefill }),
          ...(piece === undefined ? {} : { piece }),
          ...(threads === undefined ? {} : { threads }),
          ...(kvBits === undefined ? {} : { kvBits: kvBits === "8" ? 8 : 16 }),
          ...(cpu === undefined ? {} : { cpu }),
          ranks,
          onLogits: async (rows, vocab) => {
            signal.throwIfAborted();
            writer ??= await NpyWriter.open(out, [tokens.length, vocab]);
            await writer.write(rows);
            done += rows.length / vocab;
            progress.show("logits", done / tokens.length, `${done} of ${tokens.length} tokens`);
          },
        });
        signal.throwIfAborted();
        await writer?.close();
      } catch (thrown) {
        await writer?.abandon();
        throw placed(thrown, tokensFile);
      } finally {
        progress.clear();
      }
      return 0;
    });
  },
};

const TOKENS_FILE = v.object({
  tokens: v.pipe(
    v.array(v.pipe(v.number(), v.integer(), v.minValue(0))),
    v.minLength(1, "an empty list of tokens"),
  ),
});

/** The model takes longer to load than a wrong folder to find. */
function requireFolder(out: string): void {
  try {
    accessSync(dirname(resolve(out)), constants.W_OK);
  } catch (cause) {
    throw writeError(out, cause);
  }
}

/** Names the tokens' file in errors about the tokens. */
function placed(thrown: unknown, tokensFile: string): CaravanError {
  const error = asCaravanError(thrown);
  if (error.param !== "tokens" && error.param !== "context") return error;
  const model = error.where === undefined ? "" : ` (${error.where})`;
  return new CaravanError(error.code, `${error.message}${model}`, { where: tokensFile, cause: thrown });
}
