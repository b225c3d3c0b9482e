// Server-sent events over a pull stream: a frame is made when the client has room for it, so a slow reader costs the
// stream's small buffer and nothing else; what waits upstream is bounded by the request's max_tokens.

import { asCaravanError, type CaravanError } from "../errors.ts";
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

export interface EventStreamOptions {
  /** Whole frames, comments included. Its failure becomes an error frame and the end of the stream. */
  frames: AsyncIterator<string, void>;
  keepAliveMs: number;
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
  const { frames, keepAliveMs, cancel } = options;
  let keepAlive: ReturnType<typeof setInterval> | undefined;
  let over = false;
  const close = (error?: CaravanError) => {
    if (over) return;
    over = true;
    clearInterval(keepAlive);
    options.closed(error);
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
          const quiet = performance.now() - lastWrite >= keepAliveMs;
          if (quiet && (controller.desiredSize ?? 0) > 0) write(KEEP_ALIVE_FRAME);
        }, keepAliveMs / 2);
        const write = (frame: string) => {
          lastWrite = performance.now();
          controller.enqueue(encoder.encode(frame));
        };
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
          controller.enqueue(encoder.encode(errorFrame(error)));
          controller.close();
        }
      },
      cancel() {
        cancel();
        close();
        // Unwinds the generators that wait for a reader; one that is in the middle of a step hears of cancel().
        frames.return?.().catch(() => undefined);
      },
    },
    new ByteLengthQueuingStrategy({ highWaterMark: BUFFER_BYTES }),
  );
  return new Response(body, {
    headers: {
      "content-type": "text/event-stream; charset=utf-8",
      "cache-control": "no-cache",
      // Proxies that buffer would hold tokens back.
      "x-accel-buffering": "no",
    },
  });
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
