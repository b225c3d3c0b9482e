// A process of this program that speaks JSON lines: commands on its stdin, messages on its stdout, a log on stderr. What is common
// to runners and ranks: starting it, writing to a pipe that may be gone, reading, and how it ended.

import { CaravanError } from "../errors.ts";
import { childEnvironment } from "./child-environment.ts";
import { isCompiled } from "./library.ts";
import { LineSplitter } from "./line-splitter.ts";

/** Characters of the log's end that are kept, for the sentence about a crash. */
const LOG_TAIL = 2000;

/** How to start this program's hidden command: this executable again, or from source Bun with the program's main file. */
export function ownCommand(name: "runner" | "rank" | "rdma"): string[] {
  return isCompiled()
    ? [process.execPath, name]
    : [process.execPath, new URL("../main.ts", import.meta.url).pathname, name];
}

export interface ChildProcessOptions {
  /** As sentences call it: "the runner process". */
  name: string;
  command: readonly string[];
  /** The process's log, line ends included; default: this process's stderr. */
  onLog: ((text: string) => void) | undefined;
}

export class ChildProcess<Message> {
  readonly name: string;
  /** Resolves at the end of the log, which a grandchild may hold open. */
  readonly logEnded: Promise<void>;
  readonly #child: Bun.Subprocess<"pipe", "pipe", "pipe">;
  #logTail = "";
  #failure: CaravanError | undefined;

  /** Throws engine_failed when the process cannot be started. */
  constructor({ name, command, onLog = (text) => process.stderr.write(text) }: ChildProcessOptions) {
    this.name = name;
    try {
      this.#child = Bun.spawn([...command], {
        env: childEnvironment(),
        stdin: "pipe",
        stdout: "pipe",
        stderr: "pipe",
      });
    } catch (cause) {
      throw new CaravanError("engine_failed", `${name} cannot be started`, {
        where: command[0] ?? "",
        cause,
      });
    }
    this.logEnded = this.#readLog(onLog);
  }

  get pid(): number {
    return this.#child.pid;
  }

  /** Why it is to blame for its end, the first reason; undefined: it has given none. */
  get failure(): CaravanError | undefined {
    return this.#failure;
  }

  /** Names a reason for the end that is coming, where there is none yet. */
  blame(error: CaravanError): void {
    this.#failure ??= error;
  }

  /** Ends the process now. */
  kill(why?: CaravanError): void {
    if (why !== undefined) this.blame(why);
    this.#child.kill("SIGKILL");
  }

  /** The pipe buffers what the process has not read; one that is gone is told by `read`. */
  send(value: unknown): void {
    const { stdin } = this.#child;
    try {
      stdin.write(`${JSON.stringify(value)}\n`);
      const flushed = stdin.flush();
      if (flushed instanceof Promise) flushed.catch((thrown) => this.#lost("takes no commands", thrown));
    } catch (thrown) {
      this.#lost("takes no commands", thrown);
    }
  }

  /** Ends the process, which has been asked to leave, when `ended` takes longer than the limit. */
  async insist(ended: Promise<unknown>, limitMs: number): Promise<void> {
    const timer = setTimeout(() => this.kill(), limitMs);
    await ended;
    clearTimeout(timer);
  }

  /** Hands out all messages and waits for the process's end; its exit code. */
  async read(onMessage: (message: Message) => void): Promise<number> {
    const lines = new LineSplitter();
    try {
      for await (const chunk of this.#child.stdout)
        for (const line of lines.push(chunk)) onMessage(JSON.parse(line));
    } catch (thrown) {
      this.#lost("sent something unreadable", thrown);
    }
    return await this.#child.exited;
  }

  /** Of a process that has ended. */
  get signal(): NodeJS.Signals | number | null {
    return this.#child.signalCode;
  }

  /** The log's last line, as the end of a sentence. */
  get lastWords(): string {
    const last = this.#logTail.trim().split("\n").at(-1) ?? "";
    return last === "" ? "" : `: ${last}`;
  }

  #lost(how: string, cause: unknown): void {
    this.kill(new CaravanError("engine_failed", `${this.name} ${how}`, { cause }));
  }

  async #readLog(onLog: (text: string) => void): Promise<void> {
    const decoder = new TextDecoder();
    for await (const chunk of this.#child.stderr) {
      const text = decoder.decode(chunk, { stream: true });
      this.#logTail = (this.#logTail + text).slice(-LOG_TAIL);
      onLog(text);
    }
  }
}
