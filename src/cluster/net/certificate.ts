// A node's certificate: self-signed X.509 over an ECDSA P-256 key, written as DER by hand. It carries a key through
// TLS and says nothing else: nobody checks its name or dates, peers compare the hash of its key with the one they
// know. The twenty lines of DER below are all of ASN.1 that this takes, so there is no library for it.

import { createHash, createPublicKey, type KeyObject, randomBytes, sign, X509Certificate } from "node:crypto";
import { CaravanError } from "../../errors.ts";
import type { NodeId } from "../types.ts";

const SEQUENCE = 0x30;
const SET = 0x31;
const INTEGER = 0x02;
const BIT_STRING = 0x03;
const OBJECT_ID = 0x06;
const UTF8_STRING = 0x0c;
const GENERALIZED_TIME = 0x18;
/** [0] EXPLICIT, around the version. */
const CONTEXT_0 = 0xa0;

/** 1.2.840.10045.4.3.2 */
const ECDSA_WITH_SHA256 = Buffer.from("2a8648ce3d040302", "hex");
/** 2.5.4.3 */
const COMMON_NAME = Buffer.from("550403", "hex");

/** Any clock finds itself between these: a node whose clock is wrong must still be able to join. */
const NOT_BEFORE = "20000101000000Z";
/** RFC 5280 section 4.1.2.5: a certificate without an end. */
const NOT_AFTER = "99991231235959Z";

function der(tag: number, ...content: Uint8Array[]): Buffer {
  const body = Buffer.concat(content);
  const { length } = body;
  const size = length < 128 ? [length] : length < 256 ? [0x81, length] : [0x82, length >> 8, length & 255];
  return Buffer.concat([Buffer.from([tag, ...size]), body]);
}

/** PEM of a certificate for the private key (EC, P-256), with `commonName` as issuer and subject. */
export function selfSignedCertificate(privateKey: KeyObject, commonName: string): string {
  const publicKey = createPublicKey(privateKey).export({ type: "spki", format: "der" });
  const algorithm = der(SEQUENCE, der(OBJECT_ID, ECDSA_WITH_SHA256));
  const name = der(
    SEQUENCE,
    der(
      SET,
      der(SEQUENCE, der(OBJECT_ID, COMMON_NAME), der(UTF8_STRING, Buffer.from(commonName.slice(0, 64)))),
    ),
  );
  const serial = randomBytes(16);
  // Positive and of full length, as DER wants an INTEGER without leading zeros.
  serial[0] = ((serial[0] ?? 0) & 0x7f) | 0x40;
  const body = der(
    SEQUENCE,
    der(CONTEXT_0, der(INTEGER, Buffer.from([2]))), // version 3
    der(INTEGER, serial),
    algorithm,
    name,
    der(
      SEQUENCE,
      der(GENERALIZED_TIME, Buffer.from(NOT_BEFORE)),
      der(GENERALIZED_TIME, Buffer.from(NOT_AFTER)),
    ),
    name,
    publicKey,
  );
  const signature = sign("sha256", body, { key: privateKey, dsaEncoding: "der" });
  const whole = der(SEQUENCE, body, algorithm, der(BIT_STRING, Buffer.from([0]), signature));
  const base64 = whole.toString("base64").replace(/.{64}(?=.)/g, "$&\n");
  return `-----BEGIN CERTIFICATE-----\n${base64}\n-----END CERTIFICATE-----\n`;
}

/** The node id that a certificate stands for: SHA-256 of its public key (SubjectPublicKeyInfo), lower-case hex. */
export function nodeIdOf(certificate: Uint8Array | string): NodeId {
  let publicKey: KeyObject;
  try {
    ({ publicKey } = new X509Certificate(certificate));
  } catch (cause) {
    throw new CaravanError("bad_file", "this is not a certificate", { cause });
  }
  return createHash("sha256")
    .update(publicKey.export({ type: "spki", format: "der" }))
    .digest("hex");
}
