// The cluster's part of the API: what the nodes see of each other, letting a new one in, where a model would go, and
// instances over several nodes.

import type { Hono } from "hono";
import * as v from "valibot";
import type { PlacementRequest } from "../../cluster/types.ts";
import { CaravanError } from "../../errors.ts";
import { readJsonObject } from "../limits.ts";
import { parseParameters } from "../parameters.ts";
import { type ApiContext, type ApiEnv, route } from "../routes.ts";
import type { ApiSettings } from "../settings.ts";
import { stateStream } from "./events.ts";
import type { ClusterService } from "./service.ts";

const acceptSchema = v.strictObject({ code: v.pipe(v.string(), v.minLength(1), v.maxLength(64)) });

const removeSchema = v.strictObject({ node: v.pipe(v.string(), v.minLength(1), v.maxLength(120)) });
const partsSchema = v.strictObject({ model: v.exactOptional(v.pipe(v.string(), v.maxLength(512))) });

const modelName = v.pipe(v.string(), v.minLength(1), v.maxLength(512));
const positive = (most: number) => v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(most));
const askedEntries = {
  tensor: v.exactOptional(positive(64)),
  pipeline: v.exactOptional(positive(64)),
  context: v.exactOptional(positive(2 ** 28)),
  streams: v.exactOptional(positive(4096)),
  /** Only these nodes, by id. */
  nodes: v.exactOptional(v.pipe(v.array(v.pipe(v.string(), v.regex(/^[0-9a-f]{64}$/))), v.maxLength(64))),
};
const instanceSchema = v.strictObject({ model: modelName, ...askedEntries });

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
  const read = <T>(schema: v.GenericSchema<unknown, T>, body: Record<string, unknown>) =>
    parseParameters(schema, {}, body);

  route(app, "/cluster/state", { GET: () => Response.json(cluster?.state() ?? { cluster: null }) });
  route(app, "/cluster/events", {
    GET: (context) => {
      context.env?.keepOpen?.();
      return stateStream(service(), context.req.raw.signal);
    },
  });
  route(app, "/cluster/plan", {
    GET: async (context) => {
      const { model, ...asked } = read(instanceSchema, askedOfQuery(context));
      return Response.json(await service().plan(model, asked));
    },
  });
  route(
    app,
    "/cluster/accept",
    {
      POST: async (context) => {
        const { code } = read(acceptSchema, await readJsonObject(context, settings));
        return Response.json({ accepted: await service().accept(code) });
      },
    },
    ADMIN,
  );
  route(
    app,
    "/cluster/remove",
    {
      POST: async (context) => {
        const { node } = read(removeSchema, await readJsonObject(context, settings));
        const { name, ...others } = await service().removeNode(node);
        return Response.json({ removed: name, ...others });
      },
    },
    ADMIN,
  );
  route(
    app,
    "/cluster/instances",
    {
      POST: async (context) => {
        const { model, ...asked } = read(instanceSchema, await readJsonObject(context, settings));
        const id = await service().createInstance(model, asked);
        return Response.json({ id, model }, { status: 202 });
      },
    },
    ADMIN,
  );
  route(
    app,
    "/cluster/parts",
    {
      DELETE: async (context) => {
        const { model } = read(partsSchema, context.req.query());
        return Response.json({ bytes: await service().cleanParts(model) });
      },
    },
    ADMIN,
  );
  route(
    app,
    "/cluster/instances/:id",
    {
      DELETE: async (context) => {
        const id = context.req.param("id") ?? "";
        if (!(await service().stopInstance(id))) {
          throw new CaravanError("model_not_found", `There is no instance ${JSON.stringify(id)}.`, {
            hint: "GET /cluster/state lists them.",
          });
        }
        return Response.json({ id, stopped: true });
      },
    },
    ADMIN,
  );
}

/** ?model=…&tensor=2 as a body would say it. Numbers that are none are left for the schema to refuse. */
function askedOfQuery(context: ApiContext): PlacementRequest & Record<string, unknown> {
  const asked: Record<string, unknown> = {};
  for (const [name, text] of Object.entries(context.req.query())) {
    if (name === "nodes") asked[name] = text.split(",");
    else asked[name] = name !== "model" && /^\d{1,9}$/.test(text) ? Number(text) : text;
  }
  return asked;
}
