// The cluster's part of the API: what the nodes see of each other, and letting a new one in.

import type { Hono } from "hono";
import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import { readJsonObject } from "../limits.ts";
import { parseParameters } from "../parameters.ts";
import { type ApiEnv, route } from "../routes.ts";
import type { ApiSettings } from "../settings.ts";
import type { ClusterService } from "./service.ts";

const acceptSchema = v.strictObject({ code: v.pipe(v.string(), v.minLength(1), v.maxLength(64)) });

const ADMIN = { scope: "administration" } as const;

/** Registers the routes. `cluster`: undefined where the process takes part in no cluster at all. */
export function clusterRoutes(
  app: Hono<ApiEnv>,
  cluster: ClusterService | undefined,
  settings: ApiSettings,
): void {
  const service = (): ClusterService => {
    if (cluster !== undefined) return cluster;
    throw new CaravanError("invalid_argument", "This process takes part in no cluster.", {
      hint: "Start it with `caravan serve`.",
    });
  };
  route(app, "/cluster/state", { GET: () => Response.json(cluster?.state() ?? { cluster: null }) });
  route(
    app,
    "/cluster/accept",
    {
      POST: async (context) => {
        const { code } = parseParameters(acceptSchema, {}, await readJsonObject(context, settings));
        return Response.json({ accepted: await service().accept(code) });
      },
    },
    ADMIN,
  );
}
