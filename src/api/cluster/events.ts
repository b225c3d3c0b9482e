// GET /cluster/events: the cluster's state as server-sent events, once at the beginning and at every change, but at most
// a few times a second; a slow reader gets the latest state and misses those in between.

import type { ClusterService } from "./service.ts";

const PAUSE_MS = 250;
const KEEP_ALIVE_MS = 10_000;

const encoder = new TextEncoder();

export function stateStream(cluster: ClusterService, client: AbortSignal): Response {
  let stop: () => void = () => undefined;
  const body = new ReadableStream<Uint8Array>(
    {
      start(controller) {
        let last = "";
        let lastMs = performance.now();
        let timer: ReturnType<typeof setTimeout> | undefined;
        const send = () => {
          timer = undefined;
          // Nobody reads: the state is sent when there is room again, by the next change or the next look.
          if ((controller.desiredSize ?? 0) <= 0) return;
          const text = JSON.stringify(cluster.state());
          if (text === last) return;
          last = text;
          lastMs = performance.now();
          controller.enqueue(encoder.encode(`event: state\ndata: ${text}\n\n`));
        };
        const unwatch = cluster.watch(() => {
          timer ??= setTimeout(send, PAUSE_MS);
        });
        const alive = setInterval(() => {
          send();
          if (performance.now() - lastMs < KEEP_ALIVE_MS || (controller.desiredSize ?? 0) <= 0) return;
          lastMs = performance.now();
          controller.enqueue(encoder.encode(": keep-alive\n\n"));
        }, KEEP_ALIVE_MS / 4);
        stop = () => {
          unwatch();
          clearTimeout(timer);
          clearInterval(alive);
        };
        client.addEventListener("abort", () => stop(), { once: true });
        send();
      },
      cancel: () => stop(),
    },
    new ByteLengthQueuingStrategy({ highWaterMark: 256 * 1024 }),
  );
  return new Response(body, {
    headers: {
      "content-type": "text/event-stream; charset=utf-8",
      "cache-control": "no-cache",
      "x-accel-buffering": "no",
    },
  });
}
