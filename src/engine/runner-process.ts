// One run of the runner process: starts it, sends it commands, hands out its messages, and says once how it ended.
// runner-client.ts decides when to start one and what its end means.

import { CaravanError } from "../errors.ts";
import { childEnvironment } from "./child-environment.ts";
import { isCompiled } from "./library.ts";
import { LineSplitter } from "./line-splitter.ts";
import type { RunnerCommand, RunnerMessage } from "./protocol.ts";

/** Characters of the log that are kept for the message about a crash. */
const LOG_TAIL = 2000;

/** Time for the runner to leave when it is asked to. */
const CLOSE_LIMIT_MS = 3000;

/** Time for the last of the log to arrive after the end of the process. */
const LOG_LIMIT_MS = 200;

export interface RunnerProcessOptions {
  command: readonly string[];
  /** First line on the runner's stdin. */
  load: unknown;
  onMessage: (message: RunnerMessage) => void;
  /** Called once, after the last message. */
  onExit: (error: CaravanError) => void;
  /** The runner's log, line ends included. */
  onLog: (text: string) => void;
}

/** How to start the runner: this executable again, or from source Bun with the program's main file. */
export function runnerCommand(): string[] {
  return isCompiled()
    ? [process.execPath, "runner"]
    : [process.execPath, new URL("../main.ts", import.meta.url).pathname, "runner"];
}

export class RunnerProcess {
  readonly #options: RunnerProcessOptions;
  readonly #child: Bun.Subprocess<"pipe", "pipe", "pipe">;
  /** Resolves when the process has ended and onExit has been called. */
  readonly ended: Promise<void>;
  #logTail = "";
  #broken: CaravanError | undefined;

  /** Throws engine_failed when the process cannot be started. */
  constructor(options: RunnerProcessOptions) {
    this.#options = options;
    try {
      this.#child = Bun.spawn([...options.command], {
        env: childEnvironment(),
        stdin: "pipe",
        stdout: "pipe",
        stderr: "pipe",
      });
    } catch (cause) {
      throw new CaravanError("engine_failed", "the runner process cannot be started", {
        where: options.command[0] ?? "",
        cause,
      });
    }
    this.#write(options.load);
    this.ended = this.#watch();
  }

  get pid(): number {
    return this.#child.pid;
  }

  send(command: RunnerCommand): void {
    this.#write(command);
  }

  /** Ends the process now; `why` is what onExit reports. */
  kill(why: CaravanError): void {
    this.#broken ??= why;
    this.#child.kill("SIGKILL");
  }

  /** Asks the process to leave, and insists after a while. */
  async close(): Promise<void> {
    this.send({ type: "shutdown" });
    const timer = setTimeout(() => this.#child.kill("SIGKILL"), CLOSE_LIMIT_MS);
    await this.ended;
    clearTimeout(timer);
  }

  /** The pipe buffers what the runner has not read; one that is gone is reported by onExit. */
  #write(value: unknown): void {
    const { stdin } = this.#child;
    try {
      stdin.write(`${JSON.stringify(value)}\n`);
      const flushed = stdin.flush();
      if (flushed instanceof Promise) flushed.catch((thrown) => this.#lost(thrown));
    } catch (thrown) {
      this.#lost(thrown);
    }
  }

  #lost(thrown: unknown): void {
    this.#broken ??= new CaravanError("engine_failed", "the runner process takes no commands", {
      cause: thrown,
    });
    this.#child.kill("SIGKILL");
  }

  async #watch(): Promise<void> {
    const log = this.#readLog();
    await this.#readMessages();
    const code = await this.#child.exited;
    // A grandchild could hold the log open; the process itself is gone.
    const late = Promise.withResolvers<void>();
    const timer = setTimeout(late.resolve, LOG_LIMIT_MS);
    await Promise.race([log, late.promise]);
    clearTimeout(timer);
    this.#options.onExit(this.#broken ?? this.#crash(code));
  }

  async #readMessages(): Promise<void> {
    const lines = new LineSplitter();
    try {
      for await (const chunk of this.#child.stdout)
        for (const line of lines.push(chunk)) this.#options.onMessage(JSON.parse(line));
    } catch (cause) {
      this.kill(new CaravanError("engine_failed", "the runner process sent something unreadable", { cause }));
    }
  }

  async #readLog(): Promise<void> {
    const decoder = new TextDecoder();
    for await (const chunk of this.#child.stderr) {
      const text = decoder.decode(chunk, { stream: true });
      this.#logTail = (this.#logTail + text).slice(-LOG_TAIL);
      this.#options.onLog(text);
    }
  }

  #crash(code: number): CaravanError {
    const { signalCode } = this.#child;
    const how = signalCode === null ? `exit code ${code}` : `signal ${signalCode}`;
    const killed = signalCode === "SIGKILL" ? "; the system does that when memory runs out" : "";
    const last = this.#logTail.trim().split("\n").at(-1) ?? "";
    return new CaravanError(
      "engine_failed",
      `the runner process ended (${how}${killed})${last === "" ? "" : `: ${last}`}`,
      {
        hint: "send the request again; the model is loaded again",
        retryAfterSeconds: 2,
      },
    );
  }
}
