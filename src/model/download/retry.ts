// How long to go on after a failure: a bounded number of tries in a row, waits that double, and the server's own wish
// (Retry-After) where it has one.

import { CaravanError } from "../../errors.ts";

/** A failure that may pass: a dropped connection, a stall, a busy server. */
export class PassingFault extends Error {
  /** Wait that the server asked for. */
  readonly afterMs: number | undefined;

  constructor(message: string, afterMs?: number, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "PassingFault";
    this.afterMs = afterMs;
  }
}

export interface RetryLimits {
  /** Failures in a row, without progress in between, after which it is given up. */
  failures: number;
  /** Wait after the first failure; doubles with each, up to maxWaitMs, and varies by a quarter. */
  firstWaitMs: number;
  maxWaitMs: number;
  /** A server that asks for a longer wait than this is not waited for. */
  maxRetryAfterMs: number;
}

export const RETRY_LIMITS: RetryLimits = {
  failures: 6,
  firstWaitMs: 500,
  maxWaitMs: 20_000,
  maxRetryAfterMs: 300_000,
};

export class RetryBudget {
  #failures = 0;
  readonly #what: string;
  readonly #limits: RetryLimits;
  readonly #signal: AbortSignal;
  readonly #onRetry: ((message: string) => void) | undefined;

  /** `what` names the thing in errors. `onRetry` hears of each failure that will be tried again. */
  constructor(what: string, limits: RetryLimits, signal: AbortSignal, onRetry?: (message: string) => void) {
    this.#what = what;
    this.#limits = limits;
    this.#signal = signal;
    this.#onRetry = onRetry;
  }

  /** Call when real progress was made: the count begins anew. */
  progressed(): void {
    this.#failures = 0;
  }

  /** Waits until the next try makes sense. Throws download_failed when there shall be none, or the abort's reason. */
  async failed(fault: PassingFault): Promise<void> {
    this.#failures += 1;
    const { failures, firstWaitMs, maxWaitMs, maxRetryAfterMs } = this.#limits;
    if (fault.afterMs !== undefined && fault.afterMs > maxRetryAfterMs) {
      const seconds = Math.ceil(fault.afterMs / 1000);
      throw new CaravanError("download_failed", `${fault.message}: it asks to wait ${seconds} s`, {
        where: this.#what,
        hint: "run the command again after that time; what was downloaded is kept",
        retryAfterSeconds: seconds,
        cause: fault,
      });
    }
    if (this.#failures >= failures) {
      throw new CaravanError("download_failed", `${fault.message} (${this.#failures} times in a row)`, {
        where: this.#what,
        hint: "check the connection and run the command again; what was downloaded is kept",
        cause: fault,
      });
    }
    const doubled = Math.min(maxWaitMs, firstWaitMs * 2 ** (this.#failures - 1));
    const waitMs = Math.max(fault.afterMs ?? 0, doubled * (0.75 + Math.random() / 2));
    this.#onRetry?.(`${this.#what}: ${fault.message}; trying again in ${(waitMs / 1000).toFixed(1)} s`);
    await wait(waitMs, this.#signal);
  }
}

/** Resolves after `ms`, or rejects with the signal's reason. */
export function wait(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const abort = (): void => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", abort);
      resolve();
    }, ms);
    if (signal.aborted) abort();
    else signal.addEventListener("abort", abort, { once: true });
  });
}

/** Milliseconds that a response asks to wait: Retry-After as seconds or a date, or the hub's RateLimit `t=` seconds. */
export function retryAfterMs(headers: Headers, nowMs: number): number | undefined {
  const value = headers.get("retry-after")?.trim();
  if (value !== undefined && /^\d{1,9}$/.test(value)) return Number(value) * 1000;
  const date = value === undefined ? Number.NaN : Date.parse(value);
  if (!Number.isNaN(date)) return Math.max(0, date - nowMs);
  const limit = /(?:^|;)\s*t=(\d{1,9})/.exec(headers.get("ratelimit") ?? "")?.[1];
  return limit === undefined ? undefined : Number(limit) * 1000;
}
