// A rank > 0 on this node: asks the instance's owner for the session key, runs the rank's process, passes addresses, and ends with
// the owner's connection or by itself. The owner hears of the end at once, everybody else by this node's record.

import * as v from "valibot";
import { RankProcess } from "../../engine/rank-process.ts";
import type { RankLoad } from "../../engine/rank-protocol.ts";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import type { Channel } from "./channel.ts";
import { groupHost } from "./group-host.ts";
import type { RankReports, RdmaOptions, RunningRank } from "./rank-life.ts";
import {
  type OwnerFrame,
  OwnerFrameSchema,
  type RankAsk,
  type RankFrame,
  START_LIMIT_MS,
} from "./rank-order.ts";

/** What a rank needs of the connection to its owner. */
export type OwnerChannel = Pick<Channel, "send" | "read" | "readJson" | "finish" | "open"> & {
  socket: Pick<Channel["socket"], "localAddress">;
};

export interface FollowerOptions {
  ask: RankAsk;
  /** Opens a connection of purpose "rank" to the owner. */
  open: (signal: AbortSignal) => Promise<OwnerChannel>;
  /** Has the rank's part of the model on this node, fetched if need be; its folder. Rejects with model_not_found and others. */
  prepare: (signal: AbortSignal) => Promise<string>;
  /** What this machine computes with. */
  compute: () => Pick<RankLoad, "threads" | "device">;
  /** How this rank uses RDMA. */
  rdma: () => Promise<RdmaOptions>;
  /** Planned bytes of the rank: what progress is measured against. */
  bytes: number;
  reports: RankReports;
  log: Logger;
  /** Command line of a rank process; replaced in tests. */
  command?: readonly string[];
}

/** How often the owner hears of the rank's memory, and by how much it must have grown for that. */
const MEMORY_INTERVAL_MS = 2000;
const MEMORY_STEP_BYTES = 1 << 20;
/** For a process that is told to go: it takes its queue pairs down, which a killed one leaves to the kernel. One that hangs is killed. */
const LEAVE_LIMIT_MS = 1000;

type Begin = Extract<OwnerFrame, { type: "begin" }>;

export class FollowerRank implements RunningRank {
  readonly #options: FollowerOptions;
  readonly #stop = new AbortController();
  #process: RankProcess | undefined;
  #memoryTimer: ReturnType<typeof setInterval> | undefined;

  constructor(options: FollowerOptions) {
    this.#options = options;
    void this.#live();
  }

  get pid(): number | undefined {
    return this.#process?.pid;
  }

  stop(): void {
    this.#stop.abort();
  }

  async #live(): Promise<void> {
    const { reports, log } = this.#options;
    let channel: OwnerChannel | undefined;
    let failure: CaravanError | undefined;
    try {
      // Files first: they may take an hour, and the owner waits for the process only half a minute.
      const modelDir = await this.#options.prepare(this.#stop.signal);
      reports.loading(0);
      channel = await this.#options.open(this.#stop.signal);
      await this.#run(channel, modelDir);
    } catch (thrown) {
      failure = asCaravanError(thrown);
    }
    if (this.#stop.signal.aborted) failure = undefined;
    clearInterval(this.#memoryTimer);
    // Its memory is free when it is gone, not before.
    await this.#process?.close();
    if (failure !== undefined) {
      log.warn("rank ended", { rank: this.#options.ask.rank, reason: failure.message });
      if (channel !== undefined) say(channel, { type: "ended", error: failure.toJSON() });
    }
    channel?.finish();
    reports.over(failure);
  }

  /** Resolves when the rank is let go, rejects when it fails. */
  async #run(channel: OwnerChannel, modelDir: string): Promise<void> {
    const { ask, reports, log, bytes, command } = this.#options;
    channel.send(ask);
    const begin = await this.#begin(channel);
    const rdma = await this.#options.rdma();
    const rank = new RankProcess({
      group: { ...begin.group, rank: ask.rank, host: groupHost(channel.socket), ...rdma },
      ...(command === undefined ? {} : { command }),
      closeLimitMs: LEAVE_LIMIT_MS,
      onLog: (text) => log.debug(text.trimEnd()),
      onLoading: (done) => reports.loading(Math.min(1, done / Math.max(1, bytes))),
    });
    this.#process = rank;
    const failed = rank.ended.then((why) =>
      Promise.reject(why ?? new CaravanError("engine_failed", "it ended")),
    );
    const stopped = new Promise<void>((resolve) =>
      this.#stop.signal.addEventListener("abort", () => resolve(), { once: true }),
    );
    await Promise.race([failed, stopped, this.#follow(channel, rank, begin, modelDir)]);
  }

  async #begin(channel: OwnerChannel): Promise<Begin> {
    const frame = v.parse(OwnerFrameSchema, await channel.readJson(START_LIMIT_MS));
    if (frame.type === "begin") return frame;
    if (frame.type === "refused") throw CaravanError.fromJSON(frame.error);
    throw new CaravanError("cluster_degraded", "the owner does not keep to the rules");
  }

  /** Until the owner has no more use for the rank. */
  async #follow(channel: OwnerChannel, rank: RankProcess, begin: Begin, modelDir: string): Promise<void> {
    const address = await rank.address;
    say(channel, { type: "address", address: Buffer.from(address).toString("base64") });
    for (;;) {
      const read = await channel.read();
      if (read === undefined) return;
      const frame = v.parse(OwnerFrameSchema, read.kind === "json" ? read.value : undefined);
      if (frame.type !== "connect")
        throw new CaravanError("cluster_degraded", "the owner does not keep to the rules");
      const addresses = frame.addresses.map((each) => new Uint8Array(Buffer.from(each, "base64")));
      // A failure ends the process, which is watched.
      this.#connectAndLoad(channel, rank, addresses, frame.timeout_ms, begin, modelDir).catch(
        () => undefined,
      );
    }
  }

  async #connectAndLoad(
    channel: OwnerChannel,
    rank: RankProcess,
    addresses: readonly Uint8Array[],
    timeoutMs: number,
    { shares, sizes }: Begin,
    modelDir: string,
  ): Promise<void> {
    await rank.connect(addresses, timeoutMs);
    say(channel, { type: "connected" });
    await rank.load({ modelDir, shares, sizes, ...this.#options.compute() });
    say(channel, { type: "ready" });
    this.#options.reports.ready();
    await this.#tellMemory(channel, rank);
  }

  /** At once, and again whenever it has grown. */
  async #tellMemory(channel: OwnerChannel, rank: RankProcess): Promise<void> {
    let told = 0;
    let asking = false;
    const tell = async (): Promise<void> => {
      if (asking) return;
      asking = true;
      try {
        const { peakResidentBytes } = await rank.status();
        if (peakResidentBytes < told + MEMORY_STEP_BYTES) return;
        told = peakResidentBytes;
        say(channel, { type: "memory", peak_resident_bytes: peakResidentBytes });
      } catch {
        // The process has ended, which is watched.
        clearInterval(this.#memoryTimer);
      } finally {
        asking = false;
      }
    };
    this.#memoryTimer = setInterval(tell, MEMORY_INTERVAL_MS);
    await tell();
  }
}

function say(channel: OwnerChannel, frame: RankFrame): void {
  if (channel.open) channel.send(frame);
}
