// GET /v1/models and GET /v1/models/{id}: OpenAI's fields, and what else is known of each model.

import { CaravanError } from "../../errors.ts";
import type { ModelInfo } from "../model-directory.ts";
import type { ApiContext } from "../routes.ts";
import type { ApiDependencies } from "../serve-generation.ts";

function modelBody(info: ModelInfo): object {
  return {
    id: info.id,
    object: "model",
    created: info.created,
    owned_by: info.ownedBy,
    state: info.state,
    ...(info.aliases === undefined ? {} : { aliases: info.aliases }),
    ...(info.contextLength === undefined ? {} : { context_length: info.contextLength }),
    ...(info.progress === undefined ? {} : { progress: info.progress }),
    ...(info.policy === undefined ? {} : { policy: info.policy }),
    ...(info.error === undefined ? {} : { error: info.error }),
  };
}

export function listModelsRoute({ models }: ApiDependencies) {
  return (): Response => Response.json({ object: "list", data: models.list().map(modelBody) });
}

/** Model names hold slashes; clients send them plain or encoded. */
export function retrieveModelRoute({ models }: ApiDependencies) {
  return (context: ApiContext): Response => {
    const id = context.req.param("id") ?? "";
    const info = models.list().find((model) => model.id === id || model.aliases?.includes(id));
    if (info === undefined) {
      throw new CaravanError("model_not_found", `There is no model ${JSON.stringify(id)} here.`, {
        hint: "GET /v1/models lists those that are; `caravan pull` downloads another.",
        param: "model",
      });
    }
    return Response.json(modelBody(info));
  };
}
