// caravan cluster: makes a cluster, shows it, lets a new node in, leaves it. Files are this user's own; what only the
// running node knows is asked of it.

import { hostname } from "node:os";
import { join } from "node:path";
import * as v from "valibot";
import { forgetCluster, loadCluster, newCluster, saveCluster } from "../cluster/net/cluster-file.ts";
import { clusterFolder, loadIdentity } from "../cluster/net/identity.ts";
import { parseCode } from "../cluster/net/join-code.ts";
import { GRACE_HOURS, removeParts } from "../cluster/net/model-parts.ts";
import { CaravanError } from "../errors.ts";
import { askNode, type RunningNode, runningNodes } from "../node/running-nodes.ts";
import { resolvePaths } from "../paths.ts";
import { loadSettings } from "../settings.ts";
import { type Arguments, type Command, usage } from "./command.ts";
import { LedgerSchema, ledgerLines } from "./ledger-text.ts";
import { formatBytes } from "./progress.ts";

const ACCEPT_LIMIT_MS = 15_000;
const STATE_LIMIT_MS = 3000;
/** Large files take a while to unlink. */
const CLEAN_LIMIT_MS = 60_000;

const ErrorReply = v.object({ error: v.looseObject({ message: v.string() }) });
const Accepted = v.object({ accepted: v.string() });
const Removed = v.object({ removed: v.string(), told: v.array(v.string()), away: v.array(v.string()) });
const Cleaned = v.object({ bytes: v.number() });
const State = v.looseObject({
  cluster: v.nullable(v.string()),
  conflict: v.optional(v.string()),
  self: v.optional(v.looseObject({ id: v.string(), name: v.string() })),
  nodes: v.optional(
    v.array(
      v.looseObject({
        id: v.string(),
        name: v.string(),
        version: v.string(),
        reachable: v.boolean(),
        addresses: v.array(v.string()),
        memory: v.optional(v.object({ total: v.number(), available: v.number() })),
        round_trip_us: v.optional(v.number()),
        bandwidth: v.optional(v.number()),
        ledger: v.optional(LedgerSchema),
      }),
    ),
  ),
  links: v.optional(
    v.array(
      v.looseObject({
        from: v.string(),
        to: v.string(),
        kind: v.string(),
        round_trip_us: v.number(),
        bandwidth: v.number(),
        devices: v.optional(v.tuple([v.string(), v.string()])),
      }),
    ),
  ),
  away: v.optional(v.array(v.object({ id: v.string(), name: v.string() }))),
  join_requests: v.optional(
    v.array(v.object({ name: v.string(), from: v.string(), waiting_seconds: v.number() })),
  ),
  strangers: v.optional(v.array(v.object({ address: v.string(), name: v.string(), reason: v.string() }))),
  problems: v.optional(v.array(v.object({ address: v.string(), problem: v.string() }))),
  parts: v.optional(
    v.array(v.object({ model: v.string(), bytes: v.number(), in_use: v.boolean(), idle_hours: v.number() })),
  ),
});

function folder(): string {
  return clusterFolder(resolvePaths().data);
}

/** The node of this user that runs on this machine. Throws when there is none. */
async function runningNode(): Promise<RunningNode> {
  const [node] = await runningNodes();
  if (node !== undefined) return node;
  throw new CaravanError("invalid_argument", "no node runs on this machine", {
    hint: "Start one with `caravan serve`.",
  });
}

async function ask<T>(
  node: RunningNode,
  path: string,
  schema: v.GenericSchema<unknown, T>,
  init: RequestInit,
): Promise<T> {
  const { admin_keys, api_keys } = loadSettings().settings;
  const key = admin_keys[0] ?? api_keys[0];
  const reply = await askNode(node, path, {
    ...init,
    headers: {
      "content-type": "application/json",
      ...(key === undefined ? {} : { authorization: `Bearer ${key}` }),
    },
  });
  const value: unknown = await reply.json().catch(() => undefined);
  if (!reply.ok) {
    const said = v.safeParse(ErrorReply, value);
    if (said.success) throw CaravanError.fromJSON(said.output.error);
    throw new CaravanError("internal_error", `the node answers with status ${reply.status}`, {
      where: node.url,
    });
  }
  return v.parse(schema, value);
}

function create(name: string): number {
  const existing = loadCluster(folder());
  if (existing !== undefined) {
    throw new CaravanError("invalid_argument", `this node is already in the cluster "${existing.name}"`, {
      hint: "Leave it first with `caravan cluster leave`.",
    });
  }
  loadIdentity(folder());
  saveCluster(folder(), newCluster(name));
  process.stdout.write(
    `The cluster "${name}" is made, with this node as its first. On the next machine run\n\n  caravan join\n\nand type the code that it shows here:\n\n  caravan cluster accept CODE\n`,
  );
  return 0;
}

async function accept(code: string): Promise<number> {
  parseCode(code);
  const { accepted } = await ask(await runningNode(), "/cluster/accept", Accepted, {
    method: "POST",
    body: JSON.stringify({ code }),
    signal: AbortSignal.timeout(ACCEPT_LIMIT_MS),
  });
  process.stdout.write(`${accepted} has joined the cluster.\n`);
  return 0;
}

async function remove(called: string): Promise<number> {
  const { removed, told, away } = await ask(await runningNode(), "/cluster/remove", Removed, {
    method: "POST",
    body: JSON.stringify({ node: called }),
    signal: AbortSignal.timeout(ACCEPT_LIMIT_MS),
  });
  process.stdout.write(
    `${removed} is removed: its key and the secret that it knows are refused from now on. To come back it joins again.\n` +
      `Members that stay: this machine${told.map((name) => `, ${name}`).join("")}.` +
      `${away.length === 0 ? "" : ` Not reachable now, told at the next contact: ${away.join(", ")}.`}\n` +
      "Remove those among them that you do not know, too.\n",
  );
  return 0;
}

async function leave(): Promise<number> {
  const cluster = loadCluster(folder());
  if (cluster === undefined) {
    throw new CaravanError("invalid_argument", "this node is in no cluster");
  }
  forgetCluster(folder());
  process.stdout.write(
    `Left the cluster "${cluster.name}". The other nodes still know its secret, and so may backups of this machine.\n`,
  );
  return 0;
}

async function status(json: boolean): Promise<number> {
  const state = await ask(await runningNode(), "/cluster/state", State, {
    signal: AbortSignal.timeout(STATE_LIMIT_MS),
  });
  process.stdout.write(json ? `${JSON.stringify(state)}\n` : describe(state));
  return 0;
}

/** Drops fetched parts of models: by the running node, which knows what is in use, or directly where none runs. */
async function clean(model: string | undefined): Promise<number> {
  const [node] = await runningNodes();
  let bytes: number;
  if (node === undefined) bytes = removeParts(join(resolvePaths().data, "parts"), model);
  else {
    const query = model === undefined ? "" : `?model=${encodeURIComponent(model)}`;
    const init = { method: "DELETE", signal: AbortSignal.timeout(CLEAN_LIMIT_MS) };
    ({ bytes } = await ask(node, `/cluster/parts${query}`, Cleaned, init));
  }
  process.stdout.write(`${formatBytes(bytes)} of fetched parts were dropped; what a rank reads stays.\n`);
  return 0;
}

function describe(state: v.InferOutput<typeof State>): string {
  if (state.cluster === null) return "This node is in no cluster. `caravan cluster create` makes one.\n";
  const { nodes = [], join_requests: requests = [], strangers = [], problems = [], parts = [] } = state;
  const lines = [`cluster ${state.cluster}, ${nodes.length} node${nodes.length === 1 ? "" : "s"}`];
  if (state.conflict !== undefined) lines.push(`  WARNING: ${state.conflict}`);
  for (const node of nodes) {
    const own = node.id === state.self?.id;
    const memory =
      node.memory === undefined
        ? ""
        : `  ${formatBytes(node.memory.available)} of ${formatBytes(node.memory.total)} free`;
    const link =
      node.round_trip_us === undefined
        ? ""
        : `  ${node.round_trip_us} µs${node.bandwidth ? `, ${formatBytes(node.bandwidth)}/s` : ""}`;
    const reach = own ? "this node" : node.reachable ? "reachable" : "not reachable";
    lines.push(
      `  ${node.name}  ${node.id.slice(0, 8)}  caravan ${node.version}  ${reach}${memory}${link}  ${node.addresses[0] ?? ""}`,
    );
    for (const { from, to, kind, round_trip_us, bandwidth, devices } of state.links ?? [])
      if (kind === "rdma" && from === state.self?.id && to === node.id)
        lines.push(
          `    RDMA: ${devices?.join(" – ") ?? ""}, ${round_trip_us.toFixed(1)} µs, ${formatBytes(bandwidth)}/s`,
        );
    if (node.ledger !== undefined) lines.push(...ledgerLines(node.ledger).map((line) => `    ${line}`));
  }
  for (const { id, name } of state.away ?? []) lines.push(`  ${name}  ${id.slice(0, 8)}  a member, not here`);
  for (const { name, from, waiting_seconds } of requests)
    lines.push(`  ${name} at ${from} asks to join, since ${waiting_seconds} s: caravan cluster accept CODE`);
  for (const { address, name, reason } of strangers)
    lines.push(`  no member: ${name} at ${address}: ${reason}`);
  for (const { address, problem } of problems) lines.push(`  no answer: ${address}: ${problem}`);
  for (const { model, bytes, in_use, idle_hours } of parts)
    lines.push(
      `  fetched part of ${model}: ${formatBytes(bytes)}, ${in_use ? "in use" : `not read for ${idle_hours} h: dropped after ${GRACE_HOURS} h, or by \`caravan cluster clean\``}`,
    );
  return `${lines.join("\n")}\n`;
}

/** A name that is good enough where nobody chooses one. */
function defaultName(): string {
  const plain = hostname()
    .replace(/\..*$/, "")
    .replaceAll(/[^A-Za-z0-9_-]/g, "-")
    .slice(0, 40);
  return /^[A-Za-z0-9]/.test(plain) ? plain : "caravan";
}

export const cluster: Command = {
  name: "cluster",
  summary: "make, show or leave a cluster, let a node in or take it out",
  positionals: "create [NAME] | status | accept CODE | remove NODE | leave | clean [MODEL]",
  count: [1, 2],
  options: { json: { help: "print JSON (status)" } },
  details: `create  makes a cluster with this node as its first
status  shows the nodes, as the node that runs here sees them
accept  lets the machine in that shows CODE (\`caravan join\` there)
remove  takes a node out, by name or id: it can do nothing in the cluster any more until it joins again
leave   forgets the cluster and its secret
clean   drops parts of models that were fetched for ranks and are read by none now`,
  async run(args: Arguments) {
    const [action, value] = args.positionals;
    if ((action === "status" || action === "leave") && value !== undefined)
      throw usage(`\`caravan cluster ${action}\` takes nothing more`);
    switch (action) {
      case "create":
        return create(value ?? defaultName());
      case "status":
        return await status(args.flag("json"));
      case "leave":
        return await leave();
      case "remove":
        return await remove(args.positional(1));
      case "clean":
        return await clean(value);
      case "accept":
        return await accept(args.positional(1));
      default:
        throw usage("`caravan cluster` takes create, status, accept, remove, leave or clean");
    }
  },
};
