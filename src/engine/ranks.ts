// The other ranks of a model, as the process of rank 0 holds them while its engine runs: processes of this machine
// (local-ranks.ts) or of other nodes (remote-ranks.ts).

import type { CaravanError } from "../errors.ts";
import type { RankGroup } from "./group.ts";
import type { Connection } from "./rank-protocol.ts";

export interface RankTimes {
  /** In steps, and of that exchanging with other ranks and waiting for them. */
  computeNs: number;
  exchangeNs: number;
  /** Most memory that the rank's process had resident so far. */
  peakResidentBytes: number;
}

export interface Ranks {
  readonly group: RankGroup;
  readonly connection: Connection;
  /** Ranks a stage, and stages. */
  readonly grid: { tensor: number; pipeline: number };
  /** Resolves with the reason when a rank has failed or died; never when the ranks are closed. */
  readonly lost: Promise<CaravanError>;
  /** Bytes of weights that ranks > 0 have in place, as far as this process hears of it. */
  readonly loadedBytes: number;
  /** Ends rank 0's engine by `closeEngine`, behind which the other ranks leave in peace, then the group and what this
   * process has started. Idempotent. */
  close(closeEngine: () => Promise<void>): Promise<void>;
  /** What the processes of ranks > 0 have counted, in order; empty where their nodes have to be asked. */
  times(): Promise<RankTimes[]>;
  /** Ends the processes that this one has started at once, whatever state they are in. */
  kill(): void;
}
