// Runs the built executable as a user does: in an empty folder, with an environment of its own.

import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { until } from "./until.ts";

const ROOT = join(import.meta.dir, "../..");
/** CARAVAN_TEST_PROGRAM names another build. */
export const PROGRAM = process.env.CARAVAN_TEST_PROGRAM ?? join(ROOT, "dist/caravan");
export const SMOLLM2 = join(ROOT, ".models/smollm2");

/** Whether the executable is built; says so when it is not. */
export const built = existsSync(PROGRAM);
if (!built) console.log(`skipped: ${PROGRAM} is not built (make)`);

/** Whether the default model was fetched (by `make run`); says so when it was not. */
export function smollm2Here(): boolean {
  const here = existsSync(join(SMOLLM2, "config.json"));
  if (!here) console.log("skipped: SmolLM2 is not in .models/smollm2 (make run fetches it)");
  return here;
}

export interface Ended {
  code: number;
  out: string;
  err: string;
}

export interface Running {
  pid: number;
  /** What has been written so far. */
  out(): string;
  err(): string;
  kill(signal: NodeJS.Signals): void;
  ended: Promise<Ended>;
}

export interface StartOptions {
  env?: Record<string, string>;
  stdin?: string;
  cwd?: string;
}

/** A temporary place with nothing in it: the folder that commands run in, and the environment. */
export class Place {
  readonly folder = mkdtempSync(join(tmpdir(), "caravan-cli-"));
  readonly cwd: string;
  readonly models: string;
  readonly env: Record<string, string>;
  readonly #started: Bun.Subprocess[] = [];

  constructor() {
    this.cwd = join(this.folder, "empty");
    this.models = join(this.folder, "models");
    mkdirSync(this.cwd);
    mkdirSync(this.models);
    this.env = {
      PATH: process.env.PATH ?? "",
      HOME: "",
      CARAVAN_DATA_DIR: join(this.folder, "data"),
      CARAVAN_CONFIG_DIR: join(this.folder, "config"),
      CARAVAN_MODELS_DIR: this.models,
      CARAVAN_PORT: "1", // nobody listens there, so that no node of this machine answers
      HF_HUB_CACHE: join(this.folder, "hub"),
    };
  }

  path(name: string): string {
    return join(this.folder, name);
  }

  start(args: readonly string[], { env = {}, stdin = "", cwd = this.cwd }: StartOptions = {}): Running {
    const child = Bun.spawn([PROGRAM, ...args], {
      cwd,
      env: { ...this.env, ...env },
      stdin: new Blob([stdin]),
      stdout: "pipe",
      stderr: "pipe",
    });
    this.#started.push(child);
    const out = collect(child.stdout);
    const err = collect(child.stderr);
    return {
      pid: child.pid,
      out: out.soFar,
      err: err.soFar,
      kill: (signal) => child.kill(signal),
      ended: Promise.all([child.exited, out.all, err.all]).then(([code, o, e]) => ({
        code,
        out: o,
        err: e,
      })),
    };
  }

  run(args: readonly string[], options?: StartOptions): Promise<Ended> {
    return this.start(args, options).ended;
  }

  /** Starts `caravan serve` on a free port and waits until it listens. */
  async serve(args: readonly string[] = [], env: Record<string, string> = {}): Promise<Node> {
    const running = this.start(["serve", "--port", "0", ...args], { env });
    const url = () => /caravan listens at (\S+)/.exec(running.out())?.[1];
    let over = false;
    void running.ended.then(() => {
      over = true;
    });
    await until(() => url() !== undefined || over, "the node listens", 60_000);
    const found = url();
    if (found === undefined) throw new Error(`the node did not start: ${running.err()}`);
    return { ...running, url: found, port: new URL(found).port };
  }

  remove(): void {
    for (const child of this.#started) child.kill("SIGKILL");
    rmSync(this.folder, { recursive: true, force: true });
  }
}

export interface Node extends Running {
  url: string;
  port: string;
}

function collect(stream: ReadableStream<Uint8Array>): { soFar: () => string; all: Promise<string> } {
  let text = "";
  const decoder = new TextDecoder();
  const all = (async () => {
    for await (const bytes of stream) text += decoder.decode(bytes, { stream: true });
    return text;
  })();
  return { soFar: () => text, all };
}

/** Process ids of a process's runners. */
export function runnersOf(pid: number): number[] {
  const { stdout } = Bun.spawnSync(["ps", "-A", "-o", "pid=,ppid=,args="]);
  return stdout
    .toString()
    .split("\n")
    .map((line) => /^\s*(\d+)\s+(\d+)\s+(.*)$/.exec(line))
    .filter((match) => Number(match?.[2]) === pid && / runner\b/.test(match?.[3] ?? ""))
    .map((match) => Number(match?.[1]));
}

/** False once the process has ended (a zombie has). */
export function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return process.platform !== "linux" || !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));
  } catch {
    return false;
  }
}
