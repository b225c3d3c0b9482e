// One rank process seen from the process that started it: its address, then connecting, loading, and how it ended. Every
// step rejects with the reason when the process fails or ends; nothing here retries.

import { CaravanError } from "../errors.ts";
import { childEnvironment } from "./child-environment.ts";
import { isCompiled } from "./library.ts";
import { LineSplitter } from "./line-splitter.ts";
import {
  addressBytes,
  addressText,
  type Connection,
  type GroupOptions,
  type RankCommand,
  type RankLoad,
  type RankMemory,
  type RankMessage,
} from "./rank-protocol.ts";
import type { RankTimes } from "./ranks.ts";

/** Characters of the log that are kept for the message about a crash. */
const LOG_TAIL = 2000;
/** Shorter than what a runner has itself. */
const CLOSE_LIMIT_MS = 1500;

export interface RankReady {
  memory: RankMemory;
  threads: number;
  cpu: string;
}

export interface RankProcessOptions {
  group: GroupOptions;
  /** Command line; default: this program's `rank` command. */
  command?: readonly string[];
  /** The rank's log; default: this process's stderr. */
  onLog?: (text: string) => void;
  /** Bytes of weights in place while loading. */
  onLoading?: (bytes: number) => void;
  /** Time for the process to leave when it is asked to; default 1.5 s. */
  closeLimitMs?: number;
}

/** How to start a rank: this executable again, or from source Bun with the program's main file. */
export function rankCommand(): string[] {
  return isCompiled()
    ? [process.execPath, "rank"]
    : [process.execPath, new URL("../main.ts", import.meta.url).pathname, "rank"];
}

export class RankProcess {
  readonly rank: number;
  /** Opaque bytes for the other ranks. */
  readonly address: Promise<Uint8Array>;
  /** Resolves when the process has ended: with the reason, or with nothing where it was asked to or rank 0 had closed its engine
   * (exit code 0). Never rejects. */
  readonly ended: Promise<CaravanError | undefined>;
  readonly #options: RankProcessOptions;
  readonly #child: Bun.Subprocess<"pipe", "pipe", "pipe">;
  readonly #address = Promise.withResolvers<Uint8Array>();
  readonly #connected = Promise.withResolvers<Connection>();
  readonly #ready = Promise.withResolvers<RankReady>();
  #statuses: ((status: Extract<RankMessage, { type: "status" }>) => void)[] = [];
  #failure: CaravanError | undefined;
  #leaving = false;
  #crashed = false;
  #logTail = "";

  /** Starts the process. Throws engine_failed when that is not possible. */
  constructor(options: RankProcessOptions) {
    this.#options = options;
    this.rank = options.group.rank;
    const command = options.command ?? rankCommand();
    try {
      this.#child = Bun.spawn([...command], {
        env: childEnvironment(),
        stdin: "pipe",
        stdout: "pipe",
        stderr: "pipe",
      });
    } catch (cause) {
      throw new CaravanError("engine_failed", `the process of rank ${this.rank} cannot be started`, {
        where: command[0] ?? "",
        cause,
      });
    }
    this.address = this.#address.promise;
    // Whoever waits hears of a failure; nobody has to wait.
    for (const { promise } of [this.#address, this.#connected, this.#ready]) promise.catch(() => undefined);
    this.#write(options.group);
    this.ended = this.#watch();
  }

  /** It ended without saying why. */
  get crashed(): boolean {
    return this.#crashed;
  }

  get pid(): number {
    return this.#child.pid;
  }

  /** Connects to all other ranks; they have to do so at the same time. addresses: of all ranks, in order. */
  connect(addresses: readonly Uint8Array[], timeoutMs: number): Promise<Connection> {
    this.#send({
      type: "connect",
      addresses: addresses.map(addressText),
      timeout_ms: timeoutMs,
    });
    return this.#connected.promise;
  }

  load(load: RankLoad): Promise<RankReady> {
    this.#send({ type: "load", load });
    return this.#ready.promise;
  }

  /** What the rank's engine has counted; rejects when the process ends first. */
  async status(): Promise<RankTimes> {
    const status = Promise.withResolvers<Extract<RankMessage, { type: "status" }>>();
    this.#statuses.push(status.resolve);
    this.#send({ type: "status" });
    const gone = this.ended.then((why) => Promise.reject(why ?? this.#gone("was closed")));
    const { exchange_ns, compute_ns } = await Promise.race([status.promise, gone]);
    return { exchangeNs: exchange_ns, computeNs: compute_ns };
  }

  /** Asks the process to leave, and insists after a while. Idempotent. */
  async close(): Promise<void> {
    this.#leaving = true;
    this.#send({ type: "shutdown" });
    const timer = setTimeout(() => this.#child.kill("SIGKILL"), this.#options.closeLimitMs ?? CLOSE_LIMIT_MS);
    await this.ended;
    clearTimeout(timer);
  }

  kill(): void {
    this.#leaving = true;
    this.#child.kill("SIGKILL");
  }

  #send(command: RankCommand): void {
    this.#write(command);
  }

  /** A process that is gone is reported by `ended`. */
  #write(value: unknown): void {
    const { stdin } = this.#child;
    try {
      stdin.write(`${JSON.stringify(value)}\n`);
      const flushed = stdin.flush();
      if (flushed instanceof Promise) flushed.catch((thrown) => this.#lost(thrown));
    } catch (thrown) {
      this.#lost(thrown);
    }
  }

  #lost(cause: unknown, how = "takes no commands"): void {
    this.#failure ??= new CaravanError("engine_failed", `the process of rank ${this.rank} ${how}`, { cause });
    this.#child.kill("SIGKILL");
  }

  async #watch(): Promise<CaravanError | undefined> {
    this.#readLog();
    await this.#readMessages();
    const code = await this.#child.exited;
    const peaceful = this.#leaving || code === 0;
    const why = this.#failure ?? (peaceful ? undefined : this.#crash(code));
    for (const { reject } of [this.#address, this.#connected, this.#ready])
      reject(why ?? this.#gone("ended"));
    return this.#leaving ? undefined : why;
  }

  async #readMessages(): Promise<void> {
    const lines = new LineSplitter();
    try {
      for await (const chunk of this.#child.stdout)
        for (const line of lines.push(chunk)) this.#receive(JSON.parse(line));
    } catch (thrown) {
      this.#lost(thrown, "sent something unreadable");
    }
  }

  #receive(message: RankMessage): void {
    switch (message.type) {
      case "address":
        this.#address.resolve(addressBytes(message.address));
        return;
      case "connected": {
        const { type: _, ...connection } = message;
        this.#connected.resolve(connection);
        return;
      }
      case "loading":
        this.#options.onLoading?.(message.bytes);
        return;
      case "ready": {
        const { type: _, ...ready } = message;
        this.#ready.resolve(ready);
        return;
      }
      case "status":
        this.#statuses.shift()?.(message);
        return;
      case "fatal": {
        const error = CaravanError.fromJSON({ ...message.error });
        this.#failure ??= new CaravanError(error.code, `rank ${this.rank}: ${error.message}`, {
          ...(error.where === undefined ? {} : { where: error.where }),
          ...(error.hint === undefined ? {} : { hint: error.hint }),
          ...(error.param === undefined ? {} : { param: error.param }),
        });
      }
    }
  }

  async #readLog(): Promise<void> {
    const decoder = new TextDecoder();
    const onLog = this.#options.onLog ?? ((text: string) => process.stderr.write(text));
    for await (const chunk of this.#child.stderr) {
      const text = decoder.decode(chunk, { stream: true });
      this.#logTail = (this.#logTail + text).slice(-LOG_TAIL);
      onLog(text);
    }
  }

  #gone(how: string): CaravanError {
    return new CaravanError("cluster_degraded", `the process of rank ${this.rank} ${how}`, {
      retryAfterSeconds: 2,
    });
  }

  #crash(code: number): CaravanError {
    const { signalCode } = this.#child;
    this.#crashed = true;
    const how = signalCode === null ? `exit code ${code}` : `signal ${signalCode}`;
    const last = this.#logTail.trim().split("\n").at(-1) ?? "";
    return new CaravanError(
      "cluster_degraded",
      `the process of rank ${this.rank} ended (${how})${last === "" ? "" : `: ${last}`}`,
      { hint: "send the request again; the model's ranks are started again", retryAfterSeconds: 2 },
    );
  }
}
