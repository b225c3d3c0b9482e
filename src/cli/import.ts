// caravan import: a GGUF file becomes a model that caravan runs.

import { basename, dirname, join, resolve } from "node:path";
import { SHORT_NAME } from "../model/card.ts";
import { importGguf } from "../model/gguf/importer.ts";
import { makeFolder } from "../paths.ts";
import { loadSettings } from "../settings.ts";
import { type Command, usage } from "./command.ts";
import { interruptible } from "./interrupt.ts";
import { formatBytes, ProgressLine } from "./progress.ts";

/** `SmolLM2-135M-Instruct.Q4_1.gguf` and `…-00001-of-00003.gguf` give `smollm2-135m-instruct.q4_1`. */
function nameOf(file: string): string {
  return basename(file)
    .replace(/\.gguf$/i, "")
    .replace(/-\d{5}-of-\d{5}$/, "")
    .toLowerCase()
    .replace(/[^a-z0-9._-]+/g, "-")
    .replace(/^[^a-z0-9]+/, "");
}

export const importCommand: Command = {
  name: "import",
  summary: "turn a GGUF file into a model",
  positionals: "FILE.gguf",
  count: [1, 1],
  options: {
    name: { value: "NAME", help: "what the model will be called (default: from the file's name)" },
    scales: {
      value: "f16|f32",
      help: "scales of Q4_K and Q5_K: f32 keeps every weight exactly, f16 is smaller (default f32)",
    },
    out: { value: "FOLDER", help: "write it here instead of among caravan's own models" },
    json: { help: "print the report as JSON" },
  },
  details: "Of a split file (-00001-of-0000N) name the first part.",
  async run(args) {
    const file = resolve(args.positional(0));
    const name = args.text("name") ?? nameOf(file);
    if (!SHORT_NAME.test(name)) {
      throw usage(`--name takes letters, digits, "." "_" and "-", at most 96 of them, not "${name}"`);
    }
    const scales = args.choice("scales", ["f16", "f32"]) ?? "f32";
    const folder = args.text("out");
    const out = resolve(folder ?? join(loadSettings().settings.models_dir, name));
    if (folder === undefined) makeFolder(dirname(out), "keep imported models");
    return await interruptible(async (signal) => {
      const progress = new ProgressLine();
      const started = performance.now();
      try {
        const report = await importGguf(file, out, {
          signal,
          kQuantScales: scales === "f16" ? "F16" : "F32",
          onProgress: ({ doneBytes, totalBytes, tensor }) =>
            progress.show("import", totalBytes === 0 ? 1 : doneBytes / totalBytes, tensor),
        });
        progress.clear();
        if (args.flag("json")) {
          process.stdout.write(`${JSON.stringify(report)}\n`);
          return 0;
        }
        const seconds = ((performance.now() - started) / 1000).toFixed(1);
        process.stderr.write(`imported ${formatBytes(report.bytes)} in ${seconds} s: ${report.path}\n`);
        for (const note of report.notes) process.stderr.write(`  ${note}\n`);
        process.stderr.write(`run it with: caravan run ${folder === undefined ? name : out}\n`);
        return 0;
      } finally {
        progress.clear();
      }
    });
  },
};
