// POST /v1/messages and /v1/messages/count_tokens.

import type { GrammarSpec } from "../../grammar/spec.ts";
import { readJsonObject } from "../limits.ts";
import type { LoadedModel } from "../model-directory.ts";
import { checkMessageCount } from "../openai/request-checks.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import { resolveMaxTokens, resolveSampling } from "../sampling-defaults.ts";
import { type ApiDependencies, type PreparedGeneration, serveGeneration } from "../serve-generation.ts";
import { answerGrammar, schemaGrammar } from "../structured-output.ts";
import { toolGenerationOptions, withToolCalls } from "../tool-answers.ts";
import { anthropicErrorFrame } from "./errors.ts";
import { promptOf } from "./prompt.ts";
import { messageFrames, messageReply } from "./reply.ts";
import {
  countSchema,
  MESSAGES_UNBUILT,
  type MessagesRequest,
  messagesSchema,
  refuseUnbuilt,
} from "./schema.ts";

export function messagesRoute(deps: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context, deps.settings);
    refuseUnbuilt(body);
    const request = parseParameters(messagesSchema, MESSAGES_UNBUILT, body);
    return serveGeneration(
      context,
      deps,
      { model: request.model, stream: request.stream ?? false, wire: { errorFrame: anthropicErrorFrame } },
      (model, signal) => prepare(request, model, signal),
    );
  };
}

async function prepare(
  request: MessagesRequest,
  model: LoadedModel,
  signal: AbortSignal,
): Promise<PreparedGeneration> {
  const { temperature, top_p, top_k } = request;
  const asked = Object.entries({ temperature, top_p, top_k }).filter(([, value]) => value !== undefined);
  const { input, tools } = promptOf(request);
  checkMessageCount(input.messages, model);
  const { ids } = await model.text.renderChat(input, { signal });
  const maxTokens = resolveMaxTokens(request.max_tokens, model, ids.length, { promptParam: "messages" });
  const form = formOf(request);
  const answers = { tools, parallel: request.tool_choice?.disable_parallel_tool_use !== true, ...form };
  return {
    plans: [
      { promptIds: ids, maxTokens, sampling: resolveSampling(Object.fromEntries(asked), model.defaults) },
    ],
    options: { stop: request.stop_sequences ?? [], ...toolGenerationOptions(tools), ...form },
    frames: (events) => messageFrames(withToolCalls(events, answers), model, ids.length),
    whole: (events) => messageReply(withToolCalls(events, answers), model),
  };
}

/** What the answer has to follow. */
function formOf({ tools = [], tool_choice, output_config }: MessagesRequest): { grammar?: GrammarSpec } {
  const type = tool_choice?.type ?? "auto";
  const schema = output_config?.format?.schema;
  const format = schema === undefined ? undefined : schemaGrammar(schema, "output_config.format.schema");
  return answerGrammar(format, {
    tools: tools.map(({ name, input_schema, strict }, index) => ({
      name,
      parameters: input_schema,
      strict: strict === true,
      param: `tools[${index}].input_schema`,
    })),
    choice:
      tool_choice?.type === "tool"
        ? { name: tool_choice.name }
        : type === "any"
          ? "required"
          : type === "none"
            ? "none"
            : "auto",
    param: "tool_choice",
    parallel: tool_choice?.disable_parallel_tool_use !== true,
  });
}

/** Counts as the model's own template and tokenizer make it of the messages; loads the model if need be. */
export function countTokensRoute({ models, settings }: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context, settings);
    refuseUnbuilt(body);
    const request = parseParameters(countSchema, MESSAGES_UNBUILT, body);
    const { signal } = context.req.raw;
    const model = await models.find(request.model, { signal });
    const { input } = promptOf(request);
    checkMessageCount(input.messages, model);
    const { ids } = await model.text.renderChat(input, { signal });
    return Response.json({ input_tokens: ids.length });
  };
}
