// What the ranks of a bench cost each other: all-reduces and the time that rank 0 spent exchanging with the others.

import { round } from "./bench-statistics.ts";
import type { LoadedEngine } from "./load-model.ts";
import type { RankTimes } from "./ranks.ts";

/** Of one setting's trials, the warm-up left out. */
export interface ExchangeResult {
  /** All-reduces of rank 0, and what one took on average, waiting for the slowest rank included, microseconds. */
  reduces: number;
  reduce_us: number;
  /** Share of the steps' time that rank 0 spent in all-reduces, 0 to 1. */
  reduce_share: number;
  /** What rank 0's MACs (over TCP) or checksums (over RDMA, and shared memory: of one message in 16, scaled up) took, of all that it sent and
   * received: milliseconds, and as a share of the steps' time. */
  mac_ms: number;
  mac_share: number;
  /** By rank: share of its steps' time in all exchanges together, waiting for other ranks included. */
  exchange_share: number[];
}

export interface RanksResult {
  tensor: number;
  pipeline: number;
  transport: string;
  /** Median round trip to the farthest rank when connecting, microseconds. */
  round_trip_us: number;
  /** Why a faster transport was not taken; "" when there is nothing to say. */
  note: string;
  /** By result. */
  exchange: ExchangeResult[];
}

/** Counters at one moment. */
interface Counted {
  reduces: number;
  reduceNs: number;
  macNs: number;
  /** By rank. */
  times: Omit<RankTimes, "peakResidentBytes">[];
}

async function count({ engine, ranks }: LoadedEngine): Promise<Counted> {
  const { exchangeNs, computeNs } = engine.stats();
  const nothing = { reduces: 0, reduceNs: 0, macNs: 0 };
  const { reduces, reduceNs, macNs } = ranks?.group.stats() ?? nothing;
  const times = [{ exchangeNs, computeNs }, ...((await ranks?.times()) ?? [])];
  return { reduces, reduceNs, macNs, times };
}

/** Watches a model's ranks while settings are measured. */
export class RankWatch {
  readonly #model: LoadedEngine;
  readonly #exchange: ExchangeResult[] = [];
  #before: Counted | undefined;

  constructor(model: LoadedEngine) {
    this.#model = model;
  }

  /** A setting's trials begin, behind its warm-up. */
  async start(): Promise<void> {
    this.#before = await count(this.#model);
  }

  /** The trials have ended. */
  async stop(): Promise<void> {
    const before = this.#before;
    if (before === undefined) return;
    const after = await count(this.#model);
    const reduces = after.reduces - before.reduces;
    const reduceNs = after.reduceNs - before.reduceNs;
    const spent = after.times.map(({ computeNs, exchangeNs }, rank) => ({
      computeNs: computeNs - (before.times[rank]?.computeNs ?? 0),
      exchangeNs: exchangeNs - (before.times[rank]?.exchangeNs ?? 0),
    }));
    const share = (ns: number, of = 0) => (of === 0 ? 0 : round(ns / of, 4));
    this.#exchange.push({
      reduces,
      reduce_us: reduces === 0 ? 0 : round(reduceNs / reduces / 1000, 2),
      reduce_share: share(reduceNs, spent[0]?.computeNs),
      mac_ms: round((after.macNs - before.macNs) / 1e6, 3),
      mac_share: share(after.macNs - before.macNs, spent[0]?.computeNs),
      exchange_share: spent.map(({ computeNs, exchangeNs }) => share(exchangeNs, computeNs)),
    });
  }

  /** undefined for a model on one rank. */
  result(): RanksResult | undefined {
    const { ranks } = this.#model;
    if (ranks === undefined) return undefined;
    const { transport, round_trip_us, note } = ranks.connection;
    return { ...ranks.grid, transport, round_trip_us, note, exchange: this.#exchange };
  }
}
