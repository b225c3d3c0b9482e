// Measures the bandwidth from this node to another: bytes over a connection of its own for a fraction of a second, which
// the other end counts. It measures what a TLS connection carries, which on fast links is bound by the processor; the
// tensor plane has no TLS, so for it the value is a lower bound.

import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import type { Channel } from "./channel.ts";

/** At most so much is sent, and for so long. */
const MOST_BYTES = 16 * 1024 * 1024;
const MOST_MS = 300;
const PIECE = new Uint8Array(64 * 1024);
const LIMIT_MS = 5000;

const End = v.object({ end: v.literal(true) });
const Counted = v.object({
  bytes: v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(MOST_BYTES)),
  ms: v.pipe(v.number(), v.minValue(0), v.maxValue(60_000)),
});

/** The sending side, on a fresh connection of purpose "probe": bytes/s. Rejects when the other side fails. */
export async function measureBandwidth(channel: Channel): Promise<number> {
  const started = performance.now();
  try {
    let sent = 0;
    while (sent < MOST_BYTES && performance.now() - started < MOST_MS) {
      await channel.sendBytes(PIECE);
      sent += PIECE.length;
    }
    channel.send({ end: true });
    const counted = v.safeParse(Counted, await channel.readJson(LIMIT_MS));
    if (!counted.success) throw new CaravanError("cluster_degraded", "the other node does not count");
    const ms = Math.max(counted.output.ms, 0.01);
    return Math.round((counted.output.bytes / ms) * 1000);
  } finally {
    channel.finish();
  }
}

/** The counting side. Never rejects. */
export async function countProbe(channel: Channel): Promise<void> {
  let bytes = 0;
  let firstMs = 0;
  try {
    for (;;) {
      const frame = await channel.read(LIMIT_MS);
      if (frame === undefined) return;
      if (frame.kind === "bytes") {
        // The first piece starts the clock and does not count: when it left is not known here.
        if (firstMs === 0) firstMs = performance.now();
        else bytes += frame.bytes.length;
        if (bytes > MOST_BYTES) break;
        continue;
      }
      if (!v.is(End, frame.value)) break;
      channel.send({ bytes, ms: firstMs === 0 ? 0 : performance.now() - firstMs });
      channel.finish();
      return;
    }
    channel.close();
  } catch {
    channel.close(); // the other side is gone or silent: there is nothing to tell
  }
}
