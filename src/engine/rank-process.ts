// One rank process seen from the process that started it: its address, then connecting, loading, and how it ended. Every
// step rejects with the reason when the process fails or ends; nothing here retries.

import { CaravanError } from "../errors.ts";
import { ChildProcess, ownCommand } from "./child-process.ts";
import {
  addressBytes,
  addressText,
  type Connection,
  type GroupOptions,
  type LinkMeasure,
  type RankCommand,
  type RankLoad,
  type RankMemory,
  type RankMessage,
} from "./rank-protocol.ts";
import type { RankTimes } from "./ranks.ts";

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

export class RankProcess {
  readonly rank: number;
  /** Opaque bytes for the other ranks. */
  readonly address: Promise<Uint8Array>;
  /** Resolves when the process has ended: with the reason, or with nothing where it was asked to or rank 0 had closed its engine
   * (exit code 0). Never rejects. */
  readonly ended: Promise<CaravanError | undefined>;
  readonly #options: RankProcessOptions;
  readonly #child: ChildProcess<RankMessage>;
  readonly #address = Promise.withResolvers<Uint8Array>();
  readonly #connected = Promise.withResolvers<Connection>();
  readonly #measured = Promise.withResolvers<LinkMeasure>();
  readonly #ready = Promise.withResolvers<RankReady>();
  #statuses: ((status: Extract<RankMessage, { type: "status" }>) => void)[] = [];
  #leaving = false;
  #crashed = false;

  /** Starts the process. Throws engine_failed when that is not possible. */
  constructor(options: RankProcessOptions) {
    this.#options = options;
    this.rank = options.group.rank;
    const { command = ownCommand("rank"), onLog } = options;
    this.#child = new ChildProcess({ name: `the process of rank ${this.rank}`, command, onLog });
    this.address = this.#address.promise;
    // Whoever waits hears of a failure; nobody has to wait.
    for (const { promise } of [this.#address, this.#connected, this.#measured, this.#ready])
      promise.catch(() => undefined);
    this.#child.send(options.group);
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

  /** Once, after connecting two ranks; the other one measures at the same time. */
  measure(mostMs: number): Promise<LinkMeasure> {
    this.#send({ type: "measure", most_ms: mostMs });
    return this.#measured.promise;
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
    const { exchange_ns, compute_ns, peak_resident_bytes } = await Promise.race([status.promise, gone]);
    return { exchangeNs: exchange_ns, computeNs: compute_ns, peakResidentBytes: peak_resident_bytes };
  }

  /** Asks the process to leave, and insists after a while. Idempotent. */
  async close(): Promise<void> {
    this.#leaving = true;
    this.#send({ type: "shutdown" });
    await this.#child.insist(this.ended, this.#options.closeLimitMs ?? CLOSE_LIMIT_MS);
  }

  kill(): void {
    this.#leaving = true;
    this.#child.kill();
  }

  #send(command: RankCommand): void {
    this.#child.send(command);
  }

  async #watch(): Promise<CaravanError | undefined> {
    const code = await this.#child.read((message) => this.#receive(message));
    const peaceful = this.#leaving || code === 0;
    const why = this.#child.failure ?? (peaceful ? undefined : this.#crash(code));
    for (const { reject } of [this.#address, this.#connected, this.#measured, this.#ready])
      reject(why ?? this.#gone("ended"));
    return this.#leaving ? undefined : why;
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
      case "measured":
        this.#measured.resolve({ roundTripUs: message.round_trip_us, bandwidth: message.bandwidth });
        return;
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
        this.#child.blame(
          new CaravanError(error.code, `rank ${this.rank}: ${error.message}`, {
            ...(error.where === undefined ? {} : { where: error.where }),
            ...(error.hint === undefined ? {} : { hint: error.hint }),
            ...(error.param === undefined ? {} : { param: error.param }),
          }),
        );
      }
    }
  }

  #gone(how: string): CaravanError {
    return new CaravanError("cluster_degraded", `the process of rank ${this.rank} ${how}`, {
      retryAfterSeconds: 2,
    });
  }

  #crash(code: number): CaravanError {
    const { signal, lastWords } = this.#child;
    this.#crashed = true;
    const how = signal === null ? `exit code ${code}` : `signal ${signal}`;
    return new CaravanError(
      "cluster_degraded",
      `the process of rank ${this.rank} ended (${how})${lastWords}`,
      { hint: "send the request again; the model's ranks are started again", retryAfterSeconds: 2 },
    );
  }
}
