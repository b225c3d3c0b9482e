// The requests that are being served, and whether new ones may start: admission, disconnects and the end of the
// process meet here. Each generation holds a ticket whose signal is its one cancellation.

import { CaravanError } from "../errors.ts";

/** Retry-After of a node that is going away: time for a restart or for a balancer to look elsewhere. */
const SHUTDOWN_RETRY_SECONDS = 10;
const QUEUE_RETRY_SECONDS = 2;

export interface Ticket {
  /** Aborts when the client leaves or the node stops. Its reason is a CaravanError. */
  readonly signal: AbortSignal;
  /** The client left, or a sibling sequence failed. */
  cancel(): void;
  /** To be called once the reply is complete; idempotent. */
  release(): void;
}

export class Lifecycle {
  #running = new Set<AbortController>();
  #draining = false;
  #idle: (() => void)[] = [];

  get running(): number {
    return this.#running.size;
  }

  get draining(): boolean {
    return this.#draining;
  }

  /** Throws shutting_down while draining. */
  requireOpen(): void {
    if (this.#draining) {
      throw new CaravanError("shutting_down", "This node is shutting down and takes no new requests.", {
        retryAfterSeconds: SHUTDOWN_RETRY_SECONDS,
      });
    }
  }

  /** Admits one generation. `client` aborts when its connection closes. Throws queue_full or shutting_down. */
  enter(limit: number, client?: AbortSignal): Ticket {
    this.requireOpen();
    if (this.#running.size >= limit) {
      throw new CaravanError("queue_full", `${limit} requests are being served, which is the limit.`, {
        hint: "Try again later.",
        retryAfterSeconds: QUEUE_RETRY_SECONDS,
      });
    }
    const controller = new AbortController();
    const cancel = () => controller.abort(new CaravanError("cancelled", "The client closed the connection."));
    if (client?.aborted) cancel();
    client?.addEventListener("abort", cancel, { once: true });
    this.#running.add(controller);
    return {
      signal: controller.signal,
      cancel,
      release: () => {
        client?.removeEventListener("abort", cancel);
        if (!this.#running.delete(controller) || this.#running.size > 0) return;
        for (const resolve of this.#idle.splice(0)) resolve();
      },
    };
  }

  /** Refuses new requests from now on; running ones go on. */
  beginDrain(): void {
    this.#draining = true;
  }

  /** Resolves when no generation runs. */
  idle(): Promise<void> {
    if (this.#running.size === 0) return Promise.resolve();
    return new Promise((resolve) => this.#idle.push(resolve));
  }

  /** Ends every running generation with shutting_down. */
  cutOff(): void {
    for (const controller of this.#running) {
      controller.abort(
        new CaravanError("shutting_down", "This node shut down before the answer was complete.", {
          retryAfterSeconds: SHUTDOWN_RETRY_SECONDS,
        }),
      );
    }
  }
}
