// The cluster that this node belongs to: its name, its secret, and the nodes whose keys it knows (cluster.json, 0600).
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

export interface ClusterCredentials {
  /** For people; it also keeps clusters of one network apart. */
  name: string;
  /** 32 random bytes, base64. Who has it is a member. */
  secret: string;
  nodes: KnownNode[];
}

const MAX_NODES = 256;

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

export const CredentialsSchema = v.object({
  name: ClusterNameSchema,
  secret: v.pipe(
    v.string(),
    v.check((text) => Buffer.from(text, "base64").length === 32, "a secret has 32 bytes"),
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

export function newCluster(name: string): ClusterCredentials {
  const checked = v.safeParse(ClusterNameSchema, name);
  if (!checked.success)
    throw new CaravanError("invalid_argument", checked.issues[0].message, { where: name });
  return { name, secret: randomBytes(32).toString("base64"), nodes: [] };
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

/** A key for one purpose, so that a MAC made for one is nothing in another. 32 bytes. */
export function purposeKey(secret: string, purpose: string): Buffer {
  return createHash("sha256").update(`caravan ${purpose}\0`).update(Buffer.from(secret, "base64")).digest();
}
