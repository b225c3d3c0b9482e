// caravan pull: a model from the Hugging Face hub, resumable and checked by hash.

import { asCaravanError } from "../errors.ts";
import { type PullOptions, type PullResult, pullModel } from "../model/download/pull.ts";
import { licenceText } from "../model/licence.ts";
import { describeModel } from "../model/make-card.ts";
import type { Command } from "./command.ts";
import { interruptible } from "./interrupt.ts";
import { formatBytes, ProgressLine } from "./progress.ts";

/** Downloads with a progress line on the terminal; retries are told on standard error. */
export async function pullWithProgress(name: string, options: PullOptions): Promise<PullResult> {
  const progress = new ProgressLine();
  try {
    return await pullModel(name, {
      ...options,
      onRetry: (message) => {
        progress.clear();
        process.stderr.write(`caravan: ${message}\n`);
      },
      onProgress: ({ doneBytes, totalBytes, bytesPerSecond }) =>
        progress.show(
          `pull ${name}`,
          totalBytes === 0 ? 0 : doneBytes / totalBytes,
          `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}, ${formatBytes(bytesPerSecond)}/s`,
        ),
    });
  } finally {
    progress.clear();
  }
}

/** What was pulled, or why it cannot be run: a repository without a card may hold anything. */
async function aboutModel(path: string): Promise<string> {
  try {
    return await describeModel(path);
  } catch (thrown) {
    return `caravan: it is here, but cannot be run: ${asCaravanError(thrown).toText()}`;
  }
}

export const pull: Command = {
  name: "pull",
  summary: "download a model from the Hugging Face hub",
  positionals: "MODEL",
  count: [1, 1],
  options: {
    revision: { value: "REV", help: "branch, tag or commit (default main)" },
    verify: { help: "check the hashes of files that are here already" },
    json: { help: "print the result as JSON" },
  },
  details:
    "MODEL is a card's name (caravan models --cards) or a hub repository, org/name.\nA download that was stopped goes on where it was. HF_TOKEN, HF_ENDPOINT and HF_HOME are honoured.",
  async run(args) {
    const name = args.positional(0);
    const revision = args.text("revision");
    return await interruptible(async (signal) => {
      const result = await pullWithProgress(name, {
        signal,
        verify: args.flag("verify"),
        ...(revision === undefined ? {} : { revision }),
      });
      if (args.flag("json")) {
        process.stdout.write(`${JSON.stringify(result)}\n`);
        return 0;
      }
      process.stdout.write(`${result.path}\n`);
      if (result.downloadedBytes === 0) process.stderr.write("it was here already, whole\n");
      process.stderr.write(`${await aboutModel(result.path)}\n`);
      if (result.licence !== undefined) process.stderr.write(`${licenceText(result.licence)}\n`);
      process.stderr.write(`run it with: caravan run ${name}\n`);
      return 0;
    });
  },
};
