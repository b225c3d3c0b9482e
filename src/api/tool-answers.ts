// The answers of a request with tools: each sequence's text goes through a parser that finds the calls in it. All API
// families take their calls from here.

import { TOOL_CALL_MARKERS, ToolCallParser } from "../chat/tool-calls.ts";
import type { GrammarSpec } from "../grammar/spec.ts";
import type { GenerationEvent, TokenInfo } from "./generation.ts";
import type { GroupEvent } from "./generation-group.ts";
import type { ChatTool } from "./model-directory.ts";

export type AnswerEvent =
  | Exclude<GenerationEvent, { type: "finish" }>
  /** `call` counts the calls of the sequence from 0. */
  | { type: "call"; call: number; id: string; name: string }
  /** More of the JSON text of a call's arguments. */
  | { type: "arguments"; call: number; json: string }
  | (Omit<Extract<GenerationEvent, { type: "finish" }>, "reason"> & {
      /** "tool_calls": it ended by itself and there is at least one call. */
      reason: "stop" | "length" | "tool_calls";
    });

/** An event of the sequence at `index` of the request. */
export interface GroupAnswerEvent {
  index: number;
  event: AnswerEvent;
}

export interface ToolAnswerOptions {
  /** The offered functions; without any the answers are passed on as they are. */
  tools: readonly ChatTool[];
  /** What the answer follows. */
  grammar?: GrammarSpec;
  /** false: only the first call of an answer counts; what follows it is dropped. */
  parallel: boolean;
}

/** Generation options that an answer with tools needs: the markers around calls must reach the parser. */
export function toolGenerationOptions(tools: readonly ChatTool[]): { keepSpecials?: readonly string[] } {
  return tools.length === 0 ? {} : { keepSpecials: TOOL_CALL_MARKERS };
}

export function withToolCalls(
  events: AsyncIterable<GroupEvent>,
  options: ToolAnswerOptions,
): AsyncIterable<GroupAnswerEvent> {
  return options.tools.length === 0 ? events : parsedAnswers(events, options);
}

async function* parsedAnswers(
  events: AsyncIterable<GroupEvent>,
  { tools, parallel, grammar }: ToolAnswerOptions,
): AsyncGenerator<GroupAnswerEvent, void, void> {
  const names = tools.map((tool) => tool.function.name);
  const orForm = grammar?.type === "tool_calls" && grammar.orForm !== undefined;
  const answers = new Map<number, ToolAnswer>();
  for await (const { index, event } of events) {
    if (event.type === "progress" || event.type === "prompt_logprobs") {
      yield { index, event };
      continue;
    }
    let answer = answers.get(index);
    if (answer === undefined) {
      answer = new ToolAnswer(new ToolCallParser(names, { orForm }), parallel);
      answers.set(index, answer);
    }
    for (const found of answer.take(event)) yield { index, event: found };
  }
}

const NO_TOKENS: TokenInfo[] = [];

class ToolAnswer {
  #calls = 0;

  constructor(
    readonly parser: ToolCallParser,
    readonly parallel: boolean,
  ) {}

  take(event: Extract<GenerationEvent, { type: "text" | "finish" }>): AnswerEvent[] {
    const found = event.type === "text" ? this.parser.push(event.text) : this.parser.end();
    const answers = found.flatMap((part): AnswerEvent[] => {
      if (part.type === "call") this.#calls += 1;
      if (!this.parallel && this.#calls > 0 && (part.type === "text" || part.index > 0)) return [];
      if (part.type === "text") return [{ type: "text", text: part.text, tokens: NO_TOKENS }];
      if (part.type === "arguments") return [{ type: "arguments", call: part.index, json: part.json }];
      return [{ type: "call", call: part.index, id: newCallId(), name: part.name }];
    });
    if (event.type === "finish") {
      const calls = event.reason === "stop" && this.#calls > 0;
      answers.push({ ...event, reason: calls ? "tool_calls" : event.reason });
    }
    return answers;
  }
}

function newCallId(): string {
  return `call_${crypto.randomUUID().replaceAll("-", "")}`;
}
