// GET /ready: whether a generation request would be served now; for load balancers and start scripts.

import { CaravanError } from "../../errors.ts";
import type { ModelInfo } from "../model-directory.ts";
import type { ApiDependencies } from "../serve-generation.ts";

const LOADING_RETRY_SECONDS = 5;

/** Why no request can be served now; undefined if one can. A model that a request loads counts. */
export function notReady(models: readonly ModelInfo[]): CaravanError | undefined {
  if (models.some((model) => model.state === "ready")) return undefined;
  const loading = models.find((model) => model.state === "loading");
  if (loading !== undefined) {
    const percent = Math.floor((loading.progress ?? 0) * 100);
    return new CaravanError("model_loading", `${loading.id} is loading: ${percent} % done.`, {
      retryAfterSeconds: LOADING_RETRY_SECONDS,
    });
  }
  if (models.some((model) => model.state === "available")) return undefined;
  const failed = models.find((model) => model.state === "failed");
  if (failed !== undefined) {
    return new CaravanError(
      "engine_failed",
      `${failed.id} could not be loaded: ${failed.error ?? "unknown reason"}.`,
    );
  }
  return new CaravanError("cluster_degraded", "There is no model on this node.", {
    hint: "Download one with `caravan pull MODEL`.",
  });
}

export function readyRoute({ models, lifecycle }: ApiDependencies) {
  return (): Response => {
    lifecycle.requireOpen();
    const list = models.list();
    const reason = notReady(list);
    if (reason !== undefined) throw reason;
    return Response.json({
      status: "ready",
      running: lifecycle.running,
      models: list.map(({ id, state, progress }) => ({
        id,
        state,
        ...(progress === undefined ? {} : { progress }),
      })),
    });
  };
}
