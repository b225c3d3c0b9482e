// Messages of a runner or a rank to a pipe as JSON lines: everything that one turn of the event loop produced goes out in one write.
// When the reader is slow, later turns collect here until the pipe has room; the amount is bounded by the requests.

import type { Writable } from "node:stream";
import type { RunnerMessage } from "./protocol.ts";

export class MessageWriter<Message = RunnerMessage> {
  readonly #out: Writable;
  #lines: string[] = [];
  #full = false;

  constructor(out: Writable) {
    this.#out = out;
    out.on("drain", () => {
      this.#full = false;
      this.flush();
    });
    // The node is gone; the end of stdin, which comes with it, ends this process.
    out.on("error", () => {
      this.#full = true;
    });
  }

  add(message: Message): void {
    this.#lines.push(JSON.stringify(message));
  }

  flush(): void {
    if (this.#full || this.#lines.length === 0) return;
    const text = `${this.#lines.join("\n")}\n`;
    this.#lines = [];
    this.#full = !this.#out.write(text);
  }

  /** Resolves when everything has been handed to the system, or the reader is gone. */
  async end(): Promise<void> {
    if (this.#out.destroyed) return;
    const rest = this.#lines.length === 0 ? "" : `${this.#lines.join("\n")}\n`;
    this.#lines = [];
    await new Promise<void>((resolve) => {
      this.#out.once("error", () => resolve());
      this.#out.write(rest, () => resolve());
    });
  }
}
