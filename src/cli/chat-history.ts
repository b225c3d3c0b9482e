// The lines that a person typed in `caravan run`, kept from one chat to the next: one line of text each, oldest first, in a file
// that only this user may read. Chats at the same time add to it without losing each other's lines.

import { appendFileSync, chmodSync, existsSync, readFileSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { writePrivateFile } from "../cluster/net/private-file.ts";
import { asCaravanError, type CaravanError } from "../errors.ts";
import { writeError } from "../model/atomic-file.ts";
import { makeFolder, resolvePaths } from "../paths.ts";

export const MOST_LINES = 1000;
/** A longer line is not kept. */
const MOST_CHARACTERS = 4096;
/** What more lines than are kept may have been added before the file is written anew, and bytes that are read at all. */
const MOST_BYTES = 8 << 20;
const PURPOSE = "keep what you type";

export function historyFile(): string {
  return join(resolvePaths().data, "chat-history");
}

export class ChatHistory {
  /** Why lines are not kept (any more). */
  failure: CaravanError | undefined;
  readonly #path: string;

  constructor(path: string = historyFile()) {
    this.#path = path;
  }

  /** Newest first, each once, MOST_LINES at most. Trims the file. Never throws: `failure` has the reason. */
  read(): string[] {
    try {
      if (!existsSync(this.#path)) return [];
      const { size, mode } = statSync(this.#path);
      if ((mode & 0o077) !== 0) chmodSync(this.#path, 0o600);
      const all = size > MOST_BYTES ? [] : readFileSync(this.#path, "utf8").split("\n").filter(isKept);
      const newest = [...new Set(all.reverse())].slice(0, MOST_LINES);
      if (size > MOST_BYTES || all.length > newest.length)
        writePrivateFile(this.#path, newest.toReversed().map(asLine).join(""), PURPOSE);
      return newest;
    } catch (thrown) {
      this.failure = asCaravanError(writeError(this.#path, thrown));
      return [];
    }
  }

  /** Keeps a line. Never throws: `failure` has the reason. */
  add(line: string): void {
    if (this.failure !== undefined || !isKept(line)) return;
    try {
      makeFolder(dirname(this.#path), PURPOSE);
      appendFileSync(this.#path, asLine(line), { mode: 0o600 });
    } catch (thrown) {
      this.failure = asCaravanError(writeError(this.#path, thrown));
    }
  }
}

const asLine = (line: string): string => `${line}\n`;

/** Not blank, not too long, and nothing in it that a terminal would obey. */
function isKept(line: string): boolean {
  return line.trim() !== "" && line.length <= MOST_CHARACTERS && !/\p{Cc}/u.test(line.replaceAll("\t", " "));
}
