// Registers a path with all its methods at once, so that a wrong method gets 405 with Allow and OPTIONS an answer.

import type { Context, Hono } from "hono";
import { CaravanError } from "../errors.ts";
import { requireScope, type Scope } from "./auth.ts";
import type { BodyLease } from "./body-budget.ts";
import { errorBodyOf } from "./error-family.ts";
import { errorResponse } from "./error-response.ts";

export interface ApiEnv {
  Bindings: {
    /** Lifts the server's idle timeout from this connection; absent without a server (tests). */
    keepOpen?: () => void;
    /** Another node of the cluster passed the request on; it has checked key, host and origin. */
    fromMember?: boolean;
  };
  Variables: {
    requestId: string;
    /** performance.now() at the request's arrival. */
    startedMs: number;
    /** The path as it is registered. */
    route: string;
    /** What the request's key may do. */
    scope: Scope;
    /** What the body holds of the memory for all bodies; taken over by streams, which outlive the handler. */
    body: BodyLease | undefined;
    /** The times between tokens are kept (bench). */
    measured: boolean;
  };
}

export type ApiContext = Context<ApiEnv>;
export type Handler = (context: ApiContext) => Response | Promise<Response>;

/** Methods of a path. GET serves HEAD too. */
export type Methods = { GET?: Handler; POST?: Handler; DELETE?: Handler };

/** The value of Allow for these methods. */
function allowHeader(methods: Methods): string {
  const names = Object.keys(methods).flatMap((name) => (name === "GET" ? ["GET", "HEAD"] : [name]));
  return [...names, "OPTIONS"].join(", ");
}

/** `scope`: what a key must open for every method but OPTIONS. */
export function route(
  app: Hono<ApiEnv>,
  path: string,
  methods: Methods,
  { scope = "inference" }: { scope?: Scope } = {},
): void {
  for (const [name, handler] of Object.entries(methods)) {
    app.on(name, path, (context) => {
      context.set("route", path);
      requireScope(context.get("scope"), scope);
      return handler(context);
    });
  }
  const allow = allowHeader(methods);
  app.all(path, (context) => {
    if (context.req.method === "OPTIONS") return new Response(null, { status: 204, headers: { allow } });
    const { method } = context.req;
    return errorResponse(
      new CaravanError("method_not_allowed", `${context.req.path} does not take ${method}.`, {
        hint: `Use ${allow.replace(", OPTIONS", "")}.`,
      }),
      { allow },
      errorBodyOf(context.req.path),
    );
  });
}
