// POST /v1/completions: raw prompts, echo and scoring included.

import { CaravanError } from "../../errors.ts";
import type { GroupEvent } from "../generation-group.ts";
import { MAX_CHOICES } from "../generation-group.ts";
import { readJsonObject } from "../limits.ts";
import type { LoadedModel } from "../model-directory.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import {
  COMPLETION_MAX_TOKENS,
  resolveMaxTokens,
  resolveSampling,
  samplingOfChoice,
} from "../sampling-defaults.ts";
import { type ApiDependencies, type PreparedGeneration, serveGeneration } from "../serve-generation.ts";
import { prefillFrame } from "../sse.ts";
import { responseGrammar } from "../structured-output.ts";
import { type EchoedPrompt, echoPrompt, type ReplyEvent, replyEvents } from "./echo.ts";
import { completionLogprobs, type ShownToken } from "./logprobs.ts";
import { checkBias, checkTogether, checkTokenIds, invalid } from "./request-checks.ts";
import {
  COMPLETION_UNBUILT,
  type CompletionRequest,
  completionSchema,
  samplingOf,
  stopsOf,
} from "./schema.ts";
import { CompletionChunks, newReplyHead } from "./stream.ts";
import { UsageTotals } from "./usage.ts";

type Prompt = string | number[];

export function completionsRoute(deps: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context, deps.settings);
    const request = parseParameters(completionSchema, COMPLETION_UNBUILT, body);
    checkTogether(request);
    const n = request.n ?? 1;
    if (request.best_of !== undefined && request.best_of !== n) {
      throw new CaravanError(
        "unsupported_parameter",
        "best_of: choosing among more answers than n is not built yet.",
        {
          param: "best_of",
          hint: "Leave the parameter out.",
        },
      );
    }
    if (request.max_tokens === 0 && !request.echo)
      throw invalid("max_tokens", "0 is only for requests with echo: true.");
    const prompts = promptsOf(request.prompt);
    if (prompts.length * n > MAX_CHOICES) {
      throw invalid(
        "n",
        `${prompts.length} prompts with ${n} answers each are more than ${MAX_CHOICES} choices.`,
      );
    }
    return serveGeneration(
      context,
      deps,
      { model: request.model, stream: request.stream ?? false },
      (model, signal) => prepareCompletion(request, prompts, model, signal),
    );
  };
}

/** A list of numbers is one prompt; a list of strings or of lists is several. */
function promptsOf(prompt: CompletionRequest["prompt"]): Prompt[] {
  if (typeof prompt === "string") return [prompt];
  const [first] = prompt;
  return typeof first === "number" ? [prompt as number[]] : (prompt as Prompt[]);
}

/** Control tokens may be written by name: a raw prompt is where a client applies a template of its own. */
export async function encodePrompt(
  prompt: Prompt,
  model: LoadedModel,
  signal: AbortSignal,
): Promise<number[]> {
  if (typeof prompt !== "string") {
    checkTokenIds(prompt, model, "prompt");
    return prompt;
  }
  const ids = await model.text.encode(prompt, { specials: true, signal });
  const begun = model.beginIds.every((id, index) => ids[index] === id);
  if (!begun) return [...model.beginIds, ...ids];
  if (ids.length === 0) throw invalid("prompt", `it is empty, and ${model.id} has no token to begin with.`);
  return ids;
}

async function prepareCompletion(
  request: CompletionRequest,
  prompts: Prompt[],
  model: LoadedModel,
  signal: AbortSignal,
): Promise<PreparedGeneration> {
  const sampling = resolveSampling(samplingOf(request), model.defaults);
  checkBias(sampling.logit_bias, model, request.ignore_eos ?? false);
  const n = request.n ?? 1;
  const scoring = request.max_tokens === 0;
  const plans: PreparedGeneration["plans"] = [];
  const echoes: EchoedPrompt[] = [];
  for (const prompt of prompts) {
    const promptIds = await encodePrompt(prompt, model, signal);
    const asked = scoring ? 1 : request.max_tokens;
    const maxTokens = resolveMaxTokens(asked, model, promptIds.length, {
      fallback: COMPLETION_MAX_TOKENS,
      promptParam: "prompt",
    });
    if (request.echo)
      echoes.push(echoPrompt(promptIds, typeof prompt === "string" ? prompt : undefined, model));
    for (let index = 0; index < n; index += 1) {
      plans.push({ promptIds, sampling: samplingOfChoice(sampling, index), maxTokens });
    }
  }
  const wantsLogprobs = request.logprobs !== undefined;
  const grammar = responseGrammar(request.response_format);
  const reply = (events: AsyncIterable<GroupEvent>) =>
    replyEvents(events, { echoes, n, scoring, wantsLogprobs });
  return {
    plans,
    options: {
      stop: stopsOf(request),
      ignoreEos: request.ignore_eos ?? false,
      continues: prompts.some((prompt) => prompt !== ""),
      ...(grammar === undefined ? {} : { grammar }),
      ...(request.logprobs === undefined ? {} : { logprobs: request.logprobs }),
      ...(request.echo && wantsLogprobs ? { promptLogprobs: true } : {}),
    },
    frames: (events) => completionFrames(reply(events), request, model),
    whole: (events) => completionReply(reply(events), plans.length, request, model),
    ...(scoring && !wantsLogprobs ? { events: () => unscored(plans) } : {}),
  };
}

/** max_tokens 0 without logprobs: the prompt comes back and the engine has nothing to do. */
async function* unscored(plans: PreparedGeneration["plans"]): AsyncGenerator<GroupEvent, void, void> {
  for (const [index, { promptIds }] of plans.entries()) {
    const usage = { prompt_tokens: promptIds.length, completion_tokens: 0, cached_tokens: 0 };
    yield { index, event: { type: "finish", reason: "length", usage, timing: undefined } };
  }
}

async function* completionFrames(
  events: AsyncIterable<ReplyEvent>,
  request: CompletionRequest,
  model: LoadedModel,
): AsyncGenerator<string, void, void> {
  const includeUsage = request.stream_options?.include_usage === true;
  const chunks = new CompletionChunks(newReplyHead("cmpl-", model), includeUsage);
  const totals = new UsageTotals(request.n ?? 1);
  for await (const event of events) {
    if (event.type === "progress") {
      yield prefillFrame(event.done, event.total);
    } else if (event.type === "text") {
      const logprobs =
        request.logprobs === undefined ? undefined : completionLogprobs(model.text, event.tokens);
      yield chunks.text(event.index, event.text, logprobs);
    } else {
      totals.add(event.index, event.usage);
      yield chunks.finish(event.index, event.reason);
    }
  }
  if (includeUsage) yield chunks.usage(totals.body());
  yield chunks.done;
}

async function completionReply(
  events: AsyncIterable<ReplyEvent>,
  count: number,
  request: CompletionRequest,
  model: LoadedModel,
): Promise<object> {
  const totals = new UsageTotals(request.n ?? 1);
  const choices = Array.from({ length: count }, () => ({ text: "", tokens: [] as ShownToken[], reason: "" }));
  for await (const event of events) {
    const choice = event.type === "progress" ? undefined : choices[event.index];
    if (choice === undefined) continue;
    if (event.type === "text") {
      choice.text += event.text;
      choice.tokens.push(...event.tokens);
    } else if (event.type === "finish") {
      choice.reason = event.reason;
      totals.add(event.index, event.usage);
    }
  }
  const head = newReplyHead("cmpl-", model);
  return {
    id: head.id,
    object: "text_completion",
    created: head.created,
    model: head.model,
    system_fingerprint: head.fingerprint,
    choices: choices.map(({ text, tokens, reason }, index) => ({
      index,
      text,
      logprobs: request.logprobs === undefined ? null : completionLogprobs(model.text, tokens),
      finish_reason: reason,
    })),
    usage: totals.body(),
  };
}
