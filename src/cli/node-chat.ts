// Answers from the node that already runs on this machine, over its OpenAI API: the model is in memory once, however
// many terminals talk to it.

import * as v from "valibot";
import type { ChatMessage } from "../api/model-directory.ts";
import { CaravanError } from "../errors.ts";
import type { InstalledModel } from "../model/store.ts";
import { folderAlias } from "../node/folder-alias.ts";
import { askNode } from "../node/running-nodes.ts";
import { type AnswerEvent, type AnswerOptions, type ChatSource, speed } from "./chat-source.ts";

/** Where nobody listens that is known at once. A node may be busy, and a second copy of its model costs more than a wait. */
const FIND_LIMIT_MS = 5000;
/** How far the model is loaded need not be known. */
const PROGRESS_LIMIT_MS = 500;
/** Between two questions how far the node's loading is. */
const POLL_MS = 300;

const MODEL = v.object({
  id: v.string(),
  object: v.literal("model"),
  state: v.string(),
  context_length: v.optional(v.number()),
  progress: v.optional(v.number()),
});

const ERROR = v.object({
  error: v.object({ message: v.string(), code: v.nullish(v.string()) }),
});

const CHUNK = v.union([
  ERROR,
  v.object({
    choices: v.array(
      v.object({
        delta: v.object({ content: v.nullish(v.string()) }),
        finish_reason: v.nullish(v.string()),
      }),
    ),
    usage: v.nullish(
      v.object({
        prompt_tokens: v.number(),
        completion_tokens: v.number(),
        prompt_tokens_details: v.optional(v.object({ cached_tokens: v.optional(v.number()) })),
      }),
    ),
  }),
]);

export interface NodeAddress {
  url: string;
  /** PEM file of its certificate. */
  tls_cert?: string | undefined;
  apiKey: string | undefined;
}

/** What a node calls the model of this machine's disk. */
export function nameAtNodes(model: InstalledModel): string {
  return model.source === "folder" ? folderAlias(model.path) : model.name;
}

/** The node as a source of answers for the model of that name; undefined when none listens there or it does not have the
 * model. A node that refuses the key is told to `onNote`. */
export async function findNode(
  address: NodeAddress,
  name: string,
  onNote: (text: string) => void,
): Promise<ChatSource | undefined> {
  let reply: Response;
  try {
    reply = await ask(address, `/v1/models/${name.split("/").map(encodeURIComponent).join("/")}`, {
      signal: AbortSignal.timeout(FIND_LIMIT_MS),
    });
  } catch (thrown) {
    if (thrown instanceof DOMException && thrown.name === "TimeoutError")
      onNote(
        `what listens at ${address.url} has not answered for ${FIND_LIMIT_MS / 1000} s and is left alone`,
      );
    return undefined; // nobody listens there, or somebody who does not speak HTTP
  }
  if (reply.status === 401) {
    onNote(`the node at ${address.url} wants an API key (CARAVAN_API_KEYS) and is left alone`);
    return undefined;
  }
  const found = v.safeParse(MODEL, reply.ok ? await reply.json().catch(() => undefined) : undefined);
  if (!found.success) return undefined;
  const { id, context_length: context } = found.output;
  return {
    about: `${id}, answered by the node at ${address.url}${context === undefined ? "" : `, context ${context} tokens`}`,
    answer: (messages, options) => new NodeAnswer(address, id, options).events(messages),
    close: async () => undefined,
  };
}

function ask(address: NodeAddress, path: string, init: RequestInit): Promise<Response> {
  const key = address.apiKey === undefined ? {} : { authorization: `Bearer ${address.apiKey}` };
  return askNode(address, path, { ...init, headers: { "content-type": "application/json", ...key } });
}

class NodeAnswer {
  constructor(
    private readonly address: NodeAddress,
    private readonly model: string,
    private readonly options: AnswerOptions,
  ) {}

  async *events(messages: readonly ChatMessage[]): AsyncGenerator<AnswerEvent> {
    const { sampling, maxTokens } = this.options;
    const body = JSON.stringify({
      model: this.model,
      messages,
      ...sampling,
      ...(maxTokens === undefined ? {} : { max_completion_tokens: maxTokens }),
      stream: true,
      stream_options: { include_usage: true },
    });
    for (;;) {
      const reply = yield* this.#post(body);
      if (reply.ok && reply.body !== null) return yield* this.#read(reply.body);
      const error = await this.#replyError(reply);
      // A model that takes longer to load than the node lets a request wait.
      if (error.code !== "model_loading") throw error;
    }
  }

  /** Sends the request; until the reply begins, tells how far the model is loaded. */
  async *#post(body: string): AsyncGenerator<AnswerEvent, Response> {
    const { signal } = this.options;
    const pending = ask(this.address, "/v1/chat/completions", { method: "POST", signal, body }).catch(
      (thrown) => this.#lost(thrown),
    );
    for (;;) {
      const reply = await Promise.race([pending, Bun.sleep(POLL_MS)]);
      if (reply instanceof Response) return reply;
      const fraction = await this.#loadProgress();
      if (fraction !== undefined) yield { type: "loading", fraction };
    }
  }

  /** 0 to 1 while the model loads. */
  async #loadProgress(): Promise<number | undefined> {
    try {
      const reply = await ask(this.address, `/v1/models/${this.model}`, {
        signal: AbortSignal.timeout(PROGRESS_LIMIT_MS),
      });
      const found = v.safeParse(MODEL, await reply.json());
      return found.success && found.output.state === "loading" ? found.output.progress : undefined;
    } catch {
      return undefined; // the request itself tells what is wrong
    }
  }

  async *#read(body: ReadableStream<Uint8Array>): AsyncGenerator<AnswerEvent> {
    const started = performance.now();
    let firstAt: number | undefined;
    let reason = "stop";
    for await (const line of this.#lines(body)) {
      const prefill = /^: prefill (\d+)\/(\d+)$/.exec(line);
      if (prefill !== null) {
        yield { type: "progress", done: Number(prefill[1]), total: Number(prefill[2]) };
        continue;
      }
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const chunk = this.#chunk(line.slice("data: ".length));
      const choice = chunk.choices[0];
      const text = choice?.delta.content ?? "";
      if (text !== "") {
        firstAt ??= performance.now();
        yield { type: "text", text };
      }
      reason = choice?.finish_reason ?? reason;
      if (!chunk.usage) continue;
      const { prompt_tokens, completion_tokens, prompt_tokens_details } = chunk.usage;
      const cached = prompt_tokens_details?.cached_tokens ?? 0;
      const first = firstAt ?? performance.now();
      yield {
        type: "done",
        stats: {
          promptTokens: prompt_tokens,
          cachedTokens: cached,
          completionTokens: completion_tokens,
          reason,
          ...speed("promptSpeed", prompt_tokens - cached, first - started),
          ...speed("decodeSpeed", completion_tokens - 1, performance.now() - first),
        },
      };
    }
    throw this.#gone();
  }

  #chunk(text: string) {
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch (cause) {
      throw new CaravanError("engine_failed", "the node sent something that is not JSON", {
        where: this.address.url,
        cause,
      });
    }
    const chunk = v.parse(CHUNK, value);
    if ("error" in chunk) throw this.#error(chunk.error);
    return chunk;
  }

  async *#lines(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
    const decoder = new TextDecoder();
    let rest = "";
    try {
      for await (const bytes of body) {
        const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n");
        rest = lines.pop() ?? "";
        yield* lines;
      }
    } catch (thrown) {
      this.#lost(thrown);
    }
  }

  #lost(thrown: unknown): never {
    if (thrown instanceof CaravanError) throw thrown;
    this.options.signal.throwIfAborted();
    throw this.#gone(thrown);
  }

  #gone(cause?: unknown): CaravanError {
    return new CaravanError("engine_failed", "the node went away before the answer was complete", {
      where: this.address.url,
      ...(cause === undefined ? {} : { cause }),
    });
  }

  #error({ message, code }: v.InferOutput<typeof ERROR>["error"]): CaravanError {
    return CaravanError.fromJSON({ code: code ?? "engine_failed", message, where: this.address.url });
  }

  async #replyError(reply: Response): Promise<CaravanError> {
    const text = await reply.text();
    try {
      return this.#error(v.parse(ERROR, JSON.parse(text)).error);
    } catch {
      return new CaravanError("engine_failed", `the node answered ${reply.status}: ${text.slice(0, 200)}`, {
        where: this.address.url,
      });
    }
  }
}
