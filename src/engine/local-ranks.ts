// The ranks of a model that all run on this machine: this process is rank 0, the others are processes that it starts. They
// are connected when `start` resolves. When one fails or dies the others cannot go on: `lost` says why, and whoever
// holds the engine ends it.

import { randomBytes } from "node:crypto";
import { CaravanError } from "../errors.ts";
import { RankGroup } from "./group.ts";
import { GroupWatch } from "./group-watch.ts";
import { RankProcess, type RankReady } from "./rank-process.ts";
import {
  type Connection,
  type GroupOptions,
  type RankLoad,
  RDMA_QUEUE_PAIRS,
  type TransportChoice,
} from "./rank-protocol.ts";
import type { Ranks, RankTimes } from "./ranks.ts";

/** Processes start one after the other on a machine that is busy, each in well under a second. */
const START_LIMIT_MS = 30_000;
const CONNECT_LIMIT_MS = 20_000;
/** A rank that is stopped is noticed after so long while somebody waits for it, after twice as long while nobody does; that is
 * to be within 2 s. */
const SILENCE_MS = 900;

export interface LocalRanksOptions {
  /** Ranks a stage, and stages: at least 2 ranks in all. */
  tensor: number;
  pipeline: number;
  transport: TransportChoice;
  /** Command line of a rank; default: this program's `rank` command. */
  command?: readonly string[];
  /** The ranks' logs; default: this process's stderr. */
  onLog?: (text: string) => void;
}

export class LocalRanks implements Ranks {
  readonly lost: Promise<CaravanError>;
  readonly #watch: GroupWatch;
  #closed = false;

  private constructor(
    readonly group: RankGroup,
    readonly connection: Connection,
    readonly grid: { tensor: number; pipeline: number },
    private readonly processes: readonly RankProcess[],
    private readonly loading: number[],
  ) {
    const lost = Promise.withResolvers<CaravanError>();
    this.lost = lost.promise;
    this.#watch = new GroupWatch(group, lost.resolve);
    for (const each of processes)
      each.ended.then((reason) => {
        if (this.#closed) return;
        const why =
          reason ??
          new CaravanError("cluster_degraded", `the process of rank ${each.rank} ended`, {
            retryAfterSeconds: 2,
          });
        group.abort(why.message);
        lost.resolve(why);
      });
  }

  /** Starts and connects all ranks. On failure nothing is left running. */
  static async start(options: LocalRanksOptions): Promise<LocalRanks> {
    const { tensor, pipeline, transport, command, onLog } = options;
    const size = tensor * pipeline;
    const common: Omit<GroupOptions, "rank"> = {
      size,
      transport,
      epoch: 1,
      key: randomBytes(32).toString("hex"),
      instance: randomBytes(16).toString("hex"),
      ...queuePairs(process.env.CARAVAN_RDMA_QUEUE_PAIRS),
      silenceMs: SILENCE_MS,
    };
    const processes: RankProcess[] = [];
    const loading = new Array<number>(size).fill(0);
    let group: RankGroup | undefined;
    try {
      for (let rank = 1; rank < size; rank++)
        processes.push(
          new RankProcess({
            group: { ...common, rank },
            ...(command === undefined ? {} : { command }),
            ...(onLog === undefined ? {} : { onLog }),
            onLoading: (bytes) => {
              loading[rank] = bytes;
            },
          }),
        );
      group = RankGroup.open({ ...common, rank: 0 });
      const others = await within(
        Promise.all(processes.map(({ address }) => address)),
        START_LIMIT_MS,
        `not all of ${size - 1} rank processes started`,
      );
      const connection = await connectAll(group, processes, [group.address, ...others]);
      return new LocalRanks(group, connection, { tensor, pipeline }, processes, loading);
    } catch (thrown) {
      group?.abort("another rank could not connect");
      for (const each of processes) each.kill();
      await Promise.all(processes.map(({ ended }) => ended));
      group?.close();
      throw thrown;
    }
  }

  get loadedBytes(): number {
    return this.loading.reduce((sum, bytes) => sum + bytes, 0);
  }

  /** Has ranks > 0 load and follow; rank 0 loads at the same time. Rejects with the first failure. */
  load(load: RankLoad): Promise<RankReady[]> {
    return Promise.all(this.processes.map((each) => each.load(load)));
  }

  async close(closeEngine: () => Promise<void>): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#watch.stop();
    await closeEngine();
    await Promise.all(this.processes.map((each) => each.close()));
    this.group.close();
  }

  times(): Promise<RankTimes[]> {
    return Promise.all(this.processes.map((each) => each.status()));
  }

  kill(): void {
    this.#closed = true;
    for (const each of this.processes) each.kill();
  }
}

/** All at the same time. When several fail, a process that died is the cause, and rank 0's own words come before the others'. */
async function connectAll(
  group: RankGroup,
  processes: readonly RankProcess[],
  addresses: readonly Uint8Array[],
): Promise<Connection> {
  const [own, ...others] = await Promise.allSettled([
    group.connect(addresses, CONNECT_LIMIT_MS),
    ...processes.map(async (each) => {
      try {
        return await each.connect(addresses, CONNECT_LIMIT_MS);
      } catch (thrown) {
        group.abort(`rank ${each.rank} failed`);
        throw thrown;
      }
    }),
  ]);
  const failures = others.flatMap((each) => (each.status === "rejected" ? [each.reason] : []));
  const crash = others[processes.findIndex(({ crashed }) => crashed)];
  if (crash?.status === "rejected") throw crash.reason;
  if (own.status === "rejected") throw own.reason;
  if (failures.length > 0) throw failures[0];
  return own.value;
}

async function within<T>(promise: Promise<T>, limitMs: number, late: string): Promise<T> {
  const timeout = Promise.withResolvers<never>();
  const timer = setTimeout(
    () => timeout.reject(new CaravanError("engine_failed", `${late} within ${Math.round(limitMs / 1000)} s`)),
    limitMs,
  );
  try {
    return await Promise.race([promise, timeout.promise]);
  } finally {
    clearTimeout(timer);
  }
}

/** What the environment asks for, which is for tests: a system has one kind that works. */
export function queuePairs(asked: string | undefined): Pick<GroupOptions, "rdmaQueuePairs"> {
  if (asked === undefined || asked === "") return {};
  const known = RDMA_QUEUE_PAIRS.find((each) => each === asked);
  if (known === undefined)
    throw new CaravanError("invalid_argument", `CARAVAN_RDMA_QUEUE_PAIRS is ${asked}`, {
      hint: `one of ${RDMA_QUEUE_PAIRS.join(", ")}`,
    });
  return { rdmaQueuePairs: known };
}
