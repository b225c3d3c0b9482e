// caravan pull: a model from the Hugging Face hub, resumable and checked by hash.

import { pullModel } from "../model/download/pull.ts";
import type { Command } from "./command.ts";
import { formatBytes, ProgressLine } from "./progress.ts";

export const pull: Command = {
  name: "pull",
  summary: "download a model from the Hugging Face hub",
  positionals: "MODEL",
  count: [1, 1],
  options: {
    revision: { value: "REV", help: "branch, tag or commit (default main)" },
    json: { help: "print the result as JSON" },
  },
  details:
    "MODEL is a card's name (caravan models --cards) or a hub repository, org/name.\nA download that was stopped goes on where it was. HF_TOKEN, HF_ENDPOINT and HF_HOME are honoured.",
  async run(args) {
    const progress = new ProgressLine();
    const abort = new AbortController();
    const stop = () => abort.abort();
    process.once("SIGINT", stop);
    try {
      const result = await pullModel(args.positional(0), {
        signal: abort.signal,
        ...(args.text("revision") === undefined ? {} : { revision: args.text("revision") as string }),
        onProgress: ({ doneBytes, totalBytes, bytesPerSecond }) =>
          progress.show(
            "pull",
            totalBytes === 0 ? 0 : doneBytes / totalBytes,
            `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}, ${formatBytes(bytesPerSecond)}/s`,
          ),
      });
      progress.clear();
      process.stdout.write(args.flag("json") ? `${JSON.stringify(result)}\n` : `${result.path}\n`);
      return 0;
    } finally {
      progress.clear();
      process.off("SIGINT", stop);
    }
  },
};
