// POST /models/pull and /models/delete: the models on this machine's disk, for keys with the scope of administration. A
// pull goes to the hub that the node's environment names, and to no address of the client's.

import { asCaravanError, CaravanError } from "../../errors.ts";
import { errorBody } from "../error-response.ts";
import { readJsonObject } from "../limits.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import type { ApiDependencies } from "../serve-generation.ts";
import { eventStream, type StreamWire } from "../sse.ts";
import { modelNameSchema } from "./models-admin.ts";

export interface PullReport {
  doneBytes: number;
  totalBytes: number;
}

/** What keeps the models; the node fills it in. */
export interface ModelLibrary {
  /** Brings a model of the hub here: a card's name or org/name. The signal stops it; what was fetched is kept. */
  pull(
    name: string,
    options: { signal: AbortSignal; onProgress: (report: PullReport) => void },
  ): Promise<{ bytes: number }>;
  /** Throws model_not_found for what `remove` would not find. */
  check(name: string): void;
  /** Deletes a model that is not loaded any more; the bytes that came free. Rejects with model_not_found. */
  remove(name: string): Promise<number>;
}

const WIRE: StreamWire = {
  contentType: "application/x-ndjson",
  errorFrame: (error) => `${JSON.stringify({ status: "failed", ...errorBody(error) })}\n`,
  // Space before the next object means nothing to a parser of JSON.
  keepAliveFrame: " ",
};

function required(library: ModelLibrary | undefined): ModelLibrary {
  if (library !== undefined) return library;
  throw new CaravanError("invalid_argument", "This process keeps no models.", {
    hint: "Start it with `caravan serve`.",
  });
}

/** Streams `{"status":"pulling","done_bytes","total_bytes"}` lines and a last one with status success or failed. The client's
 * leaving stops the download, and the next pull goes on where it was. */
export function pullRoute({ settings, log }: ApiDependencies, library: ModelLibrary | undefined) {
  return async (context: ApiContext): Promise<Response> => {
    const { model } = parseParameters(modelNameSchema, {}, await readJsonObject(context, settings));
    const keeper = required(library);
    context.env?.keepOpen?.();
    const stop = new AbortController();
    const cancel = () => stop.abort(new CaravanError("cancelled", "The client closed the connection."));
    context.req.raw.signal.addEventListener("abort", cancel, { once: true });
    return await eventStream({
      frames: pullFrames(keeper, model, stop.signal),
      wire: WIRE,
      keepAliveMs: settings.keepAliveMs,
      stallLimitMs: settings.stallLimitMs,
      cancel,
      closed: (error) => {
        context.req.raw.signal.removeEventListener("abort", cancel);
        stop.abort();
        const fields = { request: context.get("requestId"), model };
        if (error === undefined) log.info("model pulled", fields);
        else log.warn("pull ended early", { ...fields, ...error.toJSON() });
      },
    });
  };
}

async function* pullFrames(library: ModelLibrary, model: string, signal: AbortSignal) {
  let latest: PullReport | undefined;
  let wake: () => void = () => undefined;
  let over = false;
  const pulled = library
    .pull(model, {
      signal,
      onProgress: (report) => {
        latest = report;
        wake();
      },
    })
    .finally(() => {
      over = true;
      wake();
    });
  // Whoever reads to the end hears of a failure below.
  pulled.catch(() => undefined);
  while (!over) {
    await new Promise<void>((resolve) => {
      wake = resolve;
      if (over || latest !== undefined) resolve();
    });
    // A slow reader gets the newest numbers, not all of them.
    const report = latest;
    latest = undefined;
    if (report === undefined) continue;
    const { doneBytes: done_bytes, totalBytes: total_bytes } = report;
    yield `${JSON.stringify({ status: "pulling", done_bytes, total_bytes })}\n`;
  }
  const { bytes } = await pulled;
  yield `${JSON.stringify({ status: "success", total_bytes: bytes })}\n`;
}

/** Unloads the model, then deletes its files. */
export function deleteRoute({ settings, models, log }: ApiDependencies, library: ModelLibrary | undefined) {
  return async (context: ApiContext): Promise<Response> => {
    const { model } = parseParameters(modelNameSchema, {}, await readJsonObject(context, settings));
    const keeper = required(library);
    // A folder elsewhere that was named at the start is not ours to delete, and goes on answering.
    keeper.check(model);
    context.env?.keepOpen?.();
    try {
      await models.unload(model);
    } catch (thrown) {
      // One that is not whole cannot be loaded, but its files can go.
      if (asCaravanError(thrown).code !== "model_not_found") throw thrown;
    }
    const freed = await keeper.remove(model);
    log.info("model deleted", { request: context.get("requestId"), model, bytes: freed });
    return Response.json({ model, deleted: true, freed_bytes: freed });
  };
}
