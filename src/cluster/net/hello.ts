// The first words of every connection between nodes: protocol version, cluster, node, purpose, and a proof that the
// speaker has the cluster's secret. The proof is a MAC over this TLS session's exported key and both certificates, so that it is of
// no use on any other connection, be it replayed or passed on by somebody in the middle.

import { createHmac } from "node:crypto";
import type { TLSSocket } from "node:tls";
import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import { CARAVAN_PROTOCOL } from "../protocol-version.ts";
import type { NodeId } from "../types.ts";
import { nodeIdOf } from "./certificate.ts";
import type { Channel } from "./channel.ts";
import { type ClusterCredentials, MAX_PREVIOUS, NameSchema, purposeKey, secretName } from "./cluster-file.ts";
import { isKnown, isRemoved, secretsOf } from "./rotation.ts";
import { sameMac } from "./same-mac.ts";

/** What a connection is for; one thing each, so that closing it ends exactly this. */
export const PURPOSES = ["control", "call", "rank", "join", "probe", "file", "rdma"] as const;
export type Purpose = (typeof PURPOSES)[number];

export interface HelloSettings {
  /** undefined: this node is in no cluster and can only ask to join one. */
  cluster: ClusterCredentials | undefined;
  /** `port`: of its own control plane, 0 = none yet. */
  node: { id: NodeId; name: string; version: string; incarnation: number; port: number };
}

export interface Peer {
  id: NodeId;
  name: string;
  version: string;
  incarnation: number;
  /** Where its control plane listens, at the address that it calls from; 0 = nowhere. */
  port: number;
  /** How far its clock is ahead of this one's, give or take the way of a message. Said to people; nothing depends on it. */
  clockAheadMs: number;
  /** Name of the secret that both proved; "" when it asks to join. */
  proved: string;
  /** One of the two has another secret: they have to compare what they know of the cluster (mesh.ts). */
  secretsDiffer: boolean;
}

/** In every protocol version: nothing else is read of a node that speaks another one. */
const AnyVersion = v.object({
  caravan: v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(1_000_000)),
  version: v.pipe(v.string(), v.maxLength(40)),
});

const Refusal = v.object({ refused: v.pipe(v.string(), v.maxLength(1000)) });

/** Said to a node that was removed from the cluster. */
export const REMOVED = "this node's key was removed from the cluster";

const secretId = v.pipe(v.string(), v.regex(/^[0-9a-f]{16}$/));
const Proofs = v.pipe(
  v.array(v.object({ secret: secretId, proof: v.pipe(v.string(), v.maxLength(64)) })),
  v.maxLength(MAX_PREVIOUS + 1),
);

const Hello = v.object({
  purpose: v.picklist(PURPOSES),
  cluster: v.pipe(v.string(), v.maxLength(64)),
  name: NameSchema,
  incarnation: v.pipe(v.number(), v.safeInteger(), v.minValue(0)),
  port: v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(65535)),
  /** Milliseconds since 1970 by the speaker's clock. */
  at: v.pipe(v.number(), v.finite()),
  /** Name of the speaker's latest secret; "" when it asks to join. */
  latest: v.union([secretId, v.literal("")]),
  /** The caller's: one for each of its secrets, the latest first. The callee's: one, for the secret that both have. */
  proofs: Proofs,
});

/** How long either side waits for the other's words. */
export const HELLO_LIMIT_MS = 5000;

/** The other side's node id, from the key that it has just used; TLS has checked that it holds it. */
export function peerIdOf(socket: TLSSocket): NodeId {
  const { raw } = socket.getPeerCertificate() as { raw?: Buffer };
  if (raw === undefined) throw new CaravanError("permission_denied", "the other side shows no certificate");
  return nodeIdOf(raw);
}

/** A value that both ends of a TLS session share and nobody else, 32 bytes. */
export function sessionKey(socket: TLSSocket): Buffer {
  return socket.exportKeyingMaterial(32, "EXPORTER-caravan-hello", Buffer.alloc(0));
}

/** Two certificates, the caller's first, and who speaks. */
function proofOf(
  secret: string,
  socket: TLSSocket,
  role: "caller" | "callee",
  ids: [NodeId, NodeId],
): string {
  return createHmac("sha256", purposeKey(secret, "membership proof"))
    .update(sessionKey(socket))
    .update(`\0${role}\0${ids[0]}\0${ids[1]}`)
    .digest("hex");
}

function words(settings: HelloSettings, purpose: Purpose, proofs: v.InferOutput<typeof Proofs>): object {
  const { name, version, incarnation, port } = settings.node;
  return {
    caravan: CARAVAN_PROTOCOL,
    version,
    purpose,
    cluster: settings.cluster?.name ?? "",
    name,
    incarnation,
    port,
    at: Date.now(),
    latest: purpose === "join" || settings.cluster === undefined ? "" : secretName(settings.cluster.secret),
    proofs,
  };
}

/** The secrets' names are public; a removed node knows the same ones, so an earlier secret proves nothing of an unknown key. */
function agreedOn(cluster: ClusterCredentials, secret: string, peer: NodeId, latest: string): boolean {
  const differ = secret !== cluster.secret || latest !== secretName(secret);
  if (differ && !isKnown(cluster, peer))
    throw new CaravanError(
      "permission_denied",
      "a node that is not known here proves an earlier secret of the cluster",
      { hint: "Let it join again: `caravan cluster leave` and `caravan join` there." },
    );
  return differ;
}

function versionsDiffer(other: v.InferOutput<typeof AnyVersion>, ours: string): CaravanError {
  return new CaravanError(
    "permission_denied",
    `the other node speaks cluster protocol ${other.caravan} (caravan ${other.version}), ` +
      `this one protocol ${CARAVAN_PROTOCOL} (caravan ${ours})`,
    { hint: "Install the same version of caravan on both." },
  );
}

/** The connecting side. Rejects with why the other side refused, or why it is not the node that was meant (`expected`). */
export async function callerHello(
  channel: Channel,
  settings: HelloSettings,
  purpose: Purpose,
  expected?: NodeId,
): Promise<Peer> {
  try {
    const id = peerIdOf(channel.socket);
    if (expected !== undefined && id !== expected) {
      throw new CaravanError(
        "permission_denied",
        "another node than expected answers there: its key differs",
      );
    }
    const { cluster } = settings;
    if (cluster !== undefined && isRemoved(cluster, id)) throw removedThere();
    const ids: [NodeId, NodeId] = [settings.node.id, id];
    const secrets = purpose === "join" || cluster === undefined ? [] : secretsOf(cluster);
    const proofs = secrets.map((secret) => ({
      secret: secretName(secret),
      proof: proofOf(secret, channel.socket, "caller", ids),
    }));
    channel.send(words(settings, purpose, proofs));
    const answer = await channel.readJson(HELLO_LIMIT_MS);
    const peer = read(answer, settings, id);
    let secretsDiffer = false;
    let proved = "";
    if (purpose !== "join") {
      const [theirs] = peer.proofs;
      const secret = secrets.find((each) => secretName(each) === theirs?.secret);
      if (
        cluster === undefined ||
        secret === undefined ||
        theirs === undefined ||
        !sameMac(theirs.proof, proofOf(secret, channel.socket, "callee", ids))
      )
        throw new CaravanError("permission_denied", "the other node does not know this cluster's secret");
      secretsDiffer = agreedOn(cluster, secret, id, peer.latest);
      proved = theirs.secret;
      channel.trust();
    }
    const { name, version, incarnation, port } = peer;
    const clockAheadMs = peer.at - Date.now();
    return { id, name, version, incarnation, port, clockAheadMs, proved, secretsDiffer };
  } catch (thrown) {
    channel.close();
    throw thrown;
  }
}

function read(
  value: unknown,
  settings: HelloSettings,
  id: NodeId,
): v.InferOutput<typeof Hello> & { version: string } {
  const any = v.safeParse(AnyVersion, value);
  if (!any.success)
    throw new CaravanError("permission_denied", "the other side does not speak caravan's protocol");
  if (any.output.caravan !== CARAVAN_PROTOCOL) throw versionsDiffer(any.output, settings.node.version);
  const refusal = v.safeParse(Refusal, value);
  if (refusal.success && refusal.output.refused === REMOVED) throw removedHere();
  if (refusal.success)
    throw new CaravanError("permission_denied", `the other node refuses: ${refusal.output.refused}`);
  const hello = v.safeParse(Hello, value);
  if (!hello.success)
    throw new CaravanError("permission_denied", "the other side does not speak caravan's protocol");
  if (id === settings.node.id)
    throw new CaravanError("permission_denied", "the other node has this node's own key", {
      hint: "One of them runs on a copy of the other's data folder: remove cluster/node.pem there and join again.",
    });
  return { ...hello.output, version: any.output.version };
}

/** What a removed node is told, and what to do. */
export function removedHere(): CaravanError {
  return new CaravanError("permission_denied", REMOVED, {
    hint: "To come back: `caravan cluster leave`, stop `caravan serve`, then `caravan join`, which makes a new key.",
  });
}

function removedThere(): CaravanError {
  return new CaravanError("permission_denied", "the node that answers there was removed from the cluster");
}

/** The side that is called. Rejects after it has told the other side why. */
export async function calleeHello(
  channel: Channel,
  settings: HelloSettings,
): Promise<{ peer: Peer; purpose: Purpose }> {
  try {
    const value = await channel.readJson(HELLO_LIMIT_MS);
    const id = peerIdOf(channel.socket);
    const hello = read(value, settings, id);
    const { name, version, incarnation, port } = hello;
    const clockAheadMs = hello.at - Date.now();
    const peer: Peer = {
      ...{ id, name, version, incarnation, port, clockAheadMs },
      ...{ proved: "", secretsDiffer: false },
    };
    const { cluster } = settings;
    if (cluster === undefined) throw new CaravanError("permission_denied", "this node is in no cluster");
    if (isRemoved(cluster, id)) throw new CaravanError("permission_denied", REMOVED);
    if (hello.purpose === "join") {
      channel.send(words(settings, "join", []));
      return { peer, purpose: hello.purpose };
    }
    if (hello.cluster !== cluster.name)
      throw new CaravanError("permission_denied", "this node belongs to a cluster of another name");
    const ids: [NodeId, NodeId] = [id, settings.node.id];
    const secret = secretsOf(cluster).find((each) =>
      hello.proofs.some(({ secret: called }) => called === secretName(each)),
    );
    const theirs = hello.proofs.find(
      ({ secret: called }) => secret !== undefined && called === secretName(secret),
    );
    if (
      secret === undefined ||
      theirs === undefined ||
      !sameMac(theirs.proof, proofOf(secret, channel.socket, "caller", ids))
    )
      throw new CaravanError("permission_denied", "the proof of the cluster's secret is wrong");
    peer.secretsDiffer = agreedOn(cluster, secret, id, hello.latest);
    peer.proved = theirs.secret;
    channel.trust();
    const proof = proofOf(secret, channel.socket, "callee", ids);
    channel.send(words(settings, hello.purpose, [{ secret: secretName(secret), proof }]));
    return { peer, purpose: hello.purpose };
  } catch (thrown) {
    if (thrown instanceof CaravanError && channel.open) {
      channel.send({
        caravan: CARAVAN_PROTOCOL,
        version: settings.node.version,
        refused: thrown.message,
      });
      channel.finish();
    } else channel.close();
    throw thrown;
  }
}
