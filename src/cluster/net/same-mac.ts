// Compares a MAC or proof that somebody sent with the one that is right, in a time that does not tell how much of it is.

import { timingSafeEqual } from "node:crypto";

/** Both as lower-case hex; as text, so that there is one way to write each. */
export function sameMac(given: string, wanted: string): boolean {
  const [a, b] = [Buffer.from(given), Buffer.from(wanted)];
  return a.length === b.length && timingSafeEqual(a, b);
}
