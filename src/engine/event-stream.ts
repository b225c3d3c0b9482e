// The events of one request as an async iterator with a queue of its own: the producer never waits, so a slow reader
// holds up nobody else. The queue is bounded by the request's max_tokens.

import type { GenerateEvent } from "./protocol.ts";

export class EventStream implements AsyncIterableIterator<GenerateEvent> {
  readonly #onAbandon: () => void;
  #events: GenerateEvent[] = [];
  #next = 0;
  #ended = false;
  #reader: ((result: IteratorResult<GenerateEvent>) => void) | undefined;

  /** `onAbandon` is called once if the reader leaves before the last event was produced. */
  constructor(onAbandon: () => void) {
    this.#onAbandon = onAbandon;
  }

  /** Finish or error has been produced, or the reader has left. */
  get ended(): boolean {
    return this.#ended;
  }

  push(event: GenerateEvent): void {
    if (this.#ended) return;
    if (event.type === "finish" || event.type === "error") this.#ended = true;
    const reader = this.#reader;
    if (reader === undefined) {
      this.#events.push(event);
      return;
    }
    this.#reader = undefined;
    reader({ done: false, value: event });
  }

  next(): Promise<IteratorResult<GenerateEvent>> {
    const event = this.#events[this.#next];
    if (event !== undefined) {
      this.#next++;
      if (this.#next === this.#events.length) {
        this.#events = [];
        this.#next = 0;
      }
      return Promise.resolve({ done: false, value: event });
    }
    if (this.#ended) return Promise.resolve({ done: true, value: undefined });
    return new Promise((resolve) => {
      this.#reader = resolve;
    });
  }

  /** The reader leaves; a read that is waiting ends at once. */
  return(): Promise<IteratorResult<GenerateEvent>> {
    if (!this.#ended) {
      this.#ended = true;
      this.#onAbandon();
    }
    this.#events = [];
    this.#next = 0;
    this.#reader?.({ done: true, value: undefined });
    this.#reader = undefined;
    return Promise.resolve({ done: true, value: undefined });
  }

  [Symbol.asyncIterator](): this {
    return this;
  }
}
