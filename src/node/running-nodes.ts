// The nodes that this user runs on this machine: each leaves a small file in the data folder while it serves, so that
// `caravan run`, `ps` and `stop` find it whatever its port. A file whose node does not answer as itself is ignored, and
// removed once its process is gone.

import { randomBytes } from "node:crypto";
import { readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";
import { makeFolder, resolvePaths } from "../paths.ts";

const NODE = v.object({
  pid: v.pipe(v.number(), v.safeInteger(), v.minValue(1)),
  /** Random; the node's /health shows it, which tells it from a later program with its process id or port. */
  id: v.pipe(v.string(), v.regex(/^[0-9a-f]{16}$/)),
  url: v.pipe(v.string(), v.url()),
  /** Seconds since 1970. */
  started: v.number(),
  /** PEM file of its certificate, where it serves TLS. */
  tls_cert: v.optional(v.string()),
});

export type RunningNode = v.InferOutput<typeof NODE>;

const HEALTH = v.object({ status: v.literal("ok"), node: v.string() });
/** Of a busy machine; one that answers at once costs no wait. */
const ANSWER_LIMIT_MS = 5000;

function folder(): string {
  return join(resolvePaths().data, "nodes");
}

export function newNodeId(): string {
  return randomBytes(8).toString("hex");
}

/** Leaves the file; returns what takes it away. Throws permission_denied when the folder cannot be made. */
export function announceNode(node: RunningNode): () => void {
  makeFolder(folder(), "note that this node runs");
  const path = join(folder(), `${node.pid}.json`);
  writeFileSync(path, `${JSON.stringify(node)}\n`, { mode: 0o600 });
  return () => rmSync(path, { force: true });
}

/** The nodes that answer, oldest first. */
export async function runningNodes(): Promise<RunningNode[]> {
  let names: string[];
  try {
    names = readdirSync(folder()).filter((name) => /^\d+\.json$/.test(name));
  } catch {
    return []; // no node was ever started
  }
  const found = await Promise.all(names.map((name) => alive(join(folder(), name))));
  return found.flatMap((node) => (node === undefined ? [] : [node])).sort((a, b) => a.started - b.started);
}

async function alive(path: string): Promise<RunningNode | undefined> {
  const node = read(path);
  if (node === undefined) return undefined;
  if (!processExists(node.pid)) {
    rmSync(path, { force: true });
    return undefined;
  }
  try {
    const reply = await askNode(node, "/health", { signal: AbortSignal.timeout(ANSWER_LIMIT_MS) });
    const health = v.safeParse(HEALTH, await reply.json());
    return health.success && health.output.node === node.id ? node : undefined;
  } catch {
    return undefined; // it is just starting or ending, or somebody else has the port
  }
}

function read(path: string): RunningNode | undefined {
  try {
    const parsed = v.safeParse(NODE, JSON.parse(readFileSync(path, "utf8")));
    return parsed.success ? parsed.output : undefined;
  } catch {
    return undefined; // half-written, or taken away in between
  }
}

function processExists(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (thrown) {
    // Somebody else's process: not our node, but it exists.
    return thrown instanceof Error && "code" in thrown && thrown.code === "EPERM";
  }
}

/** fetch() from a node of this machine: past proxies, and trusting its own certificate and no other. */
export function askNode(
  node: { url: string; tls_cert?: string | undefined },
  path: string,
  init: RequestInit = {},
): Promise<Response> {
  talkDirectly(new URL(node.url).hostname);
  return fetch(`${node.url}${path}`, { ...init, ...tlsOf(node.tls_cert) });
}

function tlsOf(certificate: string | undefined): {
  tls?: { ca: string; checkServerIdentity: () => undefined };
} {
  if (certificate === undefined) return {};
  // The certificate is for the name that others call the machine by; here it is reached by address.
  return { tls: { ca: readFileSync(certificate, "utf8"), checkServerIdentity: () => undefined } };
}

/** Bun's fetch goes through HTTP_PROXY to this machine too, unless NO_PROXY names it. */
function talkDirectly(host: string): void {
  const others = process.env.NO_PROXY ?? process.env.no_proxy;
  if (others?.split(",").includes(host)) return;
  process.env.NO_PROXY = [...(others === undefined || others === "" ? [] : [others]), host].join(",");
}
