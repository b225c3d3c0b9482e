// caravan run: one answer, or a chat in the terminal.

import { createInterface, type Interface } from "node:readline";
import type { ChatMessage } from "../api/model-directory.ts";
import type { SamplingRequest } from "../api/sampling-defaults.ts";
import { asCaravanError } from "../errors.ts";
import { DEFAULT_MODEL } from "../model/card.ts";
import { loadSettings } from "../settings.ts";
import { type AnswerStats, type ChatSource, findNode, openHere } from "./chat-source.ts";
import type { Arguments, Command } from "./command.ts";
import { findModel } from "./model-argument.ts";
import { ProgressLine } from "./progress.ts";
import { RUN_OPTIONS, runOptions } from "./run-options.ts";

/** Exit code after Ctrl-C, as shells have it. */
const INTERRUPTED_EXIT_CODE = 130;

const CHAT_HELP = `  /clear    forget the conversation
  /system TEXT   set the system message (and forget the conversation)
  /exit     leave (also Ctrl-D)
  \\ at the end of a line goes on in the next; Ctrl-C stops an answer
`;

export const run: Command = {
  name: "run",
  summary: "answer a prompt, or chat in the terminal",
  positionals: "[MODEL] [PROMPT]",
  count: [0, 2],
  options: {
    system: { value: "TEXT", short: "s", help: "system message" },
    "max-tokens": { value: "N", short: "n", help: "most tokens of an answer" },
    temperature: { value: "T", short: "t", help: "0 = always the most probable token" },
    "top-p": { value: "P", help: "nucleus sampling" },
    seed: { value: "S", help: "the same seed gives the same answer" },
    here: { help: "load the model in this process even if a node runs on this machine" },
    quiet: { short: "q", help: "only the answer, no speed line" },
    ...RUN_OPTIONS,
  },
  details: "Without PROMPT: from a pipe, its text is the prompt; from a terminal, an interactive chat.",
  async run(args) {
    const prompt = args.positionals[1] ?? (process.stdin.isTTY ? undefined : await pipedPrompt());
    const progress = new ProgressLine();
    const source = await openSource(args, progress);
    try {
      const chat = new Chat(args, source, progress);
      if (prompt !== undefined) return await chat.once(prompt);
      return await chat.interactive();
    } finally {
      await source.close();
    }
  },
};

async function pipedPrompt(): Promise<string> {
  return (await Bun.stdin.text()).trim();
}

async function openSource(args: Arguments, progress: ProgressLine): Promise<ChatSource> {
  const loaded = loadSettings();
  const { settings } = loaded;
  const model = findModel(args.positionals[0] ?? DEFAULT_MODEL);
  if (!args.flag("here")) {
    const node = await findNode(`http://127.0.0.1:${settings.port}`, settings.api_keys[0], model.name);
    if (node !== undefined) return node;
  }
  try {
    return await openHere(model, runOptions(args, loaded), (fraction, detail) =>
      progress.show(`loading ${model.name}`, fraction, detail),
    );
  } finally {
    progress.clear();
  }
}

function samplingOf(args: Arguments): SamplingRequest {
  const temperature = args.number("temperature", 0, 100);
  const topP = args.number("top-p", 0, 1);
  const seed = args.integer("seed", 0, Number.MAX_SAFE_INTEGER);
  return {
    ...(temperature === undefined ? {} : { temperature }),
    ...(topP === undefined ? {} : { top_p: topP }),
    ...(seed === undefined ? {} : { seed }),
  };
}

class Chat {
  readonly #sampling: SamplingRequest;
  readonly #maxTokens: number | undefined;
  readonly #quiet: boolean;
  #messages: ChatMessage[] = [];
  #running: AbortController | undefined;

  constructor(
    args: Arguments,
    private readonly source: ChatSource,
    private readonly progress: ProgressLine,
  ) {
    this.#sampling = samplingOf(args);
    this.#maxTokens = args.integer("max-tokens", 1, 2 ** 31);
    this.#quiet = args.flag("quiet");
    this.#reset(args.text("system"));
  }

  #reset(system: string | undefined): void {
    this.#messages = system === undefined ? [] : [{ role: "system", content: system }];
  }

  /** One answer; the exit code. */
  async once(prompt: string): Promise<number> {
    const interrupt = () => this.#running?.abort();
    process.on("SIGINT", interrupt);
    try {
      return (await this.#answer(prompt)) ? 0 : INTERRUPTED_EXIT_CODE;
    } finally {
      process.off("SIGINT", interrupt);
    }
  }

  async interactive(): Promise<number> {
    process.stderr.write(`${this.source.about}\n  /help lists what you can type\n`);
    const lines = createInterface({
      input: process.stdin,
      output: process.stderr,
      prompt: ">>> ",
      historySize: 1000,
    });
    lines.on("SIGINT", () => {
      if (this.#running !== undefined) this.#running.abort();
      else lines.close();
    });
    let unfinished = "";
    lines.prompt();
    for await (const line of lines) {
      if (line.endsWith("\\")) {
        unfinished += `${line.slice(0, -1)}\n`;
        lines.setPrompt("... ");
      } else {
        const text = `${unfinished}${line}`.trim();
        unfinished = "";
        lines.setPrompt(">>> ");
        if (!(await this.#turn(text, lines))) break;
      }
      lines.prompt();
    }
    process.stderr.write("\n");
    return 0;
  }

  /** One line of the chat; false = leave. */
  async #turn(text: string, lines: Interface): Promise<boolean> {
    if (text === "") return true;
    if (text === "/exit" || text === "/bye" || text === "/quit") return false;
    if (text === "/help" || text === "/?") process.stderr.write(CHAT_HELP);
    else if (text === "/clear") this.#reset(this.#systemMessage());
    else if (text.startsWith("/system ")) this.#reset(text.slice("/system ".length).trim());
    else if (text.startsWith("/")) process.stderr.write(`there is no ${text.split(" ")[0]} (see /help)\n`);
    else {
      lines.pause();
      try {
        await this.#answer(text);
      } catch (thrown) {
        process.stderr.write(`\ncaravan: ${asCaravanError(thrown).toText()}\n`);
        this.#messages.pop();
      }
      lines.resume();
    }
    return true;
  }

  #systemMessage(): string | undefined {
    const first = this.#messages[0];
    return first?.role === "system" ? first.content : undefined;
  }

  /** Streams one answer to stdout and keeps it in the conversation. False when it was interrupted. */
  async #answer(text: string): Promise<boolean> {
    this.#messages.push({ role: "user", content: text });
    const running = new AbortController();
    this.#running = running;
    let answer = "";
    let stats: AnswerStats | undefined;
    try {
      const events = this.source.answer(this.#messages, {
        sampling: this.#sampling,
        signal: running.signal,
        ...(this.#maxTokens === undefined ? {} : { maxTokens: this.#maxTokens }),
      });
      for await (const event of events) {
        if (event.type === "progress") {
          this.progress.show(
            "reading the prompt",
            event.done / event.total,
            `${event.done} of ${event.total} tokens`,
          );
        } else if (event.type === "text") {
          this.progress.clear();
          answer += event.text;
          process.stdout.write(event.text);
        } else {
          stats = event.stats;
        }
      }
    } catch (thrown) {
      if (!running.signal.aborted) throw thrown;
    } finally {
      this.progress.clear();
      this.#running = undefined;
      if (answer !== "" && !answer.endsWith("\n")) process.stdout.write("\n");
    }
    this.#messages.push({ role: "assistant", content: answer });
    if (stats !== undefined && !this.#quiet) process.stderr.write(`${speedLine(stats)}\n`);
    return !running.signal.aborted;
  }
}

function speedLine(stats: AnswerStats): string {
  const speed = (value: number | undefined) =>
    value === undefined ? "" : ` at ${value.toFixed(1)} tokens/s`;
  const cached = stats.cachedTokens > 0 ? ` (${stats.cachedTokens} cached)` : "";
  const cut = stats.reason === "length" ? "; cut off at the limit" : "";
  return `[prompt ${stats.promptTokens} tokens${cached}${speed(stats.promptSpeed)}; answer ${stats.completionTokens} tokens${speed(stats.decodeSpeed)}${cut}]`;
}
