// The short code by which a new node joins, and what is computed from it. Its first half is a hash of both nodes' keys
// and of random numbers that each side fixed before it saw the other's; its second half is a secret of the new node that only a
// person carries. The first half shows the member that nobody sits in the middle, the second shows it to the new node.
//
// An attacker in the middle has different keys on his two sides, so the first halves agree with probability 2⁻²⁵ a try,
// and he has to guess the second half, once, to make the new node believe him. The member lets few tries happen.

import { createHash, createHmac, randomBytes, randomInt } from "node:crypto";
import { CaravanError } from "../../errors.ts";
import type { NodeId } from "../types.ts";

/** Crockford's base 32: no I, L, O, U. */
const ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const HALF = 5;
const HALF_VALUES = 2 ** (5 * HALF);

function letters(value: number): string {
  let text = "";
  for (let rest = value, i = 0; i < HALF; i++, rest = Math.floor(rest / 32))
    text = ALPHABET[rest % 32] + text;
  return text;
}

export function newNonce(): string {
  return randomBytes(32).toString("hex");
}

/** What the new node says of its random number before it sees the member's. */
export function commitmentOf(nonce: string): string {
  return createHash("sha256").update(`caravan join commitment\0${nonce}`).digest("hex");
}

/** First half: the same on both sides when both talk to each other. */
export function checkHalf(
  joiner: { id: NodeId; nonce: string },
  member: { id: NodeId; nonce: string },
): string {
  const hash = createHash("sha256")
    .update(`caravan join check\0${joiner.id}\0${joiner.nonce}\0${member.id}\0${member.nonce}`)
    .digest();
  return letters(hash.readUInt32BE(0) % HALF_VALUES);
}

/** Second half, made by the new node. */
export function newSecretHalf(): string {
  return letters(randomInt(HALF_VALUES));
}

/** As people see it. */
export function formatCode(check: string, secret: string): string {
  return `${check}-${secret}`;
}

/** Reads a code as people type it. Throws invalid_argument. */
export function parseCode(text: string): { check: string; secret: string } {
  const plain = text.toUpperCase().replaceAll(/[\s-]/g, "").replaceAll("O", "0").replaceAll(/[IL]/g, "1");
  if (plain.length !== 2 * HALF || [...plain].some((letter) => !ALPHABET.includes(letter))) {
    throw new CaravanError(
      "invalid_argument",
      "a join code has ten letters and digits, such as 7K2QF-M9XPT",
      {
        where: text.slice(0, 40),
      },
    );
  }
  return { check: plain.slice(0, HALF), secret: plain.slice(HALF) };
}

/** Shows that the speaker knows the second half, on this TLS session only. */
export function codeProof(secretHalf: string, session: Buffer, role: "joiner" | "member"): string {
  return createHmac("sha256", secretHalf)
    .update(`caravan join proof\0${role}\0`)
    .update(session)
    .digest("hex");
}
