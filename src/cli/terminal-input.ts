// Messages that a person types: one line, several (a backslash at the end of each but the last, or between """ and
// """), or a paste of many lines, which counts as one message. The line editor lives only while it is asked for a
// message: in between the terminal is in its normal mode, where Ctrl-C is a signal that stops an answer.

import { createInterface } from "node:readline";
import { ASK_FOR_MARKS, NO_MORE_MARKS, PasteFilter, Pastes } from "./bracketed-paste.ts";

/** Lines that arrive closer together than anybody types were pasted. */
const PASTE_MS = 15;
const HISTORY_LINES = 1000;
const FENCE = '"""';

export type Typed = { type: "message"; text: string } | { type: "interrupt" } | { type: "end" };

/** What the lines so far make: a whole message, or undefined while more is to come. */
export function messageOf(lines: readonly string[]): string | undefined {
  const text = lines.join("\n");
  const start = text.trimStart();
  if (start.startsWith(FENCE)) {
    const rest = start.slice(FENCE.length);
    const end = rest.indexOf(FENCE);
    return end < 0 ? undefined : `${rest.slice(0, end)}${rest.slice(end + FENCE.length)}`.trim();
  }
  if (lines.at(-1)?.endsWith("\\") === true) return undefined;
  return lines
    .map((line) => (line.endsWith("\\") ? line.slice(0, -1) : line))
    .join("\n")
    .trim();
}

/** What was typed before, newest first, and who is told of each new line that does not stand for a paste. */
export interface InputHistory {
  readonly lines: readonly string[];
  readonly onLine: (line: string) => void;
}

export class TerminalInput {
  #history: string[];
  readonly #pastes = new Pastes();

  constructor(
    private readonly history: InputHistory = { lines: [], onLine: () => undefined },
    private readonly input: NodeJS.ReadStream = process.stdin,
    private readonly output: NodeJS.WriteStream = process.stderr,
  ) {
    this.#history = [...history.lines];
  }

  /** Waits for a message. "interrupt": Ctrl-C on an empty line; "end": Ctrl-D. */
  read(): Promise<Typed> {
    return new Promise((resolve) => {
      const keys = new PasteFilter(this.input, this.#pastes);
      this.input.pipe(keys);
      this.output.write(ASK_FOR_MARKS);
      const editor = createInterface({
        input: keys,
        output: this.output,
        terminal: true,
        historySize: HISTORY_LINES,
        history: this.#history,
        removeHistoryDuplicates: true,
        prompt: ">>> ",
      });
      let lines: string[] = [];
      let timer: ReturnType<typeof setTimeout> | undefined;
      let result: Typed = { type: "end" };
      const finish = (typed: Typed) => {
        result = typed;
        editor.close();
      };
      const look = () => {
        const text = messageOf(lines);
        if (text !== undefined) finish({ type: "message", text: this.#pastes.filled(text) });
        else {
          editor.setPrompt("... ");
          editor.prompt();
        }
      };
      editor.on("history", (history) => {
        this.#history = history;
      });
      editor.on("line", (line) => {
        lines.push(line);
        // The text behind the note of a paste is gone when the chat is.
        if (this.#pastes.filled(line) === line) this.history.onLine(line);
        clearTimeout(timer);
        timer = setTimeout(look, PASTE_MS);
      });
      editor.on("SIGINT", () => {
        if (lines.length === 0 && editor.line === "") {
          this.output.write("\n");
          finish({ type: "interrupt" });
          return;
        }
        lines = [];
        this.output.write("^C\n");
        editor.setPrompt(">>> ");
        editor.write(null, { ctrl: true, name: "e" });
        editor.write(null, { ctrl: true, name: "u" });
        editor.prompt();
      });
      editor.on("close", () => {
        clearTimeout(timer);
        this.input.unpipe(keys);
        this.input.pause();
        this.output.write(NO_MORE_MARKS);
        if (result.type === "end") this.output.write("\n");
        resolve(result);
      });
      editor.prompt();
    });
  }
}
