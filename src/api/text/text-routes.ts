// POST /v1/tokenize, /v1/detokenize and /v1/apply-template: a model's text work without its arithmetic. What they say is
// exactly what generation would use.

import * as v from "valibot";
import { readJsonObject } from "../limits.ts";
import type { LoadedModel } from "../model-directory.ts";
import { offeredTools, toChatMessages } from "../openai/messages.ts";
import { checkMessageCount, checkTokenIds, invalid } from "../openai/request-checks.ts";
import { messageSchema, refuseUnbuiltMessages, refuseUnbuiltTools, toolsSchema } from "../openai/schema.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import type { ApiDependencies } from "../serve-generation.ts";

const model = v.pipe(v.string(), v.minLength(1), v.maxLength(512));
const chatEntries = {
  tools: v.optional(toolsSchema),
  /** End with the header that makes the model answer (default true). */
  add_generation_prompt: v.optional(v.boolean()),
};
const messages = v.pipe(v.array(messageSchema), v.minLength(1));

export const tokenizeSchema = v.strictObject({
  model,
  prompt: v.optional(v.string()),
  messages: v.optional(messages),
  ...chatEntries,
  /** For a prompt: put the model's begin tokens before it (default true). */
  add_special_tokens: v.optional(v.boolean()),
  /** For a prompt: names of control tokens become those tokens (default true, as in raw prompts). */
  parse_special: v.optional(v.boolean()),
});
export const templateSchema = v.strictObject({ model, messages, ...chatEntries });
export const detokenizeSchema = v.strictObject({
  model,
  tokens: v.array(v.pipe(v.number(), v.safeInteger(), v.minValue(0))),
});

type ChatInput = Omit<v.InferOutput<typeof templateSchema>, "model">;

/** Reads the body, finds the model and answers; the client's leaving ends the wait. */
function textRoute<Request extends { model: string }>(
  { models, settings }: ApiDependencies,
  parse: (body: Record<string, unknown>) => Request,
  answer: (request: Request, model: LoadedModel, signal: AbortSignal) => Promise<object> | object,
) {
  return async (context: ApiContext): Promise<Response> => {
    const { signal } = context.req.raw;
    const request = parse(await readJsonObject(context, settings));
    context.env?.keepOpen?.();
    const found = await models.find(request.model, { signal });
    return Response.json(await answer(request, found, signal));
  };
}

function render(request: ChatInput, found: LoadedModel, signal: AbortSignal) {
  checkMessageCount(request.messages, found);
  const tools = offeredTools(request);
  const input = {
    messages: toChatMessages(request.messages),
    addGenerationPrompt: request.add_generation_prompt ?? true,
  };
  return found.text.renderChat(tools.length === 0 ? input : { ...input, tools }, { signal });
}

function refuseUnbuilt(body: Record<string, unknown>): void {
  refuseUnbuiltMessages(body.messages);
  refuseUnbuiltTools(body);
}

function parseTokenize(body: Record<string, unknown>): v.InferOutput<typeof tokenizeSchema> {
  refuseUnbuilt(body);
  const request = parseParameters(tokenizeSchema, {}, body);
  if ((request.prompt === undefined) === (request.messages === undefined))
    throw invalid("prompt", "either a prompt or messages, not both and not neither.");
  const others =
    request.prompt === undefined
      ? (["add_special_tokens", "parse_special"] as const)
      : (["tools", "add_generation_prompt"] as const);
  for (const name of others) {
    if (request[name] !== undefined)
      throw invalid(name, `this is only for ${request.prompt === undefined ? "a prompt" : "messages"}.`);
  }
  return request;
}

export function tokenizeRoute(deps: ApiDependencies) {
  return textRoute(deps, parseTokenize, async (request, found, signal) => {
    let tokens: number[];
    if (request.messages !== undefined)
      tokens = (await render({ ...request, messages: request.messages }, found, signal)).ids;
    else {
      const specials = request.parse_special ?? true;
      tokens = await found.text.encode(request.prompt ?? "", { specials, signal });
      const begun = found.beginIds.every((id, index) => tokens[index] === id);
      if (request.add_special_tokens !== false && !begun) tokens = [...found.beginIds, ...tokens];
    }
    return { tokens, count: tokens.length, max_model_len: found.contextLength };
  });
}

export function detokenizeRoute(deps: ApiDependencies) {
  return textRoute(
    deps,
    (body) => parseParameters(detokenizeSchema, {}, body),
    ({ tokens }, found) => {
      checkTokenIds(tokens, found, "tokens");
      return { prompt: found.text.decode(tokens) };
    },
  );
}

export function applyTemplateRoute(deps: ApiDependencies) {
  return textRoute(
    deps,
    (body) => {
      refuseUnbuilt(body);
      return parseParameters(templateSchema, {}, body);
    },
    async (request, found, signal) => ({ prompt: (await render(request, found, signal)).text }),
  );
}
