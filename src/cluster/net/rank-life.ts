// What a rank that runs on this node reports, whichever part of the instance it is.

import type { GroupOptions } from "../../engine/rank-protocol.ts";
import type { CaravanError } from "../../errors.ts";
import type { RankState } from "../types.ts";

export interface RankReports {
  /** 0 to 1, of the files that this node has to get first. */
  fetching: (fraction: number) => void;
  /** 0 to 1. */
  loading: (fraction: number) => void;
  ready: () => void;
  /** The rank is over and its process gone. Called once, the last of all calls. error: undefined where it was stopped. */
  over: (error: CaravanError | undefined) => void;
}

/** What a rank's own node knows best: its devices towards the other ranks, or why it takes no part in RDMA. */
export type RdmaOptions = Pick<GroupOptions, "rdmaDevice" | "noRdma" | "rdmaQueuePairs">;

/** One rank that runs here. */
export interface RunningRank {
  /** Ends it soon; `over` follows. Idempotent. */
  stop(): void;
}

/** What kind of failure it was, for the instance's owner to judge by. */
export function causeOf({ code }: CaravanError): Exclude<RankState["cause"], "none"> {
  switch (code) {
    case "out_of_memory":
      return "memory";
    case "bad_file":
    case "model_not_found":
    case "unsupported_model":
    case "disk_full":
    case "download_failed":
      return "files";
    case "cluster_degraded":
    case "deadline_exceeded":
      return "group";
    default:
      return "process";
  }
}
