// Rank 0 of an instance, on the node that owns it: starts the runner, gives the other ranks the session key, carries
// everybody's address to all, and ends the instance's epoch the moment one rank is lost.

import { randomBytes } from "node:crypto";
import * as v from "valibot";
import { instanceSizes } from "../../engine/instance-sizes.ts";
import type { GroupOptions, Instance } from "../../engine/rank-protocol.ts";
import type { RunnerClient } from "../../engine/runner-client.ts";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import { readModelConfig } from "../../model/config.ts";
import { makeLoadPlan } from "../../model/load-plan.ts";
import type { KvType } from "../../model/memory-plan.ts";
import { openCheckpoint } from "../../model/safetensors.ts";
import type { InstalledModel } from "../../model/store.ts";
import { type OpenModel, openModel, type RunOptions } from "../../node/open-model.ts";
import type { InstanceSpec, NodeId } from "../types.ts";
import type { Channel } from "./channel.ts";
import type { RankReports, RdmaOptions, RunningRank } from "./rank-life.ts";
import {
  CONNECT_LIMIT_MS,
  type OwnerFrame,
  type RankAsk,
  RankFrameSchema,
  START_LIMIT_MS,
} from "./rank-order.ts";

const START_LOOK_MS = 500;

export interface LeaderOptions {
  spec: InstanceSpec;
  epoch: number;
  /** Has this rank's part of the model here, fetched if need be. */
  prepare: (signal: AbortSignal) => Promise<InstalledModel>;
  /** Whether a node of the instance still gets its files: its rank starts after that. */
  fetching: () => boolean;
  run: RunOptions;
  /** Under which the other ranks reach this machine; "" = it is the only one. */
  host: () => string;
  /** How rank 0 uses RDMA. */
  rdma: () => Promise<RdmaOptions>;
  /** For people. */
  nodeName: (id: NodeId) => string;
  reports: RankReports;
  /** The instance answers from now on. */
  onOpen: (model: OpenModel) => void;
  log: Logger;
}

/** A rank on another node, as far as the leader needs it. */
interface Follower {
  channel: Channel;
}

export class LeaderRank implements RunningRank {
  readonly #options: LeaderOptions;
  readonly #group: GroupOptions;
  readonly #followers = new Map<number, Follower>();
  readonly #addresses: PromiseWithResolvers<string>[];
  readonly #ready: PromiseWithResolvers<void>[];
  readonly #sizes = Promise.withResolvers<Instance["sizes"]>();
  readonly #stop = new AbortController();
  /** Rejects when a rank is lost, or the runner is. */
  readonly #lost = Promise.withResolvers<never>();
  #engine: RunnerClient | undefined;
  #open: OpenModel | undefined;

  constructor(options: LeaderOptions) {
    this.#options = options;
    const { spec, epoch } = options;
    const size = spec.ranks.length;
    this.#group = {
      rank: 0,
      size,
      // `caravan serve --transport` of the owner holds for its instances.
      transport: options.run.transport ?? spec.transport,
      epoch,
      key: randomBytes(32).toString("hex"),
      instance: spec.id.replaceAll("-", ""),
    };
    this.#addresses = Array.from({ length: size }, () => Promise.withResolvers<string>());
    this.#ready = Array.from({ length: size }, () => Promise.withResolvers<void>());
    // Whoever waits hears of it.
    for (const { promise } of [this.#sizes, this.#lost, ...this.#addresses, ...this.#ready])
      promise.catch(() => undefined);
    void this.#live();
  }

  get epoch(): number {
    return this.#options.epoch;
  }

  stop(): void {
    this.#stop.abort(new CaravanError("shutting_down", "the instance is stopped", { retryAfterSeconds: 5 }));
    this.#lost.reject(this.#stop.signal.reason);
  }

  /** A connection on which a node asks to compute one of the ranks. Owns the channel from now on. */
  async admit(channel: Channel, from: NodeId, { rank }: RankAsk): Promise<void> {
    const { spec } = this.#options;
    if (spec.ranks[rank]?.node !== from || this.#followers.has(rank) || this.#stop.signal.aborted) {
      refuse(
        channel,
        new CaravanError("cluster_degraded", "this rank is not that node's to compute (any more)"),
      );
      return;
    }
    this.#followers.set(rank, { channel });
    const name = `rank ${rank} on ${this.#options.nodeName(from)}`;
    try {
      const begin: OwnerFrame = {
        type: "begin",
        group: this.#group,
        shares: this.#shares(),
        sizes: await this.#sizes.promise,
      };
      channel.send(begin);
      for (;;) {
        const read = await channel.read();
        if (read === undefined) throw new CaravanError("cluster_degraded", "its node closed the connection");
        const frame = v.parse(RankFrameSchema, read.kind === "json" ? read.value : undefined);
        if (frame.type === "address") this.#addresses[rank]?.resolve(frame.address);
        else if (frame.type === "ready") this.#ready[rank]?.resolve();
        else if (frame.type === "memory") this.#engine?.noteRankPeak(rank, frame.peak_resident_bytes);
        else if (frame.type === "ended") throw CaravanError.fromJSON(frame.error);
      }
    } catch (thrown) {
      channel.close();
      const error = asCaravanError(thrown);
      this.#lose(
        new CaravanError(error.code, `${name} is lost: ${error.message}`, {
          ...(error.where === undefined ? {} : { where: error.where }),
          ...(error.hint === undefined ? {} : { hint: error.hint }),
          retryAfterSeconds: error.retryAfterSeconds ?? 2,
        }),
      );
    }
  }

  #lose(why: CaravanError): void {
    if (this.#stop.signal.aborted) return;
    this.#engine?.lost(why);
    this.#lost.reject(why);
  }

  #shares(): Instance["shares"] {
    return this.#options.spec.ranks.map(({ rank, stage, tensorRank, layers, weight }) => ({
      rank,
      stage,
      tensorRank,
      layers: [...layers],
      weight,
    }));
  }

  async #live(): Promise<void> {
    const { reports, log, spec, epoch } = this.#options;
    let failure: CaravanError | undefined;
    try {
      await this.#run();
    } catch (thrown) {
      failure = this.#stop.signal.aborted ? undefined : asCaravanError(thrown);
    }
    this.#sizes.reject(failure ?? this.#stop.signal.reason);
    if (failure !== undefined) {
      log.warn("instance ended", { model: spec.model, epoch, reason: failure.message });
      // Requests end with the reason, and a process that is stopped cannot hold them up.
      await this.#engine?.kill(failure);
    }
    await (this.#open ?? this.#engine)?.close();
    for (const { channel } of this.#followers.values()) channel.finish();
    reports.over(failure);
  }

  /** Until the instance is stopped or lost: always rejects. */
  async #run(): Promise<never> {
    const { spec, reports, onOpen } = this.#options;
    const model = await Promise.race([this.#options.prepare(this.#stop.signal), this.#lost.promise]);
    reports.loading(0);
    const opening = spec.ranks.length === 1 ? this.#openAlone(model) : this.#openTogether(model);
    const open = await Promise.race([opening, this.#lost.promise]).catch((thrown) => {
      opening.then((late) => late.close()).catch(() => undefined);
      throw thrown;
    });
    this.#open = open;
    reports.ready();
    onOpen(open);
    return await Promise.race([this.#lost.promise, runnerEnd(open, this.#stop.signal)]);
  }

  #openAlone(model: InstalledModel): Promise<OpenModel> {
    const { spec, run, reports } = this.#options;
    return openModel(model, {
      ...run,
      context: spec.context,
      streams: spec.streams,
      onProgress: reports.loading,
      onEngine: (engine) => {
        this.#engine = engine;
      },
      signal: this.#stop.signal,
    });
  }

  async #openTogether(model: InstalledModel): Promise<OpenModel> {
    const { spec, run, reports } = this.#options;
    const config = readModelConfig(model.path);
    const plan = makeLoadPlan(config, await openCheckpoint(model.path));
    const kvType: KvType = run.kvBits === 8 ? "q8" : config.dtype === "bfloat16" ? "bf16" : "f16";
    const sizes = instanceSizes(plan, {
      context: spec.context,
      streams: spec.streams,
      compute: "fast",
      kvType,
    });
    this.#sizes.resolve(sizes);
    const rdma = await this.#options.rdma();
    const group: GroupOptions = { ...this.#group, host: this.#options.host(), ...rdma };
    const opening = openModel(model, {
      ...run,
      context: spec.context,
      instance: { group, shares: this.#shares(), sizes },
      onAddress: (address) => this.#addresses[0]?.resolve(Buffer.from(address).toString("base64")),
      onConnected: ({ transport, note, round_trip_us }) =>
        this.#options.log.info("ranks connected", {
          transport,
          round_trip_us,
          ...(note === "" ? {} : { note }),
        }),
      onProgress: reports.loading,
      onEngine: (engine) => {
        this.#engine = engine;
      },
      signal: this.#stop.signal,
    });
    opening.catch((thrown) => this.#addresses[0]?.reject(thrown));
    await this.#connect(opening);
    const others = Promise.all(this.#ready.slice(1).map(({ promise }) => promise));
    const [open] = await Promise.all([opening, others]);
    return open;
  }

  /** Once every rank has given its address, all connect at the same time. */
  async #connect(opening: Promise<unknown>): Promise<void> {
    const late = Promise.withResolvers<never>();
    let waitedMs = 0;
    const timer = setInterval(() => {
      waitedMs = this.#options.fetching() ? 0 : waitedMs + START_LOOK_MS;
      if (waitedMs >= START_LIMIT_MS) late.reject(this.#missing());
    }, START_LOOK_MS);
    try {
      const all = Promise.all(this.#addresses.map(({ promise }) => promise));
      const failed = opening.then(() => new Promise<never>(() => undefined));
      const addresses = await Promise.race([all, late.promise, failed]);
      const connect: OwnerFrame = { type: "connect", addresses, timeout_ms: CONNECT_LIMIT_MS };
      for (const { channel } of this.#followers.values()) channel.send(connect);
      this.#engine?.connect(
        addresses.map((each) => new Uint8Array(Buffer.from(each, "base64"))),
        CONNECT_LIMIT_MS,
      );
    } finally {
      clearInterval(timer);
    }
  }

  #missing(): CaravanError {
    const missing = this.#options.spec.ranks
      .filter(({ rank }) => rank > 0 && !this.#followers.has(rank))
      .map(({ rank, node }) => `rank ${rank} on ${this.#options.nodeName(node)}`);
    const who = missing.length === 0 ? "a rank's process" : missing.join(" and ");
    return new CaravanError("cluster_degraded", `${who} did not start within ${START_LIMIT_MS / 1000} s`);
  }
}

/** Rejects when the runner process has ended; looks at its state, which says so within the time of a turn. */
function runnerEnd(open: OpenModel, signal: AbortSignal): Promise<never> {
  return new Promise((_, reject) => {
    const timer = setInterval(() => {
      const { state, error } = open.engine.status();
      if (state !== "failed" && state !== "closed") return;
      clearInterval(timer);
      reject(
        error === undefined
          ? new CaravanError("engine_failed", "the runner process ended", { retryAfterSeconds: 2 })
          : CaravanError.fromJSON({ ...error }),
      );
    }, 50);
    signal.addEventListener("abort", () => clearInterval(timer), { once: true });
  });
}

/** Tells the node why, and lets it go. */
export function refuse(channel: Channel, error: CaravanError): void {
  const frame: OwnerFrame = { type: "refused", error: error.toJSON() };
  if (channel.open) channel.send(frame);
  channel.finish();
}
