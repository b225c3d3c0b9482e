// POST /v1/chat/completions.

import type { GrammarSpec } from "../../grammar/spec.ts";
import { readJsonObject } from "../limits.ts";
import type { ChatToolCall, LoadedModel } from "../model-directory.ts";
import { parseParameters, unsupported } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import { resolveMaxTokens, resolveSampling, samplingOfChoice } from "../sampling-defaults.ts";
import { type ApiDependencies, type PreparedGeneration, serveGeneration } from "../serve-generation.ts";
import { prefillFrame } from "../sse.ts";
import { answerGrammar, responseGrammar } from "../structured-output.ts";
import {
  type GroupAnswerEvent,
  type ToolAnswerOptions,
  toolGenerationOptions,
  withToolCalls,
} from "../tool-answers.ts";
import { chatLogprobs, type ShownToken } from "./logprobs.ts";
import { offeredTools, toChatMessages } from "./messages.ts";
import { checkBias, checkMessageCount, checkTogether, invalid } from "./request-checks.ts";
import {
  CHAT_UNBUILT,
  type ChatRequest,
  chatSchema,
  refuseUnbuiltMessages,
  refuseUnbuiltTools,
  samplingOf,
  stopsOf,
} from "./schema.ts";
import { ChatChunks, newReplyHead } from "./stream.ts";
import { UsageTotals } from "./usage.ts";

export function chatRoute(deps: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context, deps.settings);
    refuseUnbuiltMessages(body.messages);
    refuseUnbuiltTools(body);
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

async function prepareChat(
  request: ChatRequest,
  model: LoadedModel,
  signal: AbortSignal,
): Promise<PreparedGeneration> {
  const sampling = resolveSampling(samplingOf(request), model.defaults);
  checkBias(sampling.logit_bias, model, request.ignore_eos ?? false);
  const tools = offeredTools(request);
  if (tools.length > 0 && request.logprobs) throw unsupported("logprobs", "log-probabilities beside tools");
  checkMessageCount(request.messages, model);
  const form = formOf(request);
  const answers: ToolAnswerOptions = { tools, parallel: request.parallel_tool_calls ?? true, ...form };
  const prompt = await model.text.renderChat(
    {
      messages: toChatMessages(request.messages),
      addGenerationPrompt: true,
      ...(tools.length === 0 ? {} : { tools }),
    },
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
      ...toolGenerationOptions(tools),
      ...form,
      ...(request.logprobs ? { logprobs: request.top_logprobs ?? 0 } : {}),
    },
    frames: (events) => chatFrames(withToolCalls(events, answers), request, model),
    whole: (events) => chatReply(withToolCalls(events, answers), request, model),
  };
}

/** What the answer has to follow. */
function formOf(request: ChatRequest): { grammar?: GrammarSpec } {
  const { tools = [], tool_choice: choice = "auto", parallel_tool_calls: parallel = true } = request;
  return answerGrammar(responseGrammar(request.response_format), {
    tools: tools.map(({ function: called }, index) => ({
      name: called.name,
      parameters: called.parameters,
      strict: called.strict === true,
      param: `tools[${index}].function.parameters`,
    })),
    choice: typeof choice === "string" ? choice : { name: choice.function.name },
    param: "tool_choice",
    parallel,
  });
}

async function* chatFrames(
  events: AsyncIterable<GroupAnswerEvent>,
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
    } else if (event.type === "call") {
      yield chunks.toolCall(index, event.call, event.id, event.name);
    } else if (event.type === "arguments") {
      yield chunks.toolArguments(index, event.call, event.json);
    } else {
      totals.add(index, event.usage);
      yield chunks.finish(index, event.reason);
    }
  }
  if (includeUsage) yield chunks.usage(totals.body());
  yield chunks.done;
}

async function chatReply(
  events: AsyncIterable<GroupAnswerEvent>,
  request: ChatRequest,
  model: LoadedModel,
): Promise<object> {
  const n = request.n ?? 1;
  const totals = new UsageTotals(n);
  const choices = Array.from({ length: n }, () => ({
    text: "",
    tokens: [] as ShownToken[],
    calls: [] as ChatToolCall[],
    reason: "",
  }));
  for await (const { index, event } of events) {
    const choice = choices[index];
    if (choice === undefined) continue;
    if (event.type === "text") {
      choice.text += event.text;
      choice.tokens.push(...event.tokens);
    } else if (event.type === "call") {
      choice.calls.push({ id: event.id, type: "function", function: { name: event.name, arguments: "" } });
    } else if (event.type === "arguments") {
      const call = choice.calls[event.call];
      if (call !== undefined) call.function.arguments += event.json;
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
    choices: choices.map(({ text, tokens, calls, reason }, index) => ({
      index,
      message: {
        role: "assistant",
        content: calls.length > 0 && text === "" ? null : text,
        refusal: null,
        ...(calls.length > 0 ? { tool_calls: calls } : {}),
      },
      logprobs: request.logprobs ? chatLogprobs(model.text, tokens) : null,
      finish_reason: reason,
    })),
    usage: totals.body(),
  };
}
