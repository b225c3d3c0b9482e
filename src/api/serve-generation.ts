// One generation request from admission to its last byte, for every API family: a ticket, the model, the sequences,
// then one reply or a stream of frames. Whatever way it ends, the engine's requests are cancelled or complete and the
// ticket is given back.

import { asCaravanError, CaravanError } from "../errors.ts";
import type { Logger } from "../log.ts";
import type { BodyLease } from "./body-budget.ts";
import type { GenerationOptions } from "./generation.ts";
import { type GroupEvent, generateGroup, type SequencePlan } from "./generation-group.ts";
import type { Lifecycle } from "./lifecycle.ts";
import type { LoadedModel, ModelDirectory } from "./model-directory.ts";
import type { History } from "./ops/history.ts";
import type { ServingMetrics } from "./ops/metrics.ts";
import type { TraceLog } from "./ops/request-trace.ts";
import type { ApiContext } from "./routes.ts";
import type { ApiSettings } from "./settings.ts";
import { eventStream, type StreamWire } from "./sse.ts";

/** What the routes are made with. */
export interface ApiDependencies {
  models: ModelDirectory;
  settings: ApiSettings;
  lifecycle: Lifecycle;
  log: Logger;
  traces: TraceLog;
  metrics: ServingMetrics;
  history: History;
}

/** A request that is ready to run. */
export interface PreparedGeneration {
  plans: SequencePlan[];
  options: Omit<GenerationOptions, "sampling" | "maxTokens" | "signal" | "deadlineMs" | "onToken">;
  /** The frames of the streamed reply. */
  frames(events: AsyncIterable<GroupEvent>): AsyncGenerator<string, void, void>;
  /** The body of the whole reply. */
  whole(events: AsyncIterable<GroupEvent>): Promise<object>;
  /** Replaces the engine's events where no generation is needed. */
  events?: () => AsyncIterable<GroupEvent>;
}

/** Seconds after which a client asks again for a model that is loading. */
const LOADING_RETRY_SECONDS = 5;

/** Throws model_loading or the engine's own error unless it can generate. */
export function requireReady(model: LoadedModel): void {
  const status = model.engine.status();
  if (status.state === "ready") return;
  if (status.state === "loading") {
    const percent = Math.floor(status.progress * 100);
    throw new CaravanError("model_loading", `${model.id} is loading: ${percent} % done.`, {
      hint: "Try again shortly.",
      retryAfterSeconds: LOADING_RETRY_SECONDS,
    });
  }
  if (status.error !== undefined) throw CaravanError.fromJSON({ ...status.error });
  throw new CaravanError(
    "engine_failed",
    `The engine of ${model.id} is not running (state: ${status.state}).`,
    {
      retryAfterSeconds: LOADING_RETRY_SECONDS,
    },
  );
}

/** Runs one request. `prepare` checks what depends on the model and makes the prompts. */
export async function serveGeneration(
  context: ApiContext,
  deps: ApiDependencies,
  request: { model: string; stream: boolean; wire?: StreamWire },
  prepare: (model: LoadedModel, signal: AbortSignal) => Promise<PreparedGeneration>,
): Promise<Response> {
  const { lifecycle, settings, log } = deps;
  const ticket = lifecycle.enter(settings.maxConcurrentRequests, context.req.raw.signal);
  const trace = deps.traces.begin({
    id: context.get("requestId"),
    path: context.req.path,
    stream: request.stream,
    startedMs: context.get("startedMs"),
  });
  trace.mark("body");
  if (context.get("measured")) trace.intervals = [];
  let lease: BodyLease | undefined;
  const ended = (error: CaravanError | undefined) => {
    ticket.release();
    lease?.release();
    deps.traces.end(trace, error);
    const fields = {
      request: context.get("requestId"),
      model: request.model,
      ms: Math.round(performance.now() - context.get("startedMs")),
    };
    if (error === undefined) log.info("generation complete", fields);
    else log.warn("generation ended early", { ...fields, ...error.toJSON() });
  };
  let handedOver = false;
  try {
    context.env?.keepOpen?.();
    const model = await deps.models.find(request.model, { signal: ticket.signal });
    requireReady(model);
    trace.found(model.id);
    const prepared = await prepare(model, ticket.signal);
    trace.prepared(prepared.plans);
    const events =
      prepared.events?.() ??
      generateGroup(model, prepared.plans, {
        ...prepared.options,
        observer: trace,
        signal: ticket.signal,
        ...(settings.deadlineMs === undefined ? {} : { deadlineMs: settings.deadlineMs }),
      });
    if (!request.stream) {
      const body = await prepared.whole(events);
      ended(undefined);
      return Response.json(body);
    }
    handedOver = true;
    lease = context.get("body");
    context.set("body", undefined);
    return await eventStream({
      frames: prepared.frames(events),
      wire: request.wire,
      keepAliveMs: settings.keepAliveMs,
      stallLimitMs: settings.stallLimitMs,
      cancel: ticket.cancel,
      closed: ended,
    });
  } catch (thrown) {
    // Whatever failed because of the abort, the abort's reason says why.
    const error = asCaravanError(ticket.signal.aborted ? ticket.signal.reason : thrown);
    if (!handedOver) ended(error);
    throw error;
  }
}
