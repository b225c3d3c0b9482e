// Any node answers any request: one for a model that another node runs is passed on to that node, and its answer comes back as
// it is made. Key, host and origin of the client are checked here, before; the other node trusts this one.

import * as v from "valibot";
import type { CaravanError } from "../../errors.ts";
import { anthropicErrorBody } from "../anthropic/errors.ts";
import { errorBodyOf, isAnthropic } from "../error-family.ts";
import { errorFrame } from "../error-response.ts";
import type { Lifecycle } from "../lifecycle.ts";
import { type BodyLimits, parseJson, readBody } from "../limits.ts";
import type { ApiContext } from "../routes.ts";
import type { AnswersHere, ClusterService } from "./service.ts";

/** Paths whose body names the model that answers. */
const PATHS: ReadonlySet<string> = new Set([
  "/v1/chat/completions",
  "/v1/completions",
  "/v1/responses",
  "/v1/messages",
  "/v1/messages/count_tokens",
  "/v1/tokenize",
  "/v1/detokenize",
  "/v1/apply-template",
  "/api/chat",
  "/api/generate",
  "/api/show",
  "/bench/chat/completions",
]);

/** A request without a limit of its own counts as so many tokens of answer. */
const TYPICAL_ANSWER_TOKENS = 512;
const BYTES_A_TOKEN = 4;

const count = v.optional(v.nullable(v.number()));
const Named = v.object({
  model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)),
  max_tokens: count,
  max_completion_tokens: count,
  max_output_tokens: count,
});

const encoder = new TextEncoder();

export interface ForwardingOptions {
  cluster: ClusterService;
  lifecycle: Lifecycle;
  limits: BodyLimits;
  maxConcurrentRequests: number;
}

/** Middleware for all paths, behind the checks. */
export function forwarding(options: ForwardingOptions) {
  const { cluster, lifecycle, limits } = options;
  return async (context: ApiContext, next: () => Promise<void>): Promise<Response | undefined> => {
    const { path, method } = context.req;
    if (method !== "POST" || !PATHS.has(path) || context.env?.fromMember === true || !cluster.mayPass()) {
      await next();
      return undefined;
    }
    const request = context.req.raw;
    const body = await readBody(request, limits, context.get("body"));
    // Whoever answers here reads it again.
    context.req.raw = new Request(request, { body });
    const named = v.safeParse(Named, await parsed(body));
    if (!named.success) {
      await next(); // says what is wrong with it
      return undefined;
    }
    const { model, ...limitsOfAnswer } = named.output;
    const ticket = lifecycle.enter(options.maxConcurrentRequests, request.signal);
    const answer = Object.values(limitsOfAnswer).find((value) => typeof value === "number");
    let reply: Response | AnswersHere;
    try {
      reply = await cluster.pass({
        id: context.get("requestId"),
        model,
        tokens: Math.ceil(body.length / BYTES_A_TOKEN) + (answer ?? TYPICAL_ANSWER_TOKENS),
        method,
        path: `${path}${new URL(request.url).search}`,
        headers: request.headers,
        body,
        signal: ticket.signal,
        onBroken: (error, whole) => lastWords(path, error, whole),
        onEnd: ticket.release,
      });
    } catch (thrown) {
      ticket.release();
      throw thrown;
    }
    if (!(reply instanceof Response)) {
      ticket.release();
      try {
        await next();
      } finally {
        reply.release();
      }
      return undefined;
    }
    context.set("route", path);
    context.env?.keepOpen?.();
    return reply;
  };
}

async function parsed(body: Uint8Array): Promise<unknown> {
  try {
    return await parseJson(body);
  } catch {
    return undefined; // the route says so
  }
}

/** The error in the form that the stream's reader understands. */
function lastWords(path: string, error: CaravanError, reply: Response): Uint8Array | undefined {
  const type = reply.headers.get("content-type") ?? "";
  if (type.includes("ndjson")) {
    const bodyOf = errorBodyOf(path);
    return bodyOf === undefined ? undefined : encoder.encode(`\n${JSON.stringify(bodyOf(error))}\n`);
  }
  if (!type.startsWith("text/event-stream")) return undefined;
  if (isAnthropic(path))
    return encoder.encode(`\n\nevent: error\ndata: ${JSON.stringify(anthropicErrorBody(error))}\n\n`);
  // The other node's last frame may be half: an empty line ends it.
  return encoder.encode(`\n\n${errorFrame(error)}`);
}
