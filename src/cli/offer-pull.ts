// A model that is not here, named by somebody at a terminal: offers to download it instead of sending them away.

import { createInterface } from "node:readline/promises";
import { CaravanError } from "../errors.ts";
import { type InstalledModel, openStore } from "../model/store.ts";
import { loadSettings } from "../settings.ts";
import { interruptible } from "./interrupt.ts";
import { findModel } from "./model-argument.ts";
import { formatBytes } from "./progress.ts";
import { pullWithProgress } from "./pull.ts";

/** findModel, with the offer where there is a terminal to answer at. Throws model_not_found when it is declined. */
export async function findOrPull(name: string): Promise<InstalledModel> {
  try {
    return findModel(name);
  } catch (thrown) {
    if (!isPullable(thrown) || !process.stdin.isTTY || !process.stderr.isTTY) throw thrown;
    if (!(await agrees(question(name, thrown)))) throw thrown;
    const code = await interruptible(async (signal) => {
      await pullWithProgress(name, { signal });
      return 0;
    });
    if (code !== 0) throw new CaravanError("cancelled", "the download was stopped");
    return findModel(name);
  }
}

function isPullable(thrown: unknown): thrown is CaravanError {
  return (
    thrown instanceof CaravanError &&
    thrown.code === "model_not_found" &&
    thrown.hint?.startsWith("caravan pull ") === true
  );
}

function question(name: string, error: CaravanError): string {
  const bytes = openStore(loadSettings().settings.models_dir).cards.find(name)?.storage_bytes;
  const size = bytes === undefined ? "" : ` (${formatBytes(bytes)})`;
  return `${error.message}. Download it${size}? [y/N] `;
}

async function agrees(text: string): Promise<boolean> {
  const editor = createInterface({ input: process.stdin, output: process.stderr });
  try {
    const closed = new Promise<string>((resolve) => editor.once("close", () => resolve("")));
    const answer = await Promise.race([editor.question(text), closed]);
    return /^y(es)?$/i.test(answer.trim());
  } finally {
    editor.close();
  }
}
