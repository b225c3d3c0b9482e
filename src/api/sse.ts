// Server-sent events over a pull stream: a frame is made when the client has room for it, so a slow reader costs the
// stream's small buffer and nothing else; what waits upstream is bounded by the request's max_tokens.

import { asCaravanError, CaravanError } from "../errors.ts";
import { errorFrame } from "./error-response.ts";

/** Bytes that may wait in the stream for a slow reader before generation is no longer read. */
const BUFFER_BYTES = 16 * 1024;

export const DONE_FRAME = "data: [DONE]\n\n";
const KEEP_ALIVE_FRAME = ": keep-alive\n\n";

const encoder = new TextEncoder();

/** A comment that every client ignores and a curious one can show. */
export function prefillFrame(done: number, total: number): string {
  return `: prefill ${done}/${total}\n\n`;
}

/** How an API family writes its stream, where that is not OpenAI's way. */
export interface StreamWire {
  contentType?: string;
  /** What ends a stream that fails after its headers were sent. */
  errorFrame: (error: CaravanError) => string;
  /** Sent in silence; must mean nothing to the family's clients. */
  keepAliveFrame?: string;
}

export interface EventStreamOptions {
  /** Whole frames, comments included. Its failure becomes an error frame and the end of the stream. */
  frames: AsyncIterator<string, void>;
  wire?: StreamWire | undefined;
  keepAliveMs: number;
  /** How long a reader may take nothing although there is something for it. */
  stallLimitMs: number;
  /** The client left: stops what makes the frames, at once. */
  cancel: () => void;
  /** Called once, when the stream is over in whatever way; with the error that ended it, if one did. */
  closed: (error: CaravanError | undefined) => void;
}

/**
 * The response that streams the frames. It waits for the first frame (at most keepAliveMs), so that a failure before
 * it still has its own status: then the promise rejects, and `closed` has been called.
 */
export async function eventStream(options: EventStreamOptions): Promise<Response> {
  const { frames, keepAliveMs, stallLimitMs } = options;
  let keepAlive: ReturnType<typeof setInterval> | undefined;
  let over = false;
  const close = (error?: CaravanError) => {
    if (over) return;
    over = true;
    clearInterval(keepAlive);
    options.closed(error);
  };

  const giveUp = (error?: CaravanError) => {
    options.cancel();
    close(error);
    // Unwinds the generators that wait for a reader; one that is in the middle of a step hears of cancel().
    frames.return?.().catch(() => undefined);
  };

  let first: Promise<IteratorResult<string, void>> | undefined = frames.next();
  try {
    await settledWithin(first, keepAliveMs);
  } catch (thrown) {
    close(asCaravanError(thrown));
    throw thrown;
  }

  let lastWrite = performance.now();
  const body = new ReadableStream<Uint8Array>(
    {
      start(controller) {
        // Late by up to half an interval, which no client minds; a frame in time makes it unnecessary.
        keepAlive = setInterval(() => {
          const quietMs = performance.now() - lastWrite;
          if ((controller.desiredSize ?? 0) > 0) {
            if (quietMs < keepAliveMs) return;
            lastWrite = performance.now();
            controller.enqueue(encoder.encode(options.wire?.keepAliveFrame ?? KEEP_ALIVE_FRAME));
          } else if (quietMs >= stallLimitMs) {
            giveUp(stalled(stallLimitMs));
            controller.error(stalled(stallLimitMs));
          }
        }, keepAliveMs / 2);
      },
      async pull(controller) {
        try {
          const { value, done } = await (first ?? frames.next());
          first = undefined;
          if (over) return;
          if (done) {
            close();
            controller.close();
            return;
          }
          lastWrite = performance.now();
          controller.enqueue(encoder.encode(value));
        } catch (thrown) {
          if (over) return;
          const error = asCaravanError(thrown);
          close(error);
          controller.enqueue(encoder.encode((options.wire?.errorFrame ?? errorFrame)(error)));
          controller.close();
        }
      },
      cancel: () => giveUp(new CaravanError("cancelled", "The client closed the connection.")),
    },
    new ByteLengthQueuingStrategy({ highWaterMark: BUFFER_BYTES }),
  );
  return new Response(body, {
    headers: {
      "content-type": options.wire?.contentType ?? "text/event-stream; charset=utf-8",
      "cache-control": "no-cache",
      // Proxies that buffer would hold tokens back.
      "x-accel-buffering": "no",
    },
  });
}

function stalled(limitMs: number): CaravanError {
  return new CaravanError("cancelled", `The client has read nothing for ${Math.round(limitMs / 1000)} s.`);
}

/** Resolves when the promise does or the time is over; rejects if the promise does before that. */
async function settledWithin(promise: Promise<unknown>, limitMs: number): Promise<void> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const limit = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, limitMs);
  });
  try {
    await Promise.race([promise, limit]);
  } finally {
    clearTimeout(timer);
  }
}
