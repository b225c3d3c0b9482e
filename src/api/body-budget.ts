// One limit for the memory of all request bodies together. Each body has a limit of its own, but many of them at once,
// finished or not, would still fill the machine; so what they hold is counted, from the first bytes until the request
// is over.

import { CaravanError } from "../errors.ts";

/** So much of each body is not counted: small requests are served while large ones fill the budget. */
const FREE_BYTES = 64 * 1024;
const RETRY_SECONDS = 5;

export class BodyBudget {
  #used = 0;

  constructor(readonly limitBytes: number) {}

  /** Bytes that are counted now. */
  get used(): number {
    return this.#used;
  }

  open(): BodyLease {
    let counted = 0;
    return {
      grow: (totalBytes) => {
        const more = Math.max(0, totalBytes - FREE_BYTES) - counted;
        if (more <= 0) return;
        if (this.#used + more > this.limitBytes) {
          throw new CaravanError(
            "queue_full",
            `The requests that are being served hold ${this.limitBytes} bytes of bodies, which is the limit.`,
            { hint: "Try again later, or send a shorter body.", retryAfterSeconds: RETRY_SECONDS },
          );
        }
        counted += more;
        this.#used += more;
      },
      release: () => {
        this.#used -= counted;
        counted = 0;
      },
    };
  }
}

export interface BodyLease {
  /** The body has this many bytes by now. Throws queue_full. */
  grow(totalBytes: number): void;
  /** The request is over; idempotent. */
  release(): void;
}
