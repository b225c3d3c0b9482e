// What tests ask of an Engine with the tiny model, and what came of it.

import { type GenerateEvent, type GenerateRequest, GREEDY } from "../../src/engine/protocol.ts";
import { TINY_VOCAB } from "./tiny-llama4.ts";

/** A greedy request whose prompt depends on its length only. */
export function tinyRequest(id: string, length: number, max_tokens: number): GenerateRequest {
  const tokens = Array.from({ length }, (_, i) => (i * 13 + length) % TINY_VOCAB);
  return { id, tokens, max_tokens, stop_tokens: [], sampling: GREEDY };
}

/** All events of a stream, at its end. */
export async function collect(stream: AsyncIterable<GenerateEvent>): Promise<GenerateEvent[]> {
  const events: GenerateEvent[] = [];
  for await (const event of stream) events.push(event);
  return events;
}

export const tokensOf = (events: readonly GenerateEvent[]): number[] =>
  events.flatMap((event) => (event.type === "token" ? [event.token] : []));
