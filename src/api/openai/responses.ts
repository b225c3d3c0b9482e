// POST /v1/responses: text and function calls, whole or as events. Nothing is kept between requests.

import type { GrammarSpec } from "../../grammar/spec.ts";
import { readJsonObject } from "../limits.ts";
import type { ChatMessage, ChatTool, LoadedModel } from "../model-directory.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import { resolveMaxTokens, resolveSampling } from "../sampling-defaults.ts";
import { type ApiDependencies, type PreparedGeneration, serveGeneration } from "../serve-generation.ts";
import { prefillFrame } from "../sse.ts";
import { answerGrammar, textGrammar } from "../structured-output.ts";
import { type GroupAnswerEvent, toolGenerationOptions, withToolCalls } from "../tool-answers.ts";
import { checkMessageCount, invalid } from "./request-checks.ts";
import { type ResponseEvent, ResponseOutput } from "./responses-output.ts";
import {
  RESPONSES_UNBUILT,
  type ResponsesRequest,
  refuseUnbuiltItems,
  responsesSchema,
} from "./responses-schema.ts";

export function responsesRoute(deps: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context, deps.settings);
    refuseUnbuiltItems(body);
    const request = parseParameters(responsesSchema, RESPONSES_UNBUILT, body);
    return serveGeneration(
      context,
      deps,
      { model: request.model, stream: request.stream ?? false },
      (model, signal) => prepare(request, model, signal),
    );
  };
}

async function prepare(
  request: ResponsesRequest,
  model: LoadedModel,
  signal: AbortSignal,
): Promise<PreparedGeneration> {
  const { temperature, top_p } = request;
  const asked = Object.entries({ temperature, top_p }).filter(([, value]) => value !== undefined);
  const sampling = resolveSampling(Object.fromEntries(asked), model.defaults);
  const tools = offeredTools(request);
  const input = { messages: toChatMessages(request), addGenerationPrompt: true };
  checkMessageCount(input.messages, model, "input");
  const { ids } = await model.text.renderChat(tools.length === 0 ? input : { ...input, tools }, { signal });
  const maxTokens = resolveMaxTokens(request.max_output_tokens, model, ids.length, { promptParam: "input" });
  const form = formOf(request);
  const answers = { tools, parallel: request.parallel_tool_calls ?? true, ...form };
  const head = responseHead(request, model, sampling);
  return {
    plans: [{ promptIds: ids, maxTokens, sampling }],
    options: { ...toolGenerationOptions(tools), ...form },
    frames: (events) => responseFrames(withToolCalls(events, answers), head),
    whole: async (events) => {
      const output = new ResponseOutput();
      for await (const { event } of withToolCalls(events, answers)) output.take(event);
      return responseBody(head, output);
    },
  };
}

/** What the answer has to follow. */
function formOf(request: ResponsesRequest): { grammar?: GrammarSpec } {
  const { tools = [], tool_choice: choice = "auto", parallel_tool_calls: parallel = true, text } = request;
  return answerGrammar(textGrammar(text?.format ?? undefined), {
    tools: tools.map(({ name, parameters, strict }, index) => ({
      name,
      parameters,
      strict: strict === true,
      param: `tools[${index}].parameters`,
    })),
    choice: typeof choice === "string" ? choice : { name: choice.name },
    param: "tool_choice",
    parallel,
  });
}

/** Calls belong to the assistant's message before them. Throws invalid_argument for a result without a call. */
function toChatMessages({ input, instructions }: ResponsesRequest): ChatMessage[] {
  const messages: ChatMessage[] = [];
  if (instructions !== undefined) messages.push({ role: "system", content: instructions });
  if (typeof input === "string") return [...messages, { role: "user", content: input }];
  const called = new Map<string, string>();
  input.forEach((item, index) => {
    if (item.type === "message") {
      messages.push({
        role: item.role === "developer" ? "system" : item.role,
        content: textOf(item.content),
      });
    } else if (item.type === "function_call_output") {
      const name = called.get(item.call_id);
      if (name === undefined)
        throw invalid(`input[${index}].call_id`, "no earlier item is a call with this id.");
      messages.push({ role: "tool", content: textOf(item.output), tool_call_id: item.call_id, name });
    } else {
      const { call_id: id, name, arguments: json } = item;
      called.set(id, name);
      let last = messages.at(-1);
      if (last?.role !== "assistant") {
        last = { role: "assistant", content: "" };
        messages.push(last);
      }
      last.tool_calls ??= [];
      last.tool_calls.push({ id, type: "function", function: { name, arguments: json } });
    }
  });
  return messages;
}

function textOf(content: string | readonly { text: string }[]): string {
  return typeof content === "string" ? content : content.map((part) => part.text).join("");
}

function offeredTools({ tools = [], tool_choice }: ResponsesRequest): ChatTool[] {
  if (tool_choice === "none") return [];
  const names = new Set<string>();
  return tools.map(({ name, description, parameters }, index) => {
    if (names.has(name)) throw invalid(`tools[${index}].name`, `${name} is there twice.`);
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

function responseHead(
  request: ResponsesRequest,
  model: LoadedModel,
  sampling: { temperature: number; top_p: number },
): object {
  return {
    id: `resp_${crypto.randomUUID().replaceAll("-", "")}`,
    object: "response",
    created_at: Math.floor(Date.now() / 1000),
    model: model.id,
    error: null,
    instructions: request.instructions ?? null,
    max_output_tokens: request.max_output_tokens ?? null,
    metadata: request.metadata ?? {},
    parallel_tool_calls: request.parallel_tool_calls ?? true,
    previous_response_id: null,
    store: false,
    temperature: sampling.temperature,
    top_p: sampling.top_p,
    text: { format: request.text?.format ?? { type: "text" } },
    tool_choice: request.tool_choice ?? "auto",
    tools: (request.tools ?? []).map((tool) => ({ parameters: null, ...tool, strict: tool.strict ?? false })),
    truncation: "disabled",
  };
}

function responseBody(head: object, output: ResponseOutput): object {
  const status = output.end?.status ?? "in_progress";
  return {
    ...head,
    status,
    incomplete_details: status === "incomplete" ? { reason: "max_output_tokens" } : null,
    output: output.items,
    usage: output.end?.usage ?? null,
  };
}

async function* responseFrames(
  events: AsyncIterable<GroupAnswerEvent>,
  head: object,
): AsyncGenerator<string, void, void> {
  const output = new ResponseOutput();
  let number = 0;
  const frame = ({ type, ...fields }: ResponseEvent): string => {
    const data = JSON.stringify({ type, sequence_number: number++, ...fields });
    return `event: ${type}\ndata: ${data}\n\n`;
  };
  const whole = (type: string): string => frame({ type, response: responseBody(head, output) });
  let begun = false;
  for await (const { event } of events) {
    if (!begun) {
      begun = true;
      yield whole("response.created") + whole("response.in_progress");
    }
    if (event.type === "progress") yield prefillFrame(event.done, event.total);
    const frames = output.take(event).map(frame).join("");
    if (frames !== "") yield frames;
    if (output.end !== undefined) yield whole(`response.${output.end.status}`);
  }
}
