// The built executable, serving a model, whose processes are asked now and then what they have resident without garbage.

import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { processMemory } from "./process-memory.ts";

/** CARAVAN_TEST_PROGRAM names another build. */
const PROGRAM = process.env.CARAVAN_TEST_PROGRAM ?? join(import.meta.dir, "../../dist/caravan");
const COLLECT_LIMIT_MS = 30_000;
/** In which the allocators give pages back to the system; the least that is resident meanwhile counts. */
const SETTLE_MS = 3000;
const LOOK_MS = 100;

export interface Rest {
  name: string;
  pid: number;
  /** Resident bytes before and after the collection. */
  before: number;
  after: number;
  /** JavaScript's heap after it. */
  heap: number;
  objects: number;
}

export class WatchedServer {
  readonly #heaps: string;
  readonly #process: Bun.Subprocess<"ignore", "pipe", "inherit">;
  url = "";
  /** Of the model. */
  id = "";

  private constructor(model: string, env: Record<string, string>) {
    this.#heaps = mkdtempSync(join(tmpdir(), "caravan-soak-"));
    this.#process = Bun.spawn(
      [PROGRAM, "serve", model, "--port", "0", "--context", "1024", "--log-level", "error"],
      {
        stdin: "ignore",
        stdout: "pipe",
        stderr: "inherit",
        env: {
          ...process.env,
          ...env,
          BUN_OPTIONS: `--preload=${join(import.meta.dir, "collect-on-signal.ts")}`,
          CARAVAN_SOAK_HEAPS: this.#heaps,
        },
      },
    );
    // Whatever ends the soak.
    process.on("exit", () => {
      this.#process.kill("SIGKILL");
      rmSync(this.#heaps, { recursive: true, force: true });
    });
  }

  /** Resolves when the model is loaded. */
  static async start(model: string, env: Record<string, string> = {}): Promise<WatchedServer> {
    const server = new WatchedServer(model, env);
    let text = "";
    for await (const chunk of server.#process.stdout) {
      text += new TextDecoder().decode(chunk);
      server.url = /http:\/\/\S+/.exec(text)?.[0] ?? "";
      if (server.url !== "") break;
    }
    if (server.url === "") throw new Error(`the server ended: ${text}`);
    while (!(await fetch(`${server.url}/ready`)).ok) await Bun.sleep(100);
    const { data } = (await (await fetch(`${server.url}/v1/models`)).json()) as {
      data: { id: string; state: string }[];
    };
    server.id = data.find(({ state }) => state === "ready")?.id ?? "";
    return server;
  }

  get pid(): number {
    return this.#process.pid;
  }

  /** One of /metrics, summed over its labels. */
  async metric(name: string): Promise<number> {
    const text = await (await fetch(`${this.url}/metrics`)).text();
    const lines = text
      .split("\n")
      .filter((line) => line.startsWith(`${name} `) || line.startsWith(`${name}{`));
    return lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" "))), 0);
  }

  /** Lets every process collect its garbage and says what each still has. To be called while no request runs. */
  async collect(): Promise<Rest[]> {
    const before = processMemory(this.pid);
    const counts = before.map(({ pid }) => this.#heapOf(pid)?.times ?? 0);
    for (const { pid } of before) process.kill(pid, "SIGUSR2");
    const asked = performance.now();
    while (before.some(({ pid }, i) => (this.#heapOf(pid)?.times ?? 0) <= (counts[i] ?? 0))) {
      if (performance.now() - asked > COLLECT_LIMIT_MS)
        throw new Error("a process did not collect its garbage");
      await Bun.sleep(LOOK_MS);
    }
    const least = new Map(before.map(({ pid }) => [pid, Number.POSITIVE_INFINITY]));
    for (const collected = performance.now(); performance.now() - collected < SETTLE_MS; ) {
      for (const { pid, resident } of processMemory(this.pid))
        least.set(pid, Math.min(resident, least.get(pid) ?? resident));
      await Bun.sleep(LOOK_MS);
    }
    return before.map(({ pid, name, resident }) => {
      const heap = this.#heapOf(pid);
      return {
        ...{ pid, name, before: resident, after: least.get(pid) ?? resident },
        ...{ heap: heap?.heapSize ?? 0, objects: heap?.objectCount ?? 0 },
      };
    });
  }

  #heapOf(pid: number): { times: number; heapSize: number; objectCount: number } | undefined {
    try {
      return JSON.parse(readFileSync(join(this.#heaps, `${pid}.json`), "utf8"));
    } catch (thrown) {
      if (thrown instanceof Error && "code" in thrown && thrown.code === "ENOENT") return undefined;
      throw thrown;
    }
  }

  /** Its exit code. */
  async stop(): Promise<number> {
    this.#process.kill("SIGTERM");
    return await this.#process.exited;
  }
}
