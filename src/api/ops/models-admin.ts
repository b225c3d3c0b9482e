// POST /models/load and /models/unload: what requests do by themselves, at a time of the operator's choosing. For keys
// with the scope of administration.

import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import { readJsonObject } from "../limits.ts";
import type { LoadedModel } from "../model-directory.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import type { ApiDependencies } from "../serve-generation.ts";

export const modelNameSchema = v.strictObject({
  model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)),
});

/** Answers once the model is loaded, however long that takes; the client's leaving ends the wait, not the loading. */
export function loadRoute({ models, settings }: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const { model } = parseParameters(modelNameSchema, {}, await readJsonObject(context, settings));
    context.env?.keepOpen?.();
    const { signal } = context.req.raw;
    const loaded = await untilLoaded(() => models.find(model, { signal }));
    return Response.json({ model: loaded.id, state: "ready", context_length: loaded.contextLength });
  };
}

/** find() gives up after a while so that clients see progress; here the load itself is what is waited for. */
async function untilLoaded(find: () => Promise<LoadedModel>): Promise<LoadedModel> {
  for (;;) {
    try {
      return await find();
    } catch (thrown) {
      if (!(thrown instanceof CaravanError) || thrown.code !== "model_loading") throw thrown;
    }
  }
}

/** New requests load the model again; running ones finish first. */
export function unloadRoute({ models, settings }: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const { model } = parseParameters(modelNameSchema, {}, await readJsonObject(context, settings));
    context.env?.keepOpen?.();
    const unloaded = await models.unload(model);
    return Response.json({ model, state: "available", was_loaded: unloaded });
  };
}
