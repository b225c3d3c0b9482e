// A certificate for localhost and 127.0.0.1 with its key, made on the spot, so that no key lies in the repository.
// X.509 v3 in DER, written out by hand: P-256, signed by itself, one day old and valid for two.

import { createSign, generateKeyPairSync } from "node:crypto";

const tlv = (tag: number, ...parts: Uint8Array[]): Uint8Array => {
  const body = Buffer.concat(parts);
  const length =
    body.length < 128
      ? [body.length]
      : body.length < 256
        ? [0x81, body.length]
        : [0x82, body.length >> 8, body.length & 255];
  return Buffer.concat([Uint8Array.of(tag, ...length), body]);
};
const sequence = (...parts: Uint8Array[]) => tlv(0x30, ...parts);
const oid = (...bytes: number[]) => tlv(0x06, Uint8Array.from(bytes));
const text = (tag: number, value: string) => tlv(tag, Buffer.from(value));

const COMMON_NAME = oid(0x55, 0x04, 0x03);
const SUBJECT_ALT_NAME = oid(0x55, 0x1d, 0x11);
const BASIC_CONSTRAINTS = oid(0x55, 0x1d, 0x13);
const ECDSA_SHA256 = sequence(oid(0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02));

function utcTime(ms: number): Uint8Array {
  const digits = new Date(ms).toISOString().replace(/[-:T]/g, "").slice(2, 14);
  return text(0x17, `${digits}Z`);
}

/** Both in PEM form. */
export function selfSigned(): { cert: string; key: string } {
  const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const day = 24 * 3600 * 1000;
  const name = sequence(tlv(0x31, sequence(COMMON_NAME, text(0x0c, "localhost"))));
  const names = sequence(text(0x82, "localhost"), tlv(0x87, Uint8Array.of(127, 0, 0, 1)));
  const extensions = sequence(
    sequence(SUBJECT_ALT_NAME, tlv(0x04, names)),
    sequence(BASIC_CONSTRAINTS, tlv(0x04, sequence(tlv(0x01, Uint8Array.of(0xff))))),
  );
  const certificate = sequence(
    tlv(0xa0, tlv(0x02, Uint8Array.of(2))),
    tlv(0x02, Uint8Array.of(1)),
    ECDSA_SHA256,
    name,
    sequence(utcTime(Date.now() - day), utcTime(Date.now() + day)),
    name,
    publicKey.export({ type: "spki", format: "der" }),
    tlv(0xa3, extensions),
  );
  const signature = createSign("sha256").update(certificate).sign(privateKey);
  const der = sequence(certificate, ECDSA_SHA256, tlv(0x03, Uint8Array.of(0), signature));
  const lines =
    Buffer.from(der)
      .toString("base64")
      .match(/.{1,64}/g) ?? [];
  return {
    cert: `-----BEGIN CERTIFICATE-----\n${lines.join("\n")}\n-----END CERTIFICATE-----\n`,
    key: privateKey.export({ type: "pkcs8", format: "pem" }) as string,
  };
}
