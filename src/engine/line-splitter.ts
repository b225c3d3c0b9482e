// Cuts a byte stream into lines of UTF-8 text, whatever the sizes of the chunks.

import { CaravanError } from "../errors.ts";

/** Longest line, in UTF-16 units: a request of a few million tokens. */
const MAX_LINE = 1 << 27;

export class LineSplitter {
  readonly #decoder = new TextDecoder();
  /** Parts of the line that has not ended yet. */
  #parts: string[] = [];
  #length = 0;

  /** The lines that `chunk` completes, without their ends. Throws when a line does not end. */
  push(chunk: Uint8Array): string[] {
    const text = this.#decoder.decode(chunk, { stream: true });
    const pieces = text.split("\n");
    const rest = pieces.pop() ?? "";
    const lines: string[] = [];
    for (const piece of pieces) {
      lines.push(this.#parts.length === 0 ? piece : this.#parts.join("") + piece);
      this.#parts = [];
      this.#length = 0;
    }
    if (rest !== "") this.#parts.push(rest);
    this.#length += rest.length;
    if (this.#length > MAX_LINE)
      throw new CaravanError("internal_error", `a line is longer than ${MAX_LINE} characters`);
    return lines;
  }
}
