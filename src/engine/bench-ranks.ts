// What the ranks of a bench cost each other: all-reduces and the time that rank 0 spent exchanging with the others.

import { round } from "./bench-statistics.ts";
import type { LoadedEngine } from "./load-model.ts";

/** Of one setting's trials, the warm-up left out. */
export interface ExchangeResult {
  /** All-reduces of rank 0, and what one took on average, waiting for the slowest rank included, microseconds. */
  reduces: number;
  reduce_us: number;
  /** Share of the steps' time that rank 0 spent in all-reduces, and in all exchanges together, 0 to 1. */
  reduce_share: number;
  exchange_share: number;
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
  exchangeNs: number;
  computeNs: number;
}

function count({ engine, ranks }: LoadedEngine): Counted {
  const { exchangeNs, computeNs } = engine.stats();
  const { reduces, reduceNs } = ranks?.group.stats() ?? { reduces: 0, reduceNs: 0 };
  return { reduces, reduceNs, exchangeNs, computeNs };
}

/** Watches a model's ranks while settings are measured. */
export class RankWatch {
  readonly #model: LoadedEngine;
  readonly #exchange: ExchangeResult[] = [];
  #before: Counted;

  constructor(model: LoadedEngine) {
    this.#model = model;
    this.#before = count(model);
  }

  /** A setting's trials begin, behind its warm-up. */
  start(): void {
    this.#before = count(this.#model);
  }

  /** The trials have ended. */
  stop(): void {
    const after = count(this.#model);
    const of = (key: keyof Counted) => after[key] - this.#before[key];
    const share = (ns: number) => (of("computeNs") === 0 ? 0 : round(ns / of("computeNs"), 4));
    this.#exchange.push({
      reduces: of("reduces"),
      reduce_us: of("reduces") === 0 ? 0 : round(of("reduceNs") / of("reduces") / 1000, 2),
      reduce_share: share(of("reduceNs")),
      exchange_share: share(of("exchangeNs")),
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
