// How far the ranks of an epoch are on their way to ready, or why one of them will not get there. Pure.

import { START_MS } from "./instance-limits.ts";
import { nameOf, type SeenRank } from "./instance-view.ts";
import type { Member } from "./membership.ts";
import type { RankState } from "./types.ts";

export type LoadingVerdict =
  | { kind: "failed"; cause: RankState["cause"]; reason: string }
  | { kind: "ready" }
  /** progress: 0 to 1; of each rank one half is fetching, the other loading. */
  | { kind: "going"; phase: "fetching" | "loading"; progress: number };

/** sinceMs: since the ranks were asked for. */
export function judgeLoading(
  ranks: readonly SeenRank[],
  sinceMs: number,
  members: readonly Member[],
): LoadingVerdict {
  let progress = 0;
  for (const { node, state } of ranks) {
    const name = nameOf(node, members);
    if (state === undefined) {
      if (sinceMs <= START_MS) continue;
      const reason = `${name} did not begin within ${START_MS / 1000} s`;
      return { kind: "failed", cause: "process", reason };
    }
    if (state.phase === "failed")
      return { kind: "failed", cause: state.cause, reason: `${name}: ${state.reason}` };
    progress += state.progress + (state.phase === "fetching" ? 0 : 1);
  }
  if (ranks.every(({ state }) => state?.phase === "ready")) return { kind: "ready" };
  const fetched = ranks.every(({ state }) => state !== undefined && state.phase !== "fetching");
  return { kind: "going", phase: fetched ? "loading" : "fetching", progress: progress / (2 * ranks.length) };
}
