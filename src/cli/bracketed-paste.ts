// Pastes in the line editor of a terminal. A terminal that is asked to marks what is pasted; a long paste, or one of several
// lines, then stands as a short note in the line that is edited, and is put in its place when the message is sent. Typed
// into the editor character by character, a pasted document would take it minutes.

import { Transform, type TransformCallback } from "node:stream";
import { StringDecoder } from "node:string_decoder";

export const ASK_FOR_MARKS = "\x1b[?2004h";
export const NO_MORE_MARKS = "\x1b[?2004l";
const BEGIN = "\x1b[200~";
const END = "\x1b[201~";
/** A paste of one line up to this length is typed. */
const TYPED_LENGTH = 200;

/** What was pasted, by the note that stands for it; kept as long as the chat, because the history has the notes. */
export class Pastes {
  readonly #texts = new Map<string, string>();

  /** What the editor gets for the paste. */
  noteOf(pasted: string): string {
    // Terminals send line ends as the Enter key does.
    const text = pasted.replaceAll("\r\n", "\n").replaceAll("\r", "\n");
    if (text.length <= TYPED_LENGTH && !text.includes("\n")) return text;
    const lines = text.split("\n").length;
    const size = lines > 1 ? `${lines} lines` : `${text.length} characters`;
    const note = `[paste ${this.#texts.size + 1}: ${size}]`;
    this.#texts.set(note, text);
    return note;
  }

  /** The message with the texts in the places of their notes. */
  filled(message: string): string {
    return message.replaceAll(
      /\[paste \d+: \d+ (?:lines|characters)\]/g,
      (note) => this.#texts.get(note) ?? note,
    );
  }
}

/** The keys of a terminal without the marks of pastes. */
export class PasteFilter extends Transform {
  readonly isTTY = true;
  readonly #decoder = new StringDecoder("utf8");
  /** The beginning of a mark at the end of what came. */
  #rest = "";
  #pasted: string[] | undefined;

  constructor(
    private readonly terminal: NodeJS.ReadStream,
    private readonly pastes: Pastes,
  ) {
    super();
  }

  /** readline asks it of its input. */
  setRawMode(on: boolean): this {
    this.terminal.setRawMode(on);
    return this;
  }

  override _transform(chunk: Buffer, _encoding: BufferEncoding, done: TransformCallback): void {
    let text = this.#rest + this.#decoder.write(chunk);
    this.#rest = "";
    while (text !== "") {
      const mark = this.#pasted === undefined ? BEGIN : END;
      const at = text.indexOf(mark);
      const before = at >= 0 ? text.slice(0, at) : withoutBeginning(text, mark);
      if (this.#pasted === undefined) {
        if (before !== "") this.push(before);
      } else this.#pasted.push(before);
      if (at < 0) {
        this.#rest = text.slice(before.length);
        break;
      }
      text = text.slice(at + mark.length);
      if (this.#pasted !== undefined) this.push(this.pastes.noteOf(this.#pasted.join("")));
      this.#pasted = this.#pasted === undefined ? [] : undefined;
    }
    done();
  }

  override _flush(done: TransformCallback): void {
    if (this.#pasted === undefined && this.#rest !== "") this.push(this.#rest);
    done();
  }
}

/** `text` without what may be the beginning of `mark` at its end. The Escape key so waits for the next key, which is no loss:
 * the editor waits for it, too. */
function withoutBeginning(text: string, mark: string): string {
  for (let length = Math.min(mark.length - 1, text.length); length > 0; length--)
    if (mark.startsWith(text.slice(-length))) return text.slice(0, -length);
  return text;
}
