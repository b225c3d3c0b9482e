// POST /api/chat and /api/generate. Streams unless told not to, as Ollama does.

import type { GrammarSpec } from "../../grammar/spec.ts";
import { requireScope } from "../auth.ts";
import { readJsonObject } from "../limits.ts";
import type { ChatMessage, ChatTool, ChatToolCall, LoadedModel } from "../model-directory.ts";
import { encodePrompt } from "../openai/completions.ts";
import { checkMessageCount, invalid } from "../openai/request-checks.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import { resolveMaxTokens, resolveSampling } from "../sampling-defaults.ts";
import { type ApiDependencies, type PreparedGeneration, serveGeneration } from "../serve-generation.ts";
import { answerGrammar, schemaGrammar } from "../structured-output.ts";
import { toolGenerationOptions, withToolCalls } from "../tool-answers.ts";
import { modelName } from "./models.ts";
import {
  chatPiece,
  generatePiece,
  loadedReply,
  OLLAMA_WIRE,
  ollamaFrames,
  ollamaReply,
  type PieceOf,
} from "./reply.ts";
import {
  CHAT_UNBUILT,
  chatSchema,
  checkContext,
  cleanMessages,
  GENERATE_UNBUILT,
  generateSchema,
  maxTokensOf,
  type OllamaChatRequest,
  type OllamaGenerateRequest,
  samplingOf,
  stopsOf,
} from "./schema.ts";

type PromptOf = (model: LoadedModel, signal: AbortSignal) => Promise<number[]>;

export function ollamaChatRoute(deps: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context, deps.settings);
    if (body.messages !== undefined) body.messages = cleanMessages(body.messages);
    const request = parseParameters(chatSchema, CHAT_UNBUILT, body);
    const messages = toChatMessages(request.messages ?? []);
    if (messages.length === 0) return load(context, deps, request, chatPiece);
    const tools = offered(request);
    const input = { messages, addGenerationPrompt: true, ...(tools.length === 0 ? {} : { tools }) };
    const promptOf: PromptOf = async (model, signal) => {
      checkMessageCount(messages, model);
      return (await model.text.renderChat(input, { signal })).ids;
    };
    return serve(context, deps, request, { promptOf, promptParam: "messages", tools, piece: chatPiece });
  };
}

export function ollamaGenerateRoute(deps: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context, deps.settings);
    const request = parseParameters(generateSchema, GENERATE_UNBUILT, body);
    const { prompt = "", system = "", raw = false } = request;
    if (prompt === "") return load(context, deps, request, generatePiece);
    if (raw && system !== "") throw invalid("system", "a raw prompt is used as it is.");
    const messages: ChatMessage[] = system === "" ? [] : [{ role: "system", content: system }];
    messages.push({ role: "user", content: prompt });
    const promptOf: PromptOf = async (model, signal) =>
      raw
        ? encodePrompt(prompt, model, signal)
        : (await model.text.renderChat({ messages, addGenerationPrompt: true }, { signal })).ids;
    return serve(context, deps, request, {
      promptOf,
      promptParam: "prompt",
      tools: [],
      piece: generatePiece,
      continues: raw,
    });
  };
}

/** A request without a prompt waits until the model is loaded; with keep_alive 0, until it is unloaded. */
async function load(
  context: ApiContext,
  deps: ApiDependencies,
  request: { model: string; keep_alive?: string | number | undefined },
  piece: PieceOf,
): Promise<Response> {
  context.env?.keepOpen?.();
  if (isNow(request.keep_alive)) {
    requireScope(context.get("scope"), "administration");
    const name = modelName(request.model);
    await deps.models.unload(name);
    return Response.json({ ...loadedReply(name, piece), done_reason: "unload" });
  }
  const model = await deps.models.find(modelName(request.model), { signal: context.req.raw.signal });
  return Response.json(loadedReply(model.id, piece));
}

/** A keep_alive of nothing: 0, "0", "0s". */
function isNow(keepAlive: string | number | undefined): boolean {
  return keepAlive === 0 || (typeof keepAlive === "string" && /^0+[a-z]*$/.test(keepAlive));
}

async function serve(
  context: ApiContext,
  deps: ApiDependencies,
  request: OllamaChatRequest | OllamaGenerateRequest,
  how: { promptOf: PromptOf; promptParam: string; tools: ChatTool[]; piece: PieceOf; continues?: boolean },
): Promise<Response> {
  const { options } = request;
  const { tools, piece } = how;
  const prepare = async (model: LoadedModel, signal: AbortSignal): Promise<PreparedGeneration> => {
    checkContext(options, model.contextLength);
    const promptIds = await how.promptOf(model, signal);
    const { promptParam } = how;
    const maxTokens = resolveMaxTokens(maxTokensOf(options), model, promptIds.length, { promptParam });
    const form = formOf(request, tools);
    const answers = { tools, parallel: true, ...form };
    return {
      plans: [{ promptIds, maxTokens, sampling: resolveSampling(samplingOf(options), model.defaults) }],
      options: {
        stop: stopsOf(options),
        continues: how.continues ?? false,
        ...toolGenerationOptions(tools),
        ...form,
      },
      frames: (events) => ollamaFrames(withToolCalls(events, answers), model.id, piece),
      whole: (events) => ollamaReply(withToolCalls(events, answers), model.id, piece),
    };
  };
  const model = modelName(request.model);
  return serveGeneration(
    context,
    deps,
    { model, stream: request.stream ?? true, wire: OLLAMA_WIRE },
    prepare,
  );
}

/** What the answer has to follow. */
function formOf(
  { format = "" }: { format?: string | object | undefined },
  tools: ChatTool[],
): { grammar?: GrammarSpec } {
  if (format === "") return {};
  return answerGrammar(schemaGrammar(format === "json" ? undefined : format, "format"), {
    tools: tools.map(({ function: { name, parameters } }, index) => ({
      ...{ name, parameters, strict: false },
      param: `tools[${index}].function.parameters`,
    })),
    ...{ choice: "auto", param: "tools", parallel: true },
  });
}

/** Ollama's clients need not name calls: those without an id get one by their place. */
function toChatMessages(messages: NonNullable<OllamaChatRequest["messages"]>): ChatMessage[] {
  return messages.map((message, index): ChatMessage => {
    if (message.role === "tool") {
      const { content, tool_name, tool_call_id } = message;
      return {
        role: "tool",
        content,
        ...(tool_name == null ? {} : { name: tool_name }),
        ...(tool_call_id == null ? {} : { tool_call_id }),
      };
    }
    const content = message.content ?? "";
    if (message.role !== "assistant") return { role: message.role, content };
    const calls = (message.tool_calls ?? []).map(
      ({ id, function: called }, number): ChatToolCall => ({
        id: id ?? `call_${index}_${number}`,
        type: "function",
        function: { name: called.name, arguments: JSON.stringify(called.arguments) },
      }),
    );
    return { role: "assistant", content, ...(calls.length === 0 ? {} : { tool_calls: calls }) };
  });
}

function offered({ tools = [] }: OllamaChatRequest): ChatTool[] {
  const names = new Set<string>();
  return tools.map(({ function: { name, description, parameters } }, index) => {
    if (names.has(name)) throw invalid(`tools[${index}].function.name`, `${name} is there twice.`);
    names.add(name);
    return {
      type: "function",
      function: {
        name,
        ...(description == null ? {} : { description }),
        ...(parameters == null ? {} : { parameters }),
      },
    };
  });
}
