// POST /bench/chat/completions: a whole chat completion together with how fast it was made, so that a benchmark needs
// no clock of its own. Times begin with the request's arrival at this server.

import type { EngineStatus } from "../../engine/protocol.ts";
import { CaravanError } from "../../errors.ts";
import { chatRoute } from "../openai/chat.ts";
import type { ApiContext } from "../routes.ts";
import type { ApiDependencies } from "../serve-generation.ts";
import type { RequestTrace } from "./request-trace.ts";

export function benchChatRoute(deps: ApiDependencies) {
  const chat = chatRoute(deps);
  return async (context: ApiContext): Promise<Response> => {
    context.set("measured", true);
    const reply = await chat(context);
    if (!reply.headers.get("content-type")?.startsWith("application/json")) {
      await reply.body?.cancel();
      throw new CaravanError("unsupported_parameter", "stream: measured answers are not streamed.", {
        param: "stream",
        hint: "Leave the parameter out.",
      });
    }
    const trace = deps.traces.measured(context.get("requestId"));
    if (!reply.ok || trace === undefined) return reply;
    const body = (await reply.json()) as object;
    const status = deps.models.statuses().find(({ model }) => model === trace.model);
    return Response.json({ ...body, generation_stats: statistics(trace, status) });
  };
}

function statistics(trace: RequestTrace, status: EngineStatus | undefined): object {
  const { prompt, cached, completion } = trace.usage;
  const timings = trace.timings;
  const longest = (pick: (timing: (typeof timings)[number]) => number): number =>
    timings.reduce((most, timing) => Math.max(most, pick(timing)), 0);
  const prefillMs = longest((timing) => timing.prefill_ms);
  const decodeMs = longest((timing) => timing.decode_ms);
  const intervals = (trace.intervals ?? []).sort((a, b) => a - b);
  return {
    prompt_tokens: prompt,
    cached_tokens: cached,
    generation_tokens: completion,
    /** Prompt tokens that were computed, and tokens after each answer's first, a second. */
    prompt_tps: perSecond(prompt - cached, prefillMs),
    generation_tps: perSecond(completion - timings.length, decodeMs),
    queue_ms: longest((timing) => timing.queue_ms),
    prefill_ms: prefillMs,
    decode_ms: decodeMs,
    ttft_ms: trace.endOf("first_token") ?? null,
    itl_ms: {
      p50: percentile(intervals, 0.5),
      p90: percentile(intervals, 0.9),
      p99: percentile(intervals, 0.99),
      max: intervals.at(-1) ?? null,
    },
    peak_memory_bytes: status?.peak_resident_bytes ?? null,
    /** Rank 0 first; a model in one piece has one rank. null: it has not said so yet. */
    rank_peak_memory_bytes: status?.rank_peak_resident_bytes ?? [status?.peak_resident_bytes ?? null],
  };
}

function perSecond(tokens: number, ms: number): number | null {
  return tokens > 0 && ms > 0 ? (tokens * 1000) / ms : null;
}

/** The smallest value that `share` of them do not exceed; null of nothing. */
function percentile(sorted: readonly number[], share: number): number | null {
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? null;
}
