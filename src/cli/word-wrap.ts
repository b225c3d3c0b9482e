// Breaks an answer's lines between words where it is shown on a terminal, which would break them anywhere. The text comes
// in pieces of any size and is shown as it comes: a word that turns out too long for its line is taken back and written
// again on the next.

/** A word longer than this share of the line is broken by the terminal: addresses, and languages without spaces. */
const LONGEST_WORD = 0.6;

export class WordWrap {
  /** Columns that the current line takes, and those of its last word. */
  #line = 0;
  #word = "";

  /** `columns` is asked each time: terminals change their size. 0 where it is not known: nothing is wrapped. */
  constructor(
    private readonly write: (text: string) => void,
    private readonly columns: () => number,
  ) {}

  push(text: string): void {
    // The last column stays free: terminals differ in where the cursor is behind it.
    const columns = (this.columns() || Number.POSITIVE_INFINITY) - 1;
    let out = "";
    for (const { segment } of new Intl.Segmenter(undefined, { granularity: "grapheme" }).segment(text)) {
      if (segment === "\n" || segment === "\r\n") {
        out += segment;
        this.#line = 0;
        this.#word = "";
        continue;
      }
      const width = segment === "\t" ? 8 - (this.#line % 8) : Bun.stringWidth(segment);
      const space = segment === " " || segment === "\t";
      if (this.#line + width > columns) {
        const word = Bun.stringWidth(this.#word);
        if (space) {
          // The space would begin the next line.
          out += "\n";
          this.#line = 0;
          this.#word = "";
          continue;
        }
        const back = this.#word !== "" && word < this.#line && word <= columns * LONGEST_WORD;
        if (back) {
          out += `${"\b".repeat(word)}\x1b[K\n${this.#word}`;
          this.#line = word;
        } else {
          out += "\n";
          this.#line = 0;
        }
      }
      out += segment;
      this.#line += width;
      this.#word = space ? "" : this.#word + segment;
    }
    if (out !== "") this.write(out);
  }
}
