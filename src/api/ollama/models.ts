// GET /api/tags, /api/ps and /api/version, POST /api/show: Ollama's view of this node's models. Fields that are not known
// here (sizes, digests, quantization) are left out rather than made up.

import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import { VERSION } from "../../version.ts";
import { readJsonObject } from "../limits.ts";
import type { ModelInfo } from "../model-directory.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import type { ApiDependencies } from "../serve-generation.ts";

/** Ollama's clients put `:latest` behind names that have no tag. */
export function modelName(name: string): string {
  return name.replace(/:latest$/, "");
}

function modelBody(info: ModelInfo): object {
  return {
    name: info.id,
    model: info.id,
    modified_at: new Date(info.created * 1000).toISOString(),
    details: { format: "safetensors" },
    ...(info.contextLength === undefined ? {} : { context_length: info.contextLength }),
  };
}

export function tagsRoute({ models }: ApiDependencies) {
  return (): Response => Response.json({ models: models.list().map(modelBody) });
}

/** Models that are loaded. */
export function psRoute({ models }: ApiDependencies) {
  return (): Response =>
    Response.json({
      models: models
        .list()
        .filter((info) => info.state === "ready")
        .map(modelBody),
    });
}

export function versionRoute() {
  return (): Response => Response.json({ version: VERSION });
}

export const showSchema = v.pipe(
  v.strictObject({
    model: v.optional(v.string()),
    /** The old name of `model`. */
    name: v.optional(v.string()),
    verbose: v.optional(v.boolean()),
  }),
  v.check(({ model, name }) => model !== undefined || name !== undefined, "The parameter model is required"),
);

export function showRoute({ models, settings }: ApiDependencies) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context, settings);
    const request = parseParameters(
      showSchema,
      {
        system: { feature: "replacing the system message" },
        template: { feature: "replacing the template" },
        options: { feature: "replacing parameters" },
      },
      body,
    );
    const name = modelName(request.model ?? request.name ?? "");
    const info = models.list().find((model) => model.id === name || model.aliases?.includes(name));
    if (info === undefined) {
      throw new CaravanError("model_not_found", `There is no model ${JSON.stringify(name)} here.`, {
        param: "model",
      });
    }
    const { modified_at, details } = modelBody(info) as { modified_at: string; details: object };
    return Response.json({
      modified_at,
      details,
      model_info: info.contextLength === undefined ? {} : { "general.context_length": info.contextLength },
      capabilities: ["completion"],
    });
  };
}
