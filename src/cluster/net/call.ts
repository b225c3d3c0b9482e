// One HTTP request passed to another node, on a connection of purpose "call": the request, its answer as it comes, and
// signs of life while nothing comes. Closing the connection cancels the request, from either side.
//
//   caller: {method, path, headers}, bytes …, {end}      callee: {status, headers}, bytes … or {alive} …, {end}

import * as v from "valibot";
import { asCaravanError, CaravanError } from "../../errors.ts";
import { ALIVE_MS, SILENT_MS } from "../requests.ts";
import type { Channel } from "./channel.ts";

const Headers_ = v.pipe(
  v.array(v.tuple([v.pipe(v.string(), v.maxLength(200)), v.pipe(v.string(), v.maxLength(8192))])),
  v.maxLength(64),
);
const RequestSchema = v.object({
  method: v.picklist(["GET", "POST"]),
  path: v.pipe(v.string(), v.maxLength(2048), v.startsWith("/")),
  headers: Headers_,
});
const ReplySchema = v.object({
  status: v.pipe(v.number(), v.integer(), v.minValue(200), v.maxValue(599)),
  headers: Headers_,
});
const End = v.object({ end: v.literal(true) });
const Alive = v.object({ alive: v.literal(true) });

/** What makes sense only between a client and its own server, and what the gateway decides itself. */
const NOT_PASSED_ON = new Set([
  "host",
  "connection",
  "content-length",
  "transfer-encoding",
  "keep-alive",
  "upgrade",
  "te",
  "trailer",
  "expect",
  "authorization",
  "x-api-key",
  "cookie",
  "set-cookie",
  "origin",
  "accept-encoding",
  "access-control-allow-origin",
  "access-control-expose-headers",
  "vary",
  "date",
]);

/** How long the body of a request may take to arrive from a member. */
const BODY_LIMIT_MS = 30_000;

function passedOn(headers: Headers): [string, string][] {
  return [...headers]
    .filter(([name, value]) => !NOT_PASSED_ON.has(name) && value.length <= 8192)
    .slice(0, 64);
}

export interface CallOptions {
  channel: Channel;
  request: { method: "GET" | "POST"; path: string; headers: Headers; body: Uint8Array };
  /** A byte or a sign of life came. */
  onHeard: () => void;
  /** The answer is complete, or is over in another way. Called once. */
  onEnd: () => void;
  /** Bytes that end a stream whose other node was lost; undefined: the connection to the client is broken off. */
  onBroken: (error: CaravanError, reply: Response) => Uint8Array | undefined;
}

/** Sends the request and resolves with the answer, whose body streams. Rejects when the node is lost before it answers. */
export async function callNode(options: CallOptions): Promise<Response> {
  const { channel, request, onHeard } = options;
  let over = false;
  const end = () => {
    if (over) return;
    over = true;
    options.onEnd();
  };
  try {
    channel.send({ method: request.method, path: request.path, headers: passedOn(request.headers) });
    await channel.sendBytes(request.body);
    channel.send({ end: true });
    for (;;) {
      const value = await channel.readJson(SILENT_MS);
      onHeard();
      if (v.is(Alive, value)) continue;
      const { status, headers } = v.parse(ReplySchema, value);
      const reply = new Response(null, { status, headers: new Headers(headers) });
      if (status === 204) {
        channel.finish();
        end();
        return reply;
      }
      return new Response(bodyOf(options, reply, end), { status, headers: reply.headers });
    }
  } catch (thrown) {
    channel.close();
    end();
    throw lost(thrown);
  }
}

function bodyOf(options: CallOptions, reply: Response, end: () => void): ReadableStream<Uint8Array> {
  const { channel, onHeard, onBroken } = options;
  return new ReadableStream<Uint8Array>({
    async pull(controller) {
      try {
        for (;;) {
          const frame = await channel.read(SILENT_MS);
          if (frame === undefined) throw new CaravanError("cluster_degraded", "the other node ended early");
          onHeard();
          if (frame.kind === "bytes") {
            controller.enqueue(frame.bytes);
            return;
          }
          if (v.is(Alive, frame.value)) continue;
          if (!v.is(End, frame.value))
            throw new CaravanError("cluster_degraded", "the answer makes no sense");
          channel.finish();
          end();
          controller.close();
          return;
        }
      } catch (thrown) {
        channel.close();
        end();
        const error = lost(thrown);
        const last = onBroken(error, reply);
        if (last === undefined) {
          controller.error(error);
          return;
        }
        controller.enqueue(last);
        controller.close();
      }
    },
    cancel() {
      channel.close(new CaravanError("cancelled", "The client closed the connection."));
      end();
    },
  });
}

function lost(thrown: unknown): CaravanError {
  const error = asCaravanError(thrown);
  if (error.code === "cluster_degraded" || error.code === "cancelled") return error;
  return new CaravanError("cluster_degraded", `The node that computed the answer is lost: ${error.message}`, {
    hint: "Send the request again in a few seconds.",
    retryAfterSeconds: 2,
  });
}

export interface ServeCallOptions {
  channel: Channel;
  maxBodyBytes: number;
  /** Answers the request; its signal aborts when the caller goes. */
  handle: (request: Request) => Promise<Response>;
}

/** The callee's side. Never rejects. */
export async function serveCall({ channel, maxBodyBytes, handle }: ServeCallOptions): Promise<void> {
  const cancel = new AbortController();
  channel.closed.then((why) => cancel.abort(why));
  try {
    const { method, path, headers } = v.parse(RequestSchema, await channel.readJson(BODY_LIMIT_MS));
    const body = await readBody(channel, maxBodyBytes);
    const request = new Request(`http://localhost${path}`, {
      method,
      headers: new Headers(headers),
      signal: cancel.signal,
      ...(method === "GET" ? {} : { body }),
    });
    const alive = setInterval(() => channel.send({ alive: true }), ALIVE_MS);
    channel.closed.then(() => clearInterval(alive));
    // From here on the caller only ever closes: reading on notices it.
    void channel.read().then(
      () => channel.close(),
      () => undefined,
    );
    try {
      const reply = await handle(request);
      channel.send({ status: reply.status, headers: passedOn(reply.headers) });
      if (reply.body !== null) for await (const piece of reply.body) await channel.sendBytes(piece);
      channel.send({ end: true });
    } finally {
      clearInterval(alive);
    }
    channel.finish();
  } catch {
    channel.close(); // the caller is gone, or sends what makes no sense
  }
}

async function readBody(channel: Channel, limit: number): Promise<Uint8Array> {
  const pieces: Uint8Array[] = [];
  let size = 0;
  for (;;) {
    const frame = await channel.read(BODY_LIMIT_MS);
    if (frame === undefined) throw new CaravanError("cluster_degraded", "the request is cut off");
    if (frame.kind === "json") {
      v.parse(End, frame.value);
      return Buffer.concat(pieces);
    }
    size += frame.bytes.length;
    if (size > limit) throw new CaravanError("request_too_large", "the request's body is too large");
    pieces.push(frame.bytes);
  }
}
