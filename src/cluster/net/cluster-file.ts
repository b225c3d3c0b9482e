// The cluster that this node belongs to: its name, its secrets, the nodes whose keys it knows and those that were removed
// (cluster.json, 0600). How secrets change is in rotation.ts.
// Without the file there is no cluster: the node opens no port besides its API.

import { createHash, randomBytes } from "node:crypto";
import { rmSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import type { NodeId } from "../types.ts";
import { readPrivateFile, writePrivateFile } from "./private-file.ts";

/** A node that has been met: its key is pinned by its id. */
export interface KnownNode {
  id: NodeId;
  name: string;
  /** Where it was met last, host:port. */
  addresses: string[];
}

/** A node that may not be a member again with this key. */
export interface RemovedNode {
  id: NodeId;
  name: string;
}

export interface ClusterCredentials {
  /** For people; it also keeps clusters of one network apart. */
  name: string;
  /** 32 random bytes, base64. Who has it, and was not removed, is a member. */
  secret: string;
  /** Counts secrets: every removal makes a new one. For people: it decides nothing. */
  generation: number;
  /** Secrets before this one, the latest first. Good only for nodes that are known here and missed the change. */
  previous: string[];
  removed: RemovedNode[];
  nodes: KnownNode[];
}

const MAX_NODES = 256;
/** Secrets that are kept: a node that missed more removals in a row has to join again. */
export const MAX_PREVIOUS = 8;
export const MAX_REMOVED = 1024;
export const MAX_GENERATION = 1_000_000_000;

export const ClusterNameSchema = v.pipe(
  v.string(),
  v.regex(
    /^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$/,
    "a cluster name is 1 to 48 letters, digits, dots, dashes or underscores",
  ),
);
export const NodeIdSchema = v.pipe(v.string(), v.regex(/^[0-9a-f]{64}$/));
export const AddressSchema = v.pipe(v.string(), v.maxLength(300), v.regex(/^\S+:\d{1,5}$/));
/** Text for people from another node. */
export const NameSchema = v.pipe(v.string(), v.minLength(1), v.maxLength(120));

const SecretSchema = v.pipe(
  v.string(),
  v.check((text) => Buffer.from(text, "base64").length === 32, "a secret has 32 bytes"),
);

export const CredentialsSchema = v.object({
  name: ClusterNameSchema,
  secret: SecretSchema,
  generation: v.optional(v.pipe(v.number(), v.safeInteger(), v.minValue(1), v.maxValue(MAX_GENERATION)), 1),
  previous: v.optional(v.pipe(v.array(SecretSchema), v.maxLength(MAX_PREVIOUS)), []),
  removed: v.optional(
    v.pipe(v.array(v.object({ id: NodeIdSchema, name: NameSchema })), v.maxLength(MAX_REMOVED)),
    [],
  ),
  nodes: v.pipe(
    v.array(
      v.object({
        id: NodeIdSchema,
        name: NameSchema,
        addresses: v.pipe(v.array(AddressSchema), v.maxLength(16)),
      }),
    ),
    v.maxLength(MAX_NODES),
  ),
});

export function newSecret(): string {
  return randomBytes(32).toString("base64");
}

export function newCluster(name: string): ClusterCredentials {
  const checked = v.safeParse(ClusterNameSchema, name);
  if (!checked.success)
    throw new CaravanError("invalid_argument", checked.issues[0].message, { where: name });
  return { name, secret: newSecret(), generation: 1, previous: [], removed: [], nodes: [] };
}

function pathIn(folder: string): string {
  return join(folder, "cluster.json");
}

/** The cluster of `folder`; undefined when this node is in none. */
export function loadCluster(folder: string): ClusterCredentials | undefined {
  const path = pathIn(folder);
  const text = readPrivateFile(path);
  if (text === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    value = undefined; // said below, as for any other content that is not a cluster
  }
  const parsed = v.safeParse(CredentialsSchema, value);
  if (parsed.success) return parsed.output;
  throw new CaravanError("bad_file", `the cluster's file is damaged: ${parsed.issues[0].message}`, {
    where: path,
    hint: "Remove it and join the cluster again with `caravan join`.",
  });
}

export function saveCluster(folder: string, cluster: ClusterCredentials): void {
  writePrivateFile(pathIn(folder), `${JSON.stringify(cluster, null, 2)}\n`, "keep the cluster's secret");
}

/** Forgets the cluster. The node's own key stays. */
export function forgetCluster(folder: string): void {
  rmSync(pathIn(folder), { force: true });
}

/** The cluster with `node` among the known ones; the same object when nothing is new. */
export function withKnownNode(cluster: ClusterCredentials, node: KnownNode): ClusterCredentials {
  const before = cluster.nodes.find(({ id }) => id === node.id);
  if (before !== undefined && JSON.stringify(before) === JSON.stringify(node)) return cluster;
  const others = cluster.nodes.filter(({ id }) => id !== node.id);
  // Full: the one that was added first goes; it is known again as soon as it is met.
  return { ...cluster, nodes: [...others.slice(-(MAX_NODES - 1)), node] };
}

/** A public name of a secret: 16 hex digits, which tell nothing of it. */
export function secretName(secret: string): string {
  return purposeKey(secret, "name of this secret").toString("hex").slice(0, 16);
}

/** A key for one purpose, so that a MAC made for one is nothing in another. 32 bytes. */
export function purposeKey(secret: string, purpose: string): Buffer {
  return createHash("sha256").update(`caravan ${purpose}\0`).update(Buffer.from(secret, "base64")).digest();
}
