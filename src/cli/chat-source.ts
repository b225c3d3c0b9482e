// Where `caravan run` gets its answers: from the model opened in this process (here), or from a node that already runs
// on this machine (node-chat.ts). Both look the same to the terminal.

import { generate } from "../api/generation.ts";
import type { ChatMessage } from "../api/model-directory.ts";
import { resolveMaxTokens, resolveSampling, type SamplingRequest } from "../api/sampling-defaults.ts";
import type { EngineStatus } from "../engine/protocol.ts";
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
  /** Prefill and decode speed in tokens a second, where they were measured. */
  promptSpeed?: number;
  decodeSpeed?: number;
}

export type AnswerEvent =
  /** The node is loading the model; 0 to 1. */
  | { type: "loading"; fraction: number }
  /** Tokens of the prompt that have been read. */
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
  const open = await openModel(model, { ...options, onProgress });
  const status = open.engine.status();
  return {
    about: `${model.name} on ${place(status)}, context ${status.context} tokens`,
    answer: (messages, answerOptions) => answerHere(open, messages, answerOptions),
    close: () => open.close(),
  };
}

/** Where it runs; on a Mac also why not on its GPU. */
function place({ device, device_reason, cpu, threads }: EngineStatus): string {
  if (device === "metal") return device_reason ?? "the GPU";
  if (process.platform === "darwin" && device_reason !== undefined) return device_reason;
  return `${device ?? "cpu"}${cpu === undefined ? "" : ` (${cpu}, ${threads} threads)`}`;
}

async function* answerHere(
  open: OpenModel,
  messages: readonly ChatMessage[],
  { sampling, maxTokens, signal }: AnswerOptions,
): AsyncGenerator<AnswerEvent> {
  const chat = { messages: [...messages], addGenerationPrompt: true };
  const prompt = await open.text.renderChat(chat, { signal });
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
          ...speed("promptSpeed", computed, timing?.prefill_ms),
          ...speed("decodeSpeed", usage.completion_tokens - 1, timing?.decode_ms),
        },
      };
    }
  }
}

/** `tokens` a second under `name`; nothing where there is nothing to measure. */
export function speed<Name extends "promptSpeed" | "decodeSpeed">(
  name: Name,
  tokens: number,
  ms: number | undefined,
): { [key in Name]?: number } {
  if (ms === undefined || ms <= 0 || tokens <= 0) return {};
  return { [name]: (tokens * 1000) / ms } as { [key in Name]?: number };
}
