// caravan doctor: what this machine has, and what stands in the way, each with the command that mends it.

import { accessSync, constants, existsSync, statfsSync, statSync } from "node:fs";
import { arch, cpus, platform, release } from "node:os";
import { dirname, join } from "node:path";
import { bestCpu } from "../engine/binding.ts";
import { fallbacks, findMetal } from "../engine/metal-device.ts";
import { passed, runSelftest, selftestPage } from "../engine/selftest.ts";
import { asCaravanError } from "../errors.ts";
import { availableMemory } from "../model/machine-memory.ts";
import { raiseLimitCommand } from "../model/metal-memory.ts";
import { openStore, scanStore } from "../model/store.ts";
import { resolvePaths } from "../paths.ts";
import { loadSettings } from "../settings.ts";
import { VERSION } from "../version.ts";
import type { Command } from "./command.ts";
import { type Check, clusterChecks } from "./doctor-cluster.ts";
import { ownClockCheck } from "./doctor-nodes.ts";
import { rdmaChecks } from "./doctor-rdma.ts";
import { quarantineCommand } from "./mac-start.ts";
import { formatBytes, ProgressLine } from "./progress.ts";

function attempt(name: string, check: () => Omit<Check, "name">): Check {
  try {
    return { name, ...check() };
  } catch (thrown) {
    const error = asCaravanError(thrown);
    return {
      name,
      ok: false,
      detail: error.toText(),
      ...(error.hint === undefined ? {} : { fix: error.hint }),
    };
  }
}

/** The nearest folder above `path` that exists. */
function existing(path: string): string {
  let at = path;
  while (!existsSync(at) && dirname(at) !== at) at = dirname(at);
  return at;
}

function runChecks(): Check[] {
  const paths = resolvePaths();
  return [
    attempt("caravan", () => ({
      ok: true,
      detail: `${VERSION}, Bun ${Bun.version}, ${platform()} ${arch()} ${release()}`,
    })),
    attempt("processor", () => {
      const { name, note } = bestCpu();
      return {
        ok: name !== "scalar",
        fix: "There are no fast kernels for this processor: it works, slowly. x86-64 needs AVX2, ARM needs ARMv8.",
        detail: `${cpus()[0]?.model.trim() ?? "unknown"}, ${cpus().length} threads, kernels ${name}${note === undefined ? "" : ` (${note})`}`,
      };
    }),
    attempt("clock", () => ownClockCheck(Date.now(), statSync(process.execPath).mtimeMs)),
    ...quarantineCheck(),
    ...gpuCheck(),
    attempt("memory", () => {
      const { available, total } = availableMemory();
      return {
        ok: available > 1e9,
        detail: `${formatBytes(available)} of ${formatBytes(total)} available`,
        fix: "Close other programs, or unload models: `caravan stop`. In a container, raise its memory limit.",
      };
    }),
    attempt("settings", () => {
      const { settings, warnings } = loadSettings();
      return {
        ok: warnings.length === 0,
        detail: [`host ${settings.host}, port ${settings.port}`, ...warnings].join("; "),
        fix: `Change ${join(paths.config, "caravan.toml")} or the variable; \`caravan config\` shows where each setting is from.`,
      };
    }),
    attempt("models folder", () => {
      const folder = existing(paths.models);
      accessSync(folder, constants.W_OK);
      const { bavail, bsize } = statfsSync(folder);
      return { ok: true, detail: `${paths.models}, ${formatBytes(bavail * bsize)} free` };
    }),
    attempt("hub cache", () => ({ ok: true, detail: paths.hub })),
    attempt("cards", () => {
      const { cards } = openStore();
      const bad = [...cards.bad.values()].map((error) => error.toText());
      return {
        ok: bad.length === 0,
        detail: [`${cards.cards.length} cards`, ...bad].join("; "),
        fix: `Mend or delete the card in ${paths.cards}.`,
      };
    }),
    attempt("models", () => {
      const { models, partial } = scanStore(openStore(loadSettings().settings.models_dir));
      return {
        ok: partial.length === 0,
        detail: `${models.length} here${partial.length === 0 ? "" : `, ${partial.length} incomplete`}`,
        ...(partial[0] === undefined ? {} : { fix: partial[0].hint }),
      };
    }),
  ];
}

/** "" where the settings cannot be read: that is a check of its own. */
function rdmaSetting(): string {
  try {
    return loadSettings().settings.rdma;
  } catch {
    return "";
  }
}

/** More than any Apple GPU's caches hold. */
const TIMED_BYTES = 256e6;
const QUICK_TIMED_BYTES = 256e3;

async function selftest(quick: boolean, json: boolean): Promise<number> {
  const progress = new ProgressLine();
  try {
    const test = await runSelftest({
      bytes: quick ? QUICK_TIMED_BYTES : TIMED_BYTES,
      quick,
      onCase: (done, name) => progress.show("selftest", 0, `${done}: ${name}`),
    });
    progress.clear();
    process.stdout.write(json ? `${JSON.stringify(test)}\n` : selftestPage(test, VERSION));
    return passed(test) ? 0 : 1;
  } finally {
    progress.clear();
  }
}

/** Whether macOS still holds the executable as downloaded. */
function quarantineCheck(): Check[] {
  if (platform() !== "darwin") return [];
  return [
    attempt("quarantine", () => {
      const { stdout } = Bun.spawnSync(["/usr/bin/xattr", process.execPath]);
      const command = quarantineCommand(process.execPath, stdout.toString());
      return command === undefined
        ? { ok: true, detail: "none" }
        : { ok: false, detail: "macOS may refuse to start this file: it was downloaded", fix: command };
    }),
  ];
}

/** The GPU, and how to give it more memory. */
function gpuCheck(): Check[] {
  if (platform() !== "darwin" && process.env.CARAVAN_METAL_LIBRARY === undefined) return [];
  return [
    attempt("GPU", () => {
      const device = findMetal();
      if ("reason" in device) return { ok: false, detail: device.reason };
      const more = raiseLimitCommand(device.workingSet * 1.1, availableMemory().total);
      return {
        ok: true,
        detail: [
          `${device.name}, macOS ${device.macos}, may use ${formatBytes(device.workingSet)}`,
          ...(more === undefined ? [] : [`more with ${more}`]),
          ...fallbacks(device),
        ].join("; "),
      };
    }),
  ];
}

export const doctor: Command = {
  name: "doctor",
  summary: "check this machine and say what to mend",
  positionals: "",
  count: [0, 0],
  options: {
    json: { help: "print JSON" },
    selftest: { help: "compare every kernel on the GPU with the processor, time some, print one page" },
    quick: { help: "with --selftest: a sample of the kernels, on small matrices" },
  },
  async run(args) {
    if (args.flag("selftest")) return await selftest(args.flag("quick"), args.flag("json"));
    const [rdma, cluster] = await Promise.all([rdmaChecks(rdmaSetting()), clusterChecks()]);
    const checks = [...runChecks(), ...rdma, ...cluster];
    if (args.flag("json")) {
      process.stdout.write(`${JSON.stringify(checks)}\n`);
    } else {
      for (const { name, ok, detail, fix } of checks) {
        process.stdout.write(`${ok ? "ok  " : "FAIL"}  ${name.padEnd(14)} ${detail}\n`);
        if (!ok && fix !== undefined) process.stdout.write(`      ${"".padEnd(14)} → ${fix}\n`);
      }
    }
    return checks.every(({ ok }) => ok) ? 0 : 1;
  },
};
