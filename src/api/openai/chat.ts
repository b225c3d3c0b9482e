// POST /v1/chat/completions.

import type { GroupEvent } from "../generation-group.ts";
import { readJsonObject } from "../limits.ts";
import type { ChatMessage, LoadedModel } from "../model-directory.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import { resolveMaxTokens, resolveSampling, samplingOfChoice } from "../sampling-defaults.ts";
import { type ApiDependencies, type PreparedGeneration, serveGeneration } from "../serve-generation.ts";
import { prefillFrame } from "../sse.ts";
import { chatLogprobs, type ShownToken } from "./logprobs.ts";
import { checkTogether, checkTokenIds, invalid } from "./request-checks.ts";
import {
  CHAT_UNBUILT,
  type ChatRequest,
  chatSchema,
  refuseUnbuiltMessages,
  samplingOf,
  stopsOf,
} from "./schema.ts";
import { ChatChunks, newReplyHead } from "./stream.ts";
import { UsageTotals } from "./usage.ts";

export function chatRoute(deps: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context.req.raw, deps.settings);
    refuseUnbuiltMessages(body.messages);
    const request = parseParameters(chatSchema, CHAT_UNBUILT, body);
    checkTogether(request);
    if (request.top_logprobs !== undefined && request.logprobs !== true) {
      throw invalid("top_logprobs", "this is only for requests with logprobs: true.");
    }
    const { max_tokens: old, max_completion_tokens: limit } = request;
    if (old !== undefined && limit !== undefined && old !== limit) {
      throw invalid("max_tokens", "max_tokens and max_completion_tokens mean the same and differ.");
    }
    return serveGeneration(
      context,
      deps,
      { model: request.model, stream: request.stream ?? false },
      (model, signal) => prepareChat(request, model, signal),
    );
  };
}

function toChatMessage(message: ChatRequest["messages"][number]): ChatMessage {
  const { role, content } = message;
  return {
    role: role === "developer" ? "system" : role,
    content: typeof content === "string" ? content : content.map((part) => part.text).join(""),
  };
}

async function prepareChat(
  request: ChatRequest,
  model: LoadedModel,
  signal: AbortSignal,
): Promise<PreparedGeneration> {
  const sampling = resolveSampling(samplingOf(request), model.defaults);
  checkTokenIds(
    sampling.logit_bias.map(([id]) => id),
    model,
    "logit_bias",
  );
  const prompt = await model.text.renderChat(
    { messages: request.messages.map(toChatMessage), addGenerationPrompt: true },
    { signal },
  );
  const asked = request.max_completion_tokens ?? request.max_tokens;
  const maxTokens = resolveMaxTokens(asked, model, prompt.ids.length, { promptParam: "messages" });
  const n = request.n ?? 1;
  return {
    plans: Array.from({ length: n }, (_, index) => ({
      promptIds: prompt.ids,
      sampling: samplingOfChoice(sampling, index),
      maxTokens,
    })),
    options: {
      stop: stopsOf(request),
      ignoreEos: request.ignore_eos ?? false,
      ...(request.logprobs ? { logprobs: request.top_logprobs ?? 0 } : {}),
    },
    frames: (events) => chatFrames(events, request, model),
    whole: (events) => chatReply(events, request, model),
  };
}

async function* chatFrames(
  events: AsyncIterable<GroupEvent>,
  request: ChatRequest,
  model: LoadedModel,
): AsyncGenerator<string, void, void> {
  const includeUsage = request.stream_options?.include_usage === true;
  const chunks = new ChatChunks(newReplyHead("chatcmpl-", model), includeUsage);
  const totals = new UsageTotals(request.n ?? 1);
  const begun = new Set<number>();
  for await (const { index, event } of events) {
    if (event.type === "progress") {
      yield prefillFrame(event.done, event.total);
      continue;
    }
    if (event.type === "prompt_logprobs") continue;
    if (!begun.has(index)) {
      begun.add(index);
      yield chunks.role(index);
    }
    if (event.type === "text") {
      const logprobs = request.logprobs ? chatLogprobs(model.text, event.tokens) : undefined;
      yield chunks.content(index, event.text, logprobs);
    } else {
      totals.add(index, event.usage);
      yield chunks.finish(index, event.reason);
    }
  }
  if (includeUsage) yield chunks.usage(totals.body());
  yield chunks.done;
}

async function chatReply(
  events: AsyncIterable<GroupEvent>,
  request: ChatRequest,
  model: LoadedModel,
): Promise<object> {
  const n = request.n ?? 1;
  const totals = new UsageTotals(n);
  const choices = Array.from({ length: n }, () => ({ text: "", tokens: [] as ShownToken[], reason: "" }));
  for await (const { index, event } of events) {
    const choice = choices[index];
    if (choice === undefined) continue;
    if (event.type === "text") {
      choice.text += event.text;
      choice.tokens.push(...event.tokens);
    } else if (event.type === "finish") {
      choice.reason = event.reason;
      totals.add(index, event.usage);
    }
  }
  const head = newReplyHead("chatcmpl-", model);
  return {
    id: head.id,
    object: "chat.completion",
    created: head.created,
    model: head.model,
    system_fingerprint: head.fingerprint,
    choices: choices.map(({ text, tokens, reason }, index) => ({
      index,
      message: { role: "assistant", content: text, refusal: null },
      logprobs: request.logprobs ? chatLogprobs(model.text, tokens) : null,
      finish_reason: reason,
    })),
    usage: totals.body(),
  };
}
