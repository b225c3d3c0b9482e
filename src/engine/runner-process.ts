// One run of the runner process: starts it, sends it commands, hands out its messages, and says once how it ended.
// runner-client.ts decides when to start one and what its end means.

import { CaravanError } from "../errors.ts";
import { ChildProcess } from "./child-process.ts";
import type { RunnerCommand, RunnerMessage } from "./protocol.ts";

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
  /** The runner's log, line ends included; default: this process's stderr. */
  onLog: ((text: string) => void) | undefined;
}

export class RunnerProcess {
  readonly #options: RunnerProcessOptions;
  readonly #child: ChildProcess<RunnerMessage>;
  /** Resolves when the process has ended and onExit has been called. */
  readonly ended: Promise<void>;

  /** Throws engine_failed when the process cannot be started. */
  constructor(options: RunnerProcessOptions) {
    this.#options = options;
    const { command, onLog } = options;
    this.#child = new ChildProcess({ name: "the runner process", command, onLog });
    this.#child.send(options.load);
    this.ended = this.#watch();
  }

  get pid(): number {
    return this.#child.pid;
  }

  send(command: RunnerCommand): void {
    this.#child.send(command);
  }

  /** Ends the process now; `why` is what onExit reports. */
  kill(why: CaravanError): void {
    this.#child.kill(why);
  }

  /** Asks the process to leave, and insists after a while. */
  async close(): Promise<void> {
    this.send({ type: "shutdown" });
    await this.#child.insist(this.ended, CLOSE_LIMIT_MS);
  }

  async #watch(): Promise<void> {
    const code = await this.#child.read(this.#options.onMessage);
    // A grandchild could hold the log open; the process itself is gone.
    const late = Promise.withResolvers<void>();
    const timer = setTimeout(late.resolve, LOG_LIMIT_MS);
    await Promise.race([this.#child.logEnded, late.promise]);
    clearTimeout(timer);
    this.#options.onExit(this.#child.failure ?? this.#crash(code));
  }

  #crash(code: number): CaravanError {
    const { signal, lastWords } = this.#child;
    const how = signal === null ? `exit code ${code}` : `signal ${signal}`;
    const killed = signal === "SIGKILL" ? "; the system does that when memory runs out" : "";
    return new CaravanError("engine_failed", `the runner process ended (${how}${killed})${lastWords}`, {
      hint: "send the request again; the model is loaded again",
      retryAfterSeconds: 2,
    });
  }
}
