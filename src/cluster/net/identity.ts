// Who this node is: a private key that never leaves its file, the certificate over it, and the count of its starts.
// A node is its key: it keeps its id over restarts, new names and new addresses, and loses it only with the file.

import { createPrivateKey, generateKeyPairSync } from "node:crypto";
import { join } from "node:path";
import { CaravanError } from "../../errors.ts";
import type { NodeId } from "../types.ts";
import { nodeIdOf, selfSignedCertificate } from "./certificate.ts";
import { readPrivateFile, writePrivateFile } from "./private-file.ts";

export interface Identity {
  readonly id: NodeId;
  /** PEM, PKCS #8. */
  readonly privateKey: string;
  /** PEM. */
  readonly certificate: string;
}

/** Where a node keeps what belongs to the cluster, below caravan's data folder. */
export function clusterFolder(dataFolder: string): string {
  return join(dataFolder, "cluster");
}

const PEM_KEY = /-----BEGIN PRIVATE KEY-----[^-]+-----END PRIVATE KEY-----\n?/;
const PEM_CERTIFICATE = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----\n?/;

/** A new one, in memory. */
export function newIdentity(): Identity {
  const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const certificate = selfSignedCertificate(privateKey, "caravan node");
  const pem = privateKey.export({ type: "pkcs8", format: "pem" });
  return { id: nodeIdOf(certificate), privateKey: String(pem), certificate };
}

/** The identity in `folder`, made at the first call. Throws bad_file or permission_denied rather than becoming another node. */
export function loadIdentity(folder: string): Identity {
  const path = join(folder, "node.pem");
  const text = readPrivateFile(path);
  if (text === undefined) return renewIdentity(folder);
  const privateKey = PEM_KEY.exec(text)?.[0];
  const certificate = PEM_CERTIFICATE.exec(text)?.[0];
  try {
    if (privateKey === undefined || certificate === undefined) throw new Error("a part is missing");
    // The certificate must be of this key, or no TLS handshake would succeed.
    const id = nodeIdOf(certificate);
    if (nodeIdOf(selfSignedCertificate(createPrivateKey(privateKey), "check")) !== id)
      throw new Error("the certificate is of another key");
    return { id, privateKey, certificate };
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new CaravanError("bad_file", `this node's key is damaged: ${reason}`, {
      where: path,
      hint: "Restore the file, or remove it: the node then gets a new id and has to join its cluster again.",
      cause,
    });
  }
}

/** Makes this machine another node. No node of it may run. */
export function renewIdentity(folder: string): Identity {
  const made = newIdentity();
  writePrivateFile(join(folder, "node.pem"), made.privateKey + made.certificate, "keep this node's key");
  return made;
}

/** One more than at the last start; the number that lets a restarted node replace itself. Not a clock, which may jump. */
export function nextIncarnation(folder: string): number {
  const path = join(folder, "incarnation");
  const text = readPrivateFile(path)?.trim();
  // A damaged count must not fall behind what peers remember: the time is far above any count of starts.
  const last =
    text === undefined ? 0 : /^\d{1,15}$/.test(text) ? Number(text) : Math.floor(Date.now() / 1000);
  writePrivateFile(path, `${last + 1}\n`, "count this node's starts");
  return last + 1;
}
