// What `caravan ps`, `caravan stop` and `caravan plan` ask of nodes on this machine.

import * as v from "valibot";
import { type PlanReport, PlanReportSchema } from "../cluster/plan-report.ts";
import type { PlacementRequest } from "../cluster/types.ts";
import { CaravanError } from "../errors.ts";
import { askNode, type RunningNode, runningNodes } from "../node/running-nodes.ts";
import { loadSettings } from "../settings.ts";

const ANSWER_LIMIT_MS = 5000;
/** Headers of a large model may come from a slow hub. */
const PLAN_LIMIT_MS = 120_000;

const CLUSTER = v.object({
  cluster: v.nullable(v.string()),
  nodes: v.optional(v.array(v.object({ reachable: v.boolean() })), []),
});

const MODELS = v.object({
  data: v.array(
    v.object({
      id: v.string(),
      state: v.string(),
      progress: v.optional(v.number()),
      context_length: v.optional(v.number()),
      error: v.optional(v.string()),
    }),
  ),
});
const ERROR = v.object({ error: v.object({ message: v.string(), code: v.nullish(v.string()) }) });

export type NodeModel = v.InferOutput<typeof MODELS>["data"][number];

/** The models that the node knows. Throws what the node answers. */
export async function modelsOf(node: RunningNode): Promise<NodeModel[]> {
  return v.parse(MODELS, await asked(node, "/v1/models", { signal: AbortSignal.timeout(ANSWER_LIMIT_MS) }))
    .data;
}

/** Has the node take a model out of memory; false when it was not loaded. */
export async function unload(node: RunningNode, model: string): Promise<boolean> {
  const body = JSON.stringify({ model });
  const reply = await asked(node, "/models/unload", { method: "POST", body });
  return v.parse(v.object({ was_loaded: v.boolean() }), reply).was_loaded;
}

/** A node of a cluster that runs on this machine, with the cluster's name and how many nodes it sees; undefined: there is none. */
export async function clusterNode(): Promise<
  { node: RunningNode; cluster: string; nodes: number } | undefined
> {
  for (const node of await runningNodes()) {
    const limit = { signal: AbortSignal.timeout(ANSWER_LIMIT_MS) };
    const { cluster, nodes } = v.parse(CLUSTER, await asked(node, "/cluster/state", limit));
    if (cluster !== null) return { node, cluster, nodes: nodes.filter(({ reachable }) => reachable).length };
  }
  return undefined;
}

/** GET /cluster/plan. Throws what the node answers. */
export async function planAt(
  node: RunningNode,
  question: { model: string } & PlacementRequest,
): Promise<PlanReport> {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(question)) query.set(name, String(value));
  const signal = AbortSignal.timeout(PLAN_LIMIT_MS);
  return v.parse(PlanReportSchema, await asked(node, `/cluster/plan?${query}`, { signal }));
}

/** The JSON of a reply; a key from the settings goes with the question, one for administration first. */
async function asked(node: RunningNode, path: string, init: RequestInit): Promise<unknown> {
  const { settings } = loadSettings();
  const key = settings.admin_keys[0] ?? settings.api_keys[0];
  const headers = key === undefined ? {} : { authorization: `Bearer ${key}` };
  let reply: Response;
  try {
    reply = await askNode(node, path, { ...init, headers });
  } catch (cause) {
    throw new CaravanError("engine_failed", "the node does not answer", { where: node.url, cause });
  }
  const body: unknown = await reply.json().catch(() => undefined);
  if (reply.ok) return body;
  const parsed = v.safeParse(ERROR, body);
  const error = parsed.success ? parsed.output.error : { message: `the node answered ${reply.status}` };
  throw CaravanError.fromJSON({ ...error, where: node.url });
}
