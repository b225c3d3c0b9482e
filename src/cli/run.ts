// caravan run: one answer, or a chat in the terminal. The answer goes to standard output; all else to standard error.

import type { ChatMessage } from "../api/model-directory.ts";
import type { SamplingRequest } from "../api/sampling-defaults.ts";
import { SAMPLING_RANGES } from "../api/sampling-ranges.ts";
import { asCaravanError } from "../errors.ts";
import { DEFAULT_MODEL } from "../model/card.ts";
import type { InstalledModel } from "../model/store.ts";
import type { RunOptions } from "../node/open-model.ts";
import { runningNodes } from "../node/running-nodes.ts";
import { type LoadedSettings, loadSettings } from "../settings.ts";
import { VERSION } from "../version.ts";
import { ChatHistory } from "./chat-history.ts";
import { type AnswerStats, type ChatSource, openHere } from "./chat-source.ts";
import { type Arguments, type Command, usage } from "./command.ts";
import { findModel } from "./model-argument.ts";
import { findNode, type NodeAddress, nameAtNodes } from "./node-chat.ts";
import { findOrPull } from "./offer-pull.ts";
import { ProgressLine } from "./progress.ts";
import { RUN_OPTIONS, runOptions } from "./run-options.ts";
import { TerminalInput } from "./terminal-input.ts";
import { WordWrap } from "./word-wrap.ts";

/** Exit code after Ctrl-C, as shells have it. */
const INTERRUPTED_EXIT_CODE = 130;

const CHAT_HELP = `  /clear         forget the conversation
  /system TEXT   set the system message and forget the conversation
  /exit          leave (also Ctrl-D, or Ctrl-C twice)
  \\ at the end of a line continues it; """ begins and ends a message of many lines
  up and down go through what you typed, in earlier chats too (--no-history: not kept); Ctrl-C stops an answer and keeps the chat
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
    port: { value: "PORT", help: "where the node listens (default 11711)" },
    here: { help: "load the model in this process even if a node runs on this machine" },
    quiet: { short: "q", help: "only the answer" },
    "no-history": { help: "keep nothing of what is typed for later chats" },
    ...RUN_OPTIONS,
  },
  details: `Without PROMPT: from a pipe, its text is the prompt; from a terminal, an interactive chat.
A node that runs on this machine answers if it or its cluster has the model, else the model is loaded in this process.`,
  async run(args) {
    const port = args.integer("port", 1, 65535);
    const loaded = loadSettings({ flags: port === undefined ? {} : { port } });
    const options = chatOptions(args);
    const load = runOptions(args, loaded);
    const prompt = args.positionals[1] ?? (process.stdin.isTTY ? undefined : await Bun.stdin.text());
    if (prompt !== undefined && prompt.trim() === "") {
      throw usage("the prompt is empty (give it as an argument or through a pipe)");
    }
    const progress = new ProgressLine();
    const source = await openSource(args, load, loaded, progress);
    try {
      const chat = new Chat(options, source, progress);
      return prompt === undefined ? await chat.interactive() : await chat.once(prompt);
    } finally {
      progress.clear();
      await source.close();
    }
  },
};

/** The node that runs on this machine, or the model opened here. */
async function openSource(
  args: Arguments,
  load: RunOptions,
  loaded: LoadedSettings,
  progress: ProgressLine,
): Promise<ChatSource> {
  const name = args.positionals[0] ?? DEFAULT_MODEL;
  const here = modelHere(name);
  const note = (text: string) => process.stderr.write(`caravan: ${text}\n`);
  if (!args.flag("here")) {
    const found = await findAnyNode(loaded, here === undefined ? name : nameAtNodes(here), note);
    if (found !== undefined) {
      const { node, url } = found;
      const ignored = Object.keys(RUN_OPTIONS).filter((name) => args.text(name) !== undefined);
      if (ignored.length > 0) {
        note(
          `--${ignored.join(", --")} has no effect on the node that runs at ${url} (--here loads the model)`,
        );
      }
      return node;
    }
  }
  const model = here ?? (await findOrPull(name));
  try {
    return await openHere(model, load, (fraction, detail) =>
      progress.show(`loading ${model.name}`, fraction, detail),
    );
  } finally {
    progress.clear();
  }
}

/** The model of this machine's disk; undefined: a node may have it all the same, a folder of its own or through its cluster. */
function modelHere(name: string): InstalledModel | undefined {
  try {
    return findModel(name);
  } catch (thrown) {
    // A folder that is not there is nothing that a node could know.
    if (asCaravanError(thrown).code === "model_not_found" && !/^[./~]/.test(name)) return undefined;
    throw thrown;
  }
}

/** A node with the model of that name: where the settings say, then wherever this user runs one, unless a port was asked for. */
async function findAnyNode(
  { settings, sources }: LoadedSettings,
  model: string,
  note: (text: string) => void,
): Promise<{ node: ChatSource; url: string } | undefined> {
  const apiKey = settings.api_keys[0] ?? settings.admin_keys[0];
  const named = `${settings.tls_cert === "" ? "http" : "https"}://${dialable(settings.host)}:${settings.port}`;
  const tls_cert = settings.tls_cert === "" ? undefined : settings.tls_cert;
  const places: NodeAddress[] = [{ url: named, apiKey, tls_cert }];
  if (sources.port === "default") {
    for (const { url, tls_cert } of await runningNodes())
      if (url !== named) places.push({ url, apiKey, tls_cert });
  }
  for (const place of places) {
    const node = await findNode(place, model, note);
    if (node !== undefined) return { node, url: place.url };
  }
  return undefined;
}

/** An address to reach a node that listens at `host`. */
function dialable(host: string): string {
  if (host === "0.0.0.0" || host === "::") return "127.0.0.1";
  return host.includes(":") ? `[${host}]` : host;
}

interface ChatOptions {
  sampling: SamplingRequest;
  maxTokens: number | undefined;
  system: string | undefined;
  quiet: boolean;
  /** Undefined: nothing is kept. */
  history: ChatHistory | undefined;
}

function chatOptions(args: Arguments): ChatOptions {
  const temperature = args.number("temperature", ...SAMPLING_RANGES.temperature);
  const topP = args.number("top-p", ...SAMPLING_RANGES.top_p);
  const seed = args.integer("seed", 0, Number.MAX_SAFE_INTEGER);
  return {
    sampling: {
      ...(temperature === undefined ? {} : { temperature }),
      ...(topP === undefined ? {} : { top_p: topP }),
      ...(seed === undefined ? {} : { seed }),
    },
    maxTokens: args.integer("max-tokens", 1, 2 ** 31),
    system: args.text("system"),
    quiet: args.flag("quiet"),
    history: args.flag("no-history") ? undefined : new ChatHistory(),
  };
}

class Chat {
  #messages: ChatMessage[] = [];
  #running: AbortController | undefined;

  constructor(
    private readonly options: ChatOptions,
    private readonly source: ChatSource,
    private readonly progress: ProgressLine,
  ) {
    this.#reset(options.system);
  }

  #reset(system: string | undefined): void {
    this.#messages = system === undefined ? [] : [{ role: "system", content: system }];
  }

  /** One answer; the exit code. */
  async once(prompt: string): Promise<number> {
    if (!this.options.quiet) this.#aside(`[${this.source.about}]\n`);
    return await this.#interruptible(async () => ((await this.#answer(prompt)) ? 0 : INTERRUPTED_EXIT_CODE));
  }

  async interactive(): Promise<number> {
    this.#aside(`caravan ${VERSION}: ${this.source.about}\n/help lists what you can type\n`);
    const { history } = this.options;
    const input = new TerminalInput({
      lines: history?.read() ?? [],
      onLine: (line) => history?.add(line),
    });
    if (history?.failure !== undefined)
      this.#aside(`what you type is not kept: ${history.failure.toText()}\n`);
    let interrupted = false;
    for (;;) {
      const typed = await input.read();
      if (typed.type === "end" || (typed.type === "interrupt" && interrupted)) return 0;
      interrupted = typed.type === "interrupt";
      if (typed.type === "interrupt") this.#aside("Ctrl-C again or Ctrl-D leaves\n");
      else if (!(await this.#turn(typed.text))) return 0;
    }
  }

  /** One message of the chat; false = leave. */
  async #turn(text: string): Promise<boolean> {
    if (text === "") return true;
    if (text === "/exit" || text === "/bye" || text === "/quit") return false;
    if (text === "/help" || text === "/?") process.stderr.write(CHAT_HELP);
    else if (text === "/clear") this.#reset(this.#systemMessage());
    else if (text === "/system") this.#aside(`${this.#systemMessage() ?? "there is no system message"}\n`);
    else if (text.startsWith("/system ")) this.#reset(text.slice("/system ".length).trim());
    else if (/^\/\w+$/.test(text)) this.#aside(`there is no ${text} (see /help)\n`);
    else await this.#interruptible(() => this.#say(text));
    return true;
  }

  async #say(text: string): Promise<void> {
    const before = this.#messages.length;
    try {
      await this.#answer(text);
    } catch (thrown) {
      this.#messages.length = before;
      const error = asCaravanError(thrown);
      const full = error.code === "context_length_exceeded" ? "\n  /clear begins a new conversation" : "";
      process.stderr.write(`caravan: ${error.toText()}${full}\n`);
    }
  }

  #systemMessage(): string | undefined {
    const first = this.#messages[0];
    return first?.role === "system" ? first.content : undefined;
  }

  /** Ctrl-C stops the answer while `work` runs. */
  async #interruptible<T>(work: () => Promise<T>): Promise<T> {
    const interrupt = () => this.#running?.abort();
    process.on("SIGINT", interrupt);
    try {
      return await work();
    } finally {
      process.off("SIGINT", interrupt);
    }
  }

  /** Streams one answer to stdout and keeps it in the conversation. False when it was interrupted. */
  async #answer(text: string): Promise<boolean> {
    this.#messages.push({ role: "user", content: text });
    const running = new AbortController();
    this.#running = running;
    const answer = { text: "" };
    let stats: AnswerStats | undefined;
    try {
      stats = await this.#stream(running.signal, answer);
    } catch (thrown) {
      if (!running.signal.aborted) throw thrown;
    } finally {
      this.progress.clear();
      this.#running = undefined;
      if (answer.text !== "" && !answer.text.endsWith("\n")) process.stdout.write("\n");
    }
    if (answer.text === "" && running.signal.aborted) this.#messages.pop();
    else this.#messages.push({ role: "assistant", content: answer.text });
    if (running.signal.aborted) this.#aside("[stopped]\n");
    else if (stats !== undefined && !this.options.quiet) this.#aside(`${speedLine(stats)}\n`);
    return !running.signal.aborted;
  }

  async #stream(signal: AbortSignal, answer: { text: string }): Promise<AnswerStats | undefined> {
    let stats: AnswerStats | undefined;
    const { sampling, maxTokens } = this.options;
    const shown = process.stdout.isTTY
      ? new WordWrap(
          (text) => process.stdout.write(text),
          () => process.stdout.columns,
        )
      : undefined;
    const limit = maxTokens === undefined ? {} : { maxTokens };
    for await (const event of this.source.answer(this.#messages, { sampling, signal, ...limit })) {
      switch (event.type) {
        case "loading":
          this.progress.show("the node loads the model", event.fraction);
          break;
        case "progress":
          this.progress.show(
            "reading the prompt",
            event.done / event.total,
            `${event.done} of ${event.total} tokens`,
          );
          break;
        case "text":
          this.progress.clear();
          answer.text += event.text;
          if (shown === undefined) process.stdout.write(event.text);
          else shown.push(event.text);
          break;
        case "done":
          stats = event.stats;
      }
    }
    return stats;
  }

  /** Says something beside the conversation: dim where a terminal shows it. */
  #aside(text: string): void {
    const plain = process.stderr.isTTY !== true || (process.env.NO_COLOR ?? "") !== "";
    process.stderr.write(plain ? text : `\x1b[2m${text}\x1b[0m`);
  }
}

function speedLine(stats: AnswerStats): string {
  const at = (value: number | undefined) => (value === undefined ? "" : ` at ${value.toFixed(1)} tokens/s`);
  const cached = stats.cachedTokens > 0 ? ` (${stats.cachedTokens} cached)` : "";
  const cut = stats.reason === "length" ? "; cut off at the limit" : "";
  return `[prompt ${stats.promptTokens} tokens${cached}${at(stats.promptSpeed)}; answer ${stats.completionTokens} tokens${at(stats.decodeSpeed)}${cut}]`;
}
