// Nodes of a cluster as processes, for tests: on this machine's loopback, or one in each network namespace of a lab (netlab.sh).
// All of them read the same models; each has its own data folder, so its own key.

import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { newCluster, saveCluster } from "../../src/cluster/net/cluster-file.ts";
import { clusterFolder } from "../../src/cluster/net/identity.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";

const ROOT = join(import.meta.dir, "../..");
export const KEY = "lab-key-lab-key-lab-key";

/** Whether the native library is built; says so when it is not. */
export const libraryHere = ["so", "dylib"].some((end) => existsSync(join(ROOT, `build/libcaravan.${end}`)));
if (!libraryHere) console.log("skipped: build/libcaravan is not built (make lib)");

export interface InstanceView {
  id: string;
  model: string;
  owner: string;
  phase: string;
  epoch: number;
  reason: string;
  ranks: { node: string; rank: number }[];
}

export interface StateView {
  cluster: string | null;
  conflict?: string;
  self: { id: string };
  nodes: {
    id: string;
    name: string;
    reachable: boolean;
    round_trip_us?: number;
    bandwidth?: number;
    ledger?: { next: { model: string; context_that_fits: number }[] };
  }[];
  instances: InstanceView[];
  parts?: { model: string; bytes: number; in_use: boolean; idle_hours: number }[];
}

/** Where a node lives. */
export interface LabHost {
  /** Command line in front of the node's. */
  prefix: string[];
  /** Address of its API, and more settings. */
  api: { host: string; port: number };
  env: Record<string, string>;
  /** Further arguments of `caravan serve`. */
  args?: string[];
}

export class LabNode {
  readonly url: string;
  #child: Bun.Subprocess<"ignore", "pipe", "pipe"> | undefined;
  #log = "";

  constructor(
    readonly name: string,
    readonly host: LabHost,
    readonly env: Record<string, string>,
  ) {
    this.url = `http://${host.api.host}:${host.api.port}`;
  }

  /** What the node has written since it was started. */
  get log(): string {
    return this.#log;
  }

  /** Process id of the node itself. */
  get pid(): number {
    const child = this.#child;
    if (child === undefined) throw new Error(`${this.name} does not run`);
    return child.pid;
  }

  get running(): boolean {
    return this.#child !== undefined && this.#child.exitCode === null && this.#child.signalCode === null;
  }

  /** Of the process when it has ended. */
  get exitCode(): number | null {
    return this.#child?.exitCode ?? null;
  }

  /** Starts it and waits until its API answers. */
  async start(): Promise<void> {
    const { prefix, api, env, args = [] } = this.host;
    const main = join(ROOT, "src/main.ts");
    const child = Bun.spawn(
      [...prefix, process.execPath, main, "serve", "--host", api.host, "--port", String(api.port), ...args],
      {
        env: { ...this.env, ...env, CARAVAN_NODE_NAME: this.name },
        stdin: "ignore",
        stdout: "pipe",
        stderr: "pipe",
      },
    );
    this.#child = child;
    this.#log = "";
    for (const pipe of [child.stdout, child.stderr]) void this.#collect(pipe);
    await eventually(`${this.name} answers`, 60_000, async () => {
      if (!this.running) throw new Error(`${this.name} ended: ${this.#log}`);
      return (await this.fetch("/health").catch(() => undefined))?.ok === true;
    });
  }

  async #collect(pipe: ReadableStream<Uint8Array>): Promise<void> {
    const decoder = new TextDecoder();
    for await (const chunk of pipe) this.#log += decoder.decode(chunk, { stream: true });
  }

  kill(signal: NodeJS.Signals): void {
    this.#child?.kill(signal);
  }

  async stop(): Promise<void> {
    if (this.#child === undefined) return;
    for (const pid of this.children().flat()) signalProcess(pid, "SIGKILL");
    this.#child.kill("SIGCONT");
    this.#child.kill("SIGKILL");
    await this.#child.exited;
    this.#child = undefined;
  }

  /** Its runner (rank 0) and rank processes. */
  children(kind?: "runner" | "rank"): number[] {
    if (this.#child === undefined) return [];
    return descendants(this.#child.pid).filter((pid) => {
      const command = commandOf(pid);
      return kind === undefined ? /\b(runner|rank)$/.test(command) : command.endsWith(` ${kind}`);
    });
  }

  fetch(path: string, init: RequestInit = {}): Promise<Response> {
    return fetch(`${this.url}${path}`, {
      ...init,
      headers: { authorization: `Bearer ${KEY}`, "content-type": "application/json" },
    });
  }

  async state(): Promise<StateView> {
    return (await (await this.fetch("/cluster/state")).json()) as StateView;
  }

  async id(): Promise<string> {
    return (await this.state()).self.id;
  }

  async post(path: string, body: object, signal?: AbortSignal): Promise<Response> {
    return await this.fetch(path, {
      method: "POST",
      body: JSON.stringify(body),
      ...(signal === undefined ? {} : { signal }),
    });
  }

  /**
   * A short greedy answer. Throws with status and body where there is none. Where the machine is so busy that a node or a rank
   * is taken for silent, it does what the error says: it sends the request again in a few seconds.
   */
  async say(model: string, tokens = 12): Promise<string> {
    const deadline = performance.now() + 60_000;
    for (let silent = false; ; ) {
      const reply = await this.post("/v1/chat/completions", {
        model,
        messages: [{ role: "user", content: "Hi" }],
        max_tokens: tokens,
        temperature: 0,
      });
      const text = await reply.text();
      if (reply.ok) return JSON.parse(text).choices[0].message.content;
      silent ||= /silent|has said nothing/.test(text);
      if (!silent || reply.status !== 503 || performance.now() > deadline)
        throw new Error(`${reply.status} ${text}`);
      console.log(`  once more: ${text.slice(0, 200)}`);
      const seconds = Number(reply.headers.get("retry-after") ?? 1);
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.min(seconds, 3)));
    }
  }

  /** A stream that goes on for longer than any test, after its first text. */
  async longStream(model: string): Promise<LongStream> {
    const leave = new AbortController();
    const reply = await this.post(
      "/v1/chat/completions",
      {
        model,
        messages: [{ role: "user", content: "Hi" }],
        max_tokens: 200_000,
        ignore_eos: true,
        temperature: 0,
        stream: true,
      },
      leave.signal,
    );
    if (!reply.ok || reply.body === null) throw new Error(`${reply.status} ${await reply.text()}`);
    const stream = new LongStream(reply.body, leave);
    await eventually(
      "the stream gives text",
      30_000,
      () => stream.text.includes('"content"') || stream.over,
    ).catch((thrown) => {
      stream.cancel();
      throw new Error(`${thrown}; ${stream.bytes} bytes came: ${stream.text}\n${this.log.slice(-3000)}`);
    });
    return stream;
  }
}

/** Reads on by itself; `ended` says how it ended and when. */
export class LongStream {
  /** The last part of what came. */
  text = "";
  bytes = 0;
  over = false;
  readonly ended: Promise<{ atMs: number; error: string | undefined }>;

  constructor(
    body: ReadableStream<Uint8Array>,
    private readonly leave: AbortController,
  ) {
    this.ended = this.#read(body);
  }

  cancel(): void {
    this.leave.abort();
  }

  async #read(body: ReadableStream<Uint8Array>): Promise<{ atMs: number; error: string | undefined }> {
    const decoder = new TextDecoder();
    let broken: string | undefined;
    try {
      for await (const chunk of body) {
        this.bytes += chunk.length;
        this.text = (this.text + decoder.decode(chunk, { stream: true })).slice(-8000);
      }
    } catch (thrown) {
      broken = `broken off: ${thrown}`;
    }
    this.over = true;
    const error = /data: (\{"error":.*\})/.exec(this.text)?.[1] ?? broken;
    return { atMs: performance.now(), error };
  }
}

export class ClusterLab {
  readonly folder = mkdtempSync(join(tmpdir(), "caravan-lab-"));
  readonly nodes: LabNode[] = [];
  readonly #cluster = newCluster("lab");

  constructor(readonly hosts: readonly LabHost[]) {
    mkdirSync(join(this.folder, "models"));
    writeTinyChatModel(join(this.folder, "models", "tiny"), 1);
    hosts.forEach((host, i) => {
      const name = String.fromCharCode(97 + i);
      const data = join(this.folder, name);
      saveCluster(clusterFolder(data), this.#cluster);
      this.nodes.push(
        new LabNode(name, host, {
          PATH: process.env.PATH ?? "",
          HOME: "",
          CARAVAN_DATA_DIR: data,
          CARAVAN_CONFIG_DIR: join(this.folder, "config"),
          CARAVAN_MODELS_DIR: join(this.folder, "models"),
          HF_HUB_CACHE: join(this.folder, "hub"),
          CARAVAN_THREADS: "1",
          CARAVAN_ADMIN_KEYS: KEY,
          CARAVAN_LOG_LEVEL: "info",
        }),
      );
    });
  }

  /** Starts all nodes; resolves when each reaches all others. */
  async start(limitMs = 40_000): Promise<void> {
    await Promise.all(this.nodes.map((node) => node.start()));
    await this.meet(this.nodes, limitMs);
  }

  /** Starts nodes that were killed and lets stopped ones go on. */
  async revive(limitMs = 40_000): Promise<void> {
    for (const node of this.nodes) {
      if (node.running) for (const pid of [node.pid, ...node.children()]) signalProcess(pid, "SIGCONT");
    }
    await Promise.all(this.nodes.filter((node) => !node.running).map((node) => node.start()));
    await this.meet(this.nodes, limitMs);
  }

  async meet(nodes: readonly LabNode[], limitMs: number): Promise<void> {
    await eventually(`${nodes.length} nodes see each other`, limitMs, async () => {
      const states = await Promise.all(nodes.map((node) => node.state()));
      return states.every(
        (state) => state.nodes.filter(({ reachable }) => reachable).length === nodes.length,
      );
    });
  }

  /** Asks at `node` for an instance, and waits until it answers in the shape that was asked for, at whichever of the nodes
   * that `node` reaches; what it looks like then. */
  async place(
    node: LabNode,
    asked: { model?: string; tensor?: number; pipeline?: number; nodes?: string[]; context?: number },
  ): Promise<InstanceView> {
    const reply = await node.post("/cluster/instances", { model: "tiny", ...asked });
    if (!reply.ok) throw new Error(await reply.text());
    const { id } = (await reply.json()) as { id: string };
    const { tensor = 1, pipeline = 1 } = asked;
    // A node that was slow for a moment may have been left out at first: it is taken in when it is back.
    await eventually(`the instance has ${tensor} x ${pipeline} ranks`, 40_000, async () => {
      const { ranks } = await this.ready(node, id);
      return ranks.length === tensor * pipeline;
    });
    const view = await node.state();
    const reached = new Set(view.nodes.filter(({ reachable }) => reachable).map((each) => each.id));
    for (const each of this.nodes.filter(({ running }) => running)) {
      const { self, nodes, conflict } = await each.state();
      // One that must not take part, or does not see the node that was asked, learns nothing.
      const sees = nodes.some((other) => other.id === view.self.id && other.reachable);
      if (conflict === undefined && sees && reached.has(self.id)) await this.ready(each, id);
    }
    return await this.ready(node, id);
  }

  /** Ends every instance, and waits until no node shows one that lives. */
  async removeAll(): Promise<void> {
    const [first] = this.nodes;
    if (first === undefined) return;
    await eventually("no instance is left", 40_000, async () => {
      const live = (await first.state()).instances.filter(({ phase }) => phase !== "gone");
      for (const { id, phase } of live)
        if (phase !== "stopping") await first.fetch(`/cluster/instances/${id}`, { method: "DELETE" });
      return live.length === 0;
    });
  }

  /** Waits until an instance is ready, in an epoch after `afterEpoch`. */
  async ready(node: LabNode, id: string, afterEpoch = 0, limitMs = 60_000): Promise<InstanceView> {
    let last: InstanceView | undefined;
    try {
      await eventually("the instance is ready", limitMs, async () => {
        last = (await node.state()).instances.find((each) => each.id === id);
        return last?.phase === "ready" && last.epoch > afterEpoch;
      });
    } catch (thrown) {
      throw new Error(`${thrown}: ${JSON.stringify(last)}\n${this.logs()}`);
    }
    return last as InstanceView;
  }

  async nodeOf(id: string): Promise<LabNode> {
    for (const node of this.nodes) if (node.running && (await node.id()) === id) return node;
    throw new Error(`no node ${id}`);
  }

  /** For commands of the user whose node it is. */
  environment({ env, host }: LabNode): Record<string, string> {
    return { ...env, ...host.env };
  }

  /** Of its control plane. */
  addressOf({ host }: LabNode): string {
    return `${host.env.CARAVAN_CLUSTER_HOST}:${host.env.CARAVAN_CLUSTER_PORT}`;
  }

  logs(): string {
    return this.nodes.map(({ name, log }) => `--- ${name}\n${log.slice(-3000)}`).join("\n");
  }

  async close(): Promise<void> {
    await Promise.all(this.nodes.map((node) => node.stop()));
    rmSync(this.folder, { recursive: true, force: true });
  }
}

/**
 * Ports where nobody listens, until the nodes do, and again while one of them is down. Below the range that systems give to
 * connections, so that none of the many that tests make takes one meanwhile.
 */
function freePorts(count: number): number[] {
  const held: Bun.TCPSocketListener[] = [];
  while (held.length < count) {
    const port = 20_000 + Math.floor(Math.random() * 12_000);
    try {
      held.push(Bun.listen({ hostname: "127.0.0.1", port, socket: { data() {} } }));
    } catch {
      // somebody listens there: another one
    }
  }
  for (const each of held) each.stop(true);
  return held.map(({ port }) => port);
}

/** Hosts on loopback: ports of this test run, each knowing all. */
export function loopbackHosts(count: number): LabHost[] {
  const free = freePorts(2 * count);
  const ports = Array.from({ length: count }, (_, i) => ({
    api: free[2 * i] ?? 0,
    cluster: free[2 * i + 1] ?? 0,
  }));
  return ports.map(({ api, cluster }) => ({
    prefix: [],
    api: { host: "127.0.0.1", port: api },
    env: {
      CARAVAN_CLUSTER_HOST: "127.0.0.1",
      CARAVAN_CLUSTER_PORT: String(cluster),
      CARAVAN_DISCOVERY_PORT: "0",
      CARAVAN_PEERS: ports.map((each) => `127.0.0.1:${each.cluster}`).join(","),
    },
  }));
}

/** Waits for a condition that may be asked over the network. */
export async function eventually(
  what: string,
  limitMs: number,
  condition: () => boolean | Promise<boolean>,
): Promise<void> {
  const deadline = performance.now() + limitMs;
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error(`waited ${limitMs} ms in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

export function signalProcess(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch {
    // it is gone already, which is what most signals are for
  }
}

function descendants(pid: number): number[] {
  const parents = new Map<number, number[]>();
  for (const name of readdirSync("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    try {
      const stat = readFileSync(`/proc/${name}/stat`, "utf8");
      const parent = Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[1]);
      parents.set(parent, [...(parents.get(parent) ?? []), Number(name)]);
    } catch {
      // it ended in between
    }
  }
  const found: number[] = [];
  for (const open = [pid]; open.length > 0; ) {
    const next = parents.get(open.pop() ?? 0) ?? [];
    found.push(...next);
    open.push(...next);
  }
  return found;
}

function commandOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8").replaceAll("\0", " ").trim();
  } catch {
    return ""; // it ended in between
  }
}
