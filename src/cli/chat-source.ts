// Where `caravan run` gets its answers: from a node that already runs on this machine, or from the model opened in
// this process. Both look the same to the terminal.

import { generate } from "../api/generation.ts";
import type { ChatMessage } from "../api/model-directory.ts";
import { resolveMaxTokens, resolveSampling, type SamplingRequest } from "../api/sampling-defaults.ts";
import { CaravanError } from "../errors.ts";
import type { InstalledModel } from "../model/store.ts";
import { type OpenModel, openModel, type RunOptions } from "../node/open-model.ts";

export interface AnswerOptions {
  sampling: SamplingRequest;
  maxTokens?: number;
  signal: AbortSignal;
}

export interface AnswerStats {
  promptTokens: number;
  cachedTokens: number;
  completionTokens: number;
  reason: string;
  /** Prefill and decode speed in tokens a second, where the engine measured them. */
  promptSpeed?: number;
  decodeSpeed?: number;
}

export type AnswerEvent =
  | { type: "progress"; done: number; total: number }
  | { type: "text"; text: string }
  | { type: "done"; stats: AnswerStats };

export interface ChatSource {
  /** Shown before the first answer. */
  readonly about: string;
  answer(messages: readonly ChatMessage[], options: AnswerOptions): AsyncIterable<AnswerEvent>;
  close(): Promise<void>;
}

/** Opens the model in this process (with a runner of its own). */
export async function openHere(
  model: InstalledModel,
  options: RunOptions,
  onProgress: (fraction: number, detail: string) => void,
): Promise<ChatSource> {
  const open = await openModel(model, options, onProgress);
  const { context, device, cpu, threads } = open.engine.status();
  return {
    about: `${model.name} on ${device ?? "cpu"}${cpu === undefined ? "" : ` (${cpu}, ${threads} threads)`}, context ${context} tokens`,
    answer: (messages, answerOptions) => answerHere(open, messages, answerOptions),
    close: () => open.close(),
  };
}

async function* answerHere(
  open: OpenModel,
  messages: readonly ChatMessage[],
  { sampling, maxTokens, signal }: AnswerOptions,
): AsyncGenerator<AnswerEvent> {
  const prompt = await open.text.renderChat({ messages: [...messages], addGenerationPrompt: true });
  const limit = resolveMaxTokens(maxTokens, open, prompt.ids.length, { promptParam: "prompt" });
  const events = generate(open, prompt.ids, {
    sampling: resolveSampling(sampling, open.defaults),
    maxTokens: limit,
    signal,
  });
  for await (const event of events) {
    if (event.type === "progress") yield event;
    else if (event.type === "text") yield { type: "text", text: event.text };
    else if (event.type === "finish") {
      const { usage, timing } = event;
      const computed = usage.prompt_tokens - usage.cached_tokens;
      yield {
        type: "done",
        stats: {
          promptTokens: usage.prompt_tokens,
          cachedTokens: usage.cached_tokens,
          completionTokens: usage.completion_tokens,
          reason: event.reason,
          ...(timing === undefined || timing.prefill_ms <= 0
            ? {}
            : { promptSpeed: (computed * 1000) / timing.prefill_ms }),
          ...(timing === undefined || timing.decode_ms <= 0
            ? {}
            : { decodeSpeed: ((usage.completion_tokens - 1) * 1000) / timing.decode_ms }),
        },
      };
    }
  }
}

/** A node on this machine that can answer for the model, or undefined. */
export async function findNode(
  url: string,
  apiKey: string | undefined,
  model: string,
): Promise<ChatSource | undefined> {
  const headers: Record<string, string> = {
    "content-type": "application/json",
    ...(apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` }),
  };
  try {
    const reply = await fetch(`${url}/v1/models/${model}`, { headers, signal: AbortSignal.timeout(500) });
    if (!reply.ok) return undefined;
    const body: unknown = await reply.json();
    if (typeof body !== "object" || body === null || !("object" in body) || body.object !== "model")
      return undefined;
  } catch {
    return undefined; // nobody listens there, or somebody else does: the model is opened here
  }
  return {
    about: `${model}, answered by the node at ${url}`,
    answer: (messages, options) => answerThere(url, headers, model, messages, options),
    close: async () => undefined,
  };
}

async function* answerThere(
  url: string,
  headers: Record<string, string>,
  model: string,
  messages: readonly ChatMessage[],
  { sampling, maxTokens, signal }: AnswerOptions,
): AsyncGenerator<AnswerEvent> {
  const reply = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers,
    signal,
    body: JSON.stringify({
      model,
      messages,
      ...sampling,
      ...(maxTokens === undefined ? {} : { max_completion_tokens: maxTokens }),
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!reply.ok || reply.body === null) throw await replyError(reply, url);
  const started = performance.now();
  let firstAt = 0;
  let reason = "stop";
  for await (const data of serverSentData(reply.body)) {
    if (data.error !== undefined) {
      throw new CaravanError("engine_failed", data.error.message, { where: url });
    }
    const choice = data.choices?.[0];
    const text = choice?.delta?.content ?? "";
    if (text !== "") {
      if (firstAt === 0) firstAt = performance.now();
      yield { type: "text", text };
    }
    if (typeof choice?.finish_reason === "string") reason = choice.finish_reason;
    if (data.usage) {
      const { prompt_tokens, completion_tokens, prompt_tokens_details } = data.usage;
      const decodeMs = performance.now() - firstAt;
      yield {
        type: "done",
        stats: {
          promptTokens: prompt_tokens,
          cachedTokens: prompt_tokens_details?.cached_tokens ?? 0,
          completionTokens: completion_tokens,
          reason,
          ...(firstAt > started ? { promptSpeed: (prompt_tokens * 1000) / (firstAt - started) } : {}),
          ...(completion_tokens > 1 ? { decodeSpeed: ((completion_tokens - 1) * 1000) / decodeMs } : {}),
        },
      };
    }
  }
}

interface ChunkData {
  error?: { message: string };
  choices?: { delta?: { content?: string | null }; finish_reason?: string | null }[];
  usage?: {
    prompt_tokens: number;
    completion_tokens: number;
    prompt_tokens_details?: { cached_tokens?: number };
  } | null;
}

/** The `data:` objects of our own server's stream, until [DONE]. */
async function* serverSentData(body: ReadableStream<Uint8Array>): AsyncGenerator<ChunkData> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of body) {
    rest += decoder.decode(bytes, { stream: true });
    for (;;) {
      const end = rest.indexOf("\n");
      if (end < 0) break;
      const line = rest.slice(0, end);
      rest = rest.slice(end + 1);
      if (!line.startsWith("data: ")) continue;
      const payload = line.slice("data: ".length);
      if (payload === "[DONE]") return;
      yield JSON.parse(payload) as ChunkData;
    }
  }
}

async function replyError(reply: Response, url: string): Promise<CaravanError> {
  const text = await reply.text();
  let message = text;
  try {
    const body = JSON.parse(text) as { error?: { message?: string } };
    message = body.error?.message ?? text;
  } catch {
    // not JSON: the text itself is the message
  }
  return new CaravanError("engine_failed", `the node answered ${reply.status}: ${message}`, { where: url });
}
