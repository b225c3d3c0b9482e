// Watches a group between steps: nobody waits for the other ranks then, so their silence or end, which the library notices by
// itself, would be heard of with the next request only.

import { CaravanError } from "../errors.ts";
import type { RankGroup } from "./group.ts";

const PAUSE_MS = 100;

export class GroupWatch {
  readonly #timer: ReturnType<typeof setInterval>;

  /** Calls `onFailure` once, when the group has failed. */
  constructor(group: RankGroup, onFailure: (why: CaravanError) => void) {
    this.#timer = setInterval(() => {
      const failure = group.failure();
      if (failure === undefined) return;
      this.stop();
      onFailure(new CaravanError("cluster_degraded", failure, { retryAfterSeconds: 2 }));
    }, PAUSE_MS);
    this.#timer.unref();
  }

  /** Call it before the group is closed. */
  stop(): void {
    clearInterval(this.#timer);
  }
}
