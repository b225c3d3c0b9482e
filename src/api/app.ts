// The HTTP API as a Hono app: the checks that every request passes, and the routes. Importing it does nothing;
// app.request() serves tests, server.ts a socket.

import { Hono } from "hono";
import { PAGE_FILES } from "../dashboard/page.ts";
import { asCaravanError, CaravanError } from "../errors.ts";
import { createLogger, type Logger } from "../log.ts";
import { countTokensRoute, messagesRoute } from "./anthropic/messages.ts";
import { Keys } from "./auth.ts";
import { BodyBudget } from "./body-budget.ts";
import { forwarding } from "./cluster/forwarding.ts";
import { clusterRoutes } from "./cluster/routes.ts";
import type { ClusterService } from "./cluster/service.ts";
import { ANTHROPIC, errorBodyOf, isAnthropic } from "./error-family.ts";
import { errorResponse } from "./error-response.ts";
import { Lifecycle } from "./lifecycle.ts";
import type { ModelDirectory } from "./model-directory.ts";
import { ollamaChatRoute, ollamaGenerateRoute } from "./ollama/generate.ts";
import { psRoute, showRoute, tagsRoute, versionRoute } from "./ollama/models.ts";
import { chatRoute } from "./openai/chat.ts";
import { completionsRoute } from "./openai/completions.ts";
import { listModelsRoute, retrieveModelRoute } from "./openai/models.ts";
import { responsesRoute } from "./openai/responses.ts";
import { openapiRoute } from "./openapi/document.ts";
import { benchChatRoute } from "./ops/bench-chat.ts";
import { healthRoute } from "./ops/health.ts";
import { History } from "./ops/history.ts";
import { loginRoute, logoutRoute, whoRoute } from "./ops/login.ts";
import { metricsRoute, ServingMetrics } from "./ops/metrics.ts";
import { deleteRoute, type ModelLibrary, pullRoute } from "./ops/model-library.ts";
import { loadRoute, unloadRoute } from "./ops/models-admin.ts";
import { readyRoute } from "./ops/ready.ts";
import { TraceLog } from "./ops/request-trace.ts";
import { listRequestsRoute, requestRoute } from "./ops/requests.ts";
import { corsHeaders, hostCheck, originCheck, preflightHeaders } from "./origin.ts";
import { type ApiContext, type ApiEnv, route } from "./routes.ts";
import type { ApiDependencies } from "./serve-generation.ts";
import { type ApiSettings, DEFAULT_SETTINGS } from "./settings.ts";
import { applyTemplateRoute, detokenizeRoute, tokenizeRoute } from "./text/text-routes.ts";

export interface AppOptions {
  models: ModelDirectory;
  /** Merged over DEFAULT_SETTINGS. */
  settings?: Partial<ApiSettings>;
  /** Shared with the server that drains it. */
  lifecycle?: Lifecycle;
  log?: Logger;
  /** This node's part in a cluster; absent: none. */
  cluster?: ClusterService;
  /** What pulls and deletes models; absent: nothing does. */
  library?: ModelLibrary;
  /** Shown by /health, so that tools on this machine know the node again. */
  nodeId?: string;
}

/** The path that a supervisor asks without a key, also while the node is shutting down. */
const HEALTH = "/health";
const ADMIN = { scope: "administration" } as const;
/** Where one gets what opens the rest. */
const LOGIN = "/login";

/** Answers 503 until a model is loaded, which is no failure. */
const READY = "/ready";
/** What open pages and monitors ask every few seconds: the log has it at level debug. */
const POLLED = new Set([
  HEALTH,
  READY,
  LOGIN,
  "/metrics",
  "/history",
  "/requests",
  "/v1/models",
  "/cluster/state",
]);

function isPolled(method: string, path: string): boolean {
  return method === "GET" && (POLLED.has(path) || path in PAGE_FILES);
}

const REQUEST_ID = /^[\w.:-]{1,128}$/;

export function createApp(options: AppOptions): Hono<ApiEnv> {
  const metrics = new ServingMetrics();
  const history = new History();
  const deps: ApiDependencies = {
    models: options.models,
    settings: { ...DEFAULT_SETTINGS, ...options.settings },
    lifecycle: options.lifecycle ?? new Lifecycle(),
    log: options.log ?? createLogger({ level: "silent" }),
    metrics,
    traces: new TraceLog(metrics, history),
    history,
  };
  const keys = new Keys(deps.settings.apiKeys, deps.settings.adminKeys);
  const app = new Hono<ApiEnv>();
  useChecks(app, deps, keys);
  if (options.cluster !== undefined)
    app.use(
      forwarding({
        ...deps,
        cluster: options.cluster,
        limits: deps.settings,
        maxConcurrentRequests: deps.settings.maxConcurrentRequests,
      }),
    );

  for (const [path, serve] of Object.entries(PAGE_FILES)) route(app, path, { GET: serve });
  route(app, HEALTH, { GET: healthRoute(options.nodeId) });
  route(app, LOGIN, { GET: whoRoute(keys), POST: loginRoute(keys, deps.settings) });
  route(app, "/logout", { POST: logoutRoute(keys, deps.settings) });
  route(app, READY, { GET: readyRoute(deps) });
  route(app, "/openapi.json", { GET: openapiRoute() });
  route(app, "/metrics", { GET: metricsRoute(deps) });
  route(app, "/history", { GET: () => Response.json(history) });
  route(app, "/requests", { GET: listRequestsRoute(deps) }, ADMIN);
  route(app, "/models/load", { POST: loadRoute(deps) }, ADMIN);
  route(app, "/models/unload", { POST: unloadRoute(deps) }, ADMIN);
  route(app, "/models/pull", { POST: pullRoute(deps, options.library) }, ADMIN);
  route(app, "/models/delete", { POST: deleteRoute(deps, options.library) }, ADMIN);
  route(app, "/requests/:id", { GET: requestRoute(deps) });
  route(app, "/bench/chat/completions", { POST: benchChatRoute(deps) });
  route(app, "/v1/models", { GET: listModelsRoute(deps) });
  route(app, "/v1/models/:id{.+}", { GET: retrieveModelRoute(deps) });
  route(app, "/v1/chat/completions", { POST: chatRoute(deps) });
  route(app, "/v1/completions", { POST: completionsRoute(deps) });
  route(app, "/v1/tokenize", { POST: tokenizeRoute(deps) });
  route(app, "/v1/detokenize", { POST: detokenizeRoute(deps) });
  route(app, "/v1/apply-template", { POST: applyTemplateRoute(deps) });
  route(app, "/v1/responses", { POST: responsesRoute(deps) });
  route(app, ANTHROPIC, { POST: messagesRoute(deps) });
  route(app, `${ANTHROPIC}/count_tokens`, { POST: countTokensRoute(deps) });
  route(app, "/api/chat", { POST: ollamaChatRoute(deps) });
  route(app, "/api/generate", { POST: ollamaGenerateRoute(deps) });
  route(app, "/api/tags", { GET: tagsRoute(deps) });
  route(app, "/api/ps", { GET: psRoute(deps) });
  route(app, "/api/show", { POST: showRoute(deps) });
  route(app, "/api/version", { GET: versionRoute() });

  clusterRoutes(app, options.cluster, deps.settings);

  app.notFound((context) =>
    errorResponse(
      new CaravanError("unknown_url", `There is nothing at ${context.req.method} ${context.req.path}.`),
      {},
      errorBodyOf(context.req.path),
    ),
  );
  app.onError((thrown, context) => {
    const error = asCaravanError(thrown);
    const fields = { request: context.get("requestId"), path: context.req.path, ...error.toJSON() };
    if (error.code === "internal_error")
      deps.log.error("request failed", { ...fields, stack: stackOf(thrown) });
    else if (error.status >= 500 && context.req.path !== READY) deps.log.warn("request failed", fields);
    return errorResponse(error, {}, errorBodyOf(context.req.path));
  });
  return app;
}

/** The innermost stack that there is. */
function stackOf(thrown: Error): string | undefined {
  return thrown.cause instanceof Error ? thrown.cause.stack : thrown.stack;
}

/** Request id, log line, host, origin, key and shutdown, in this order, before any route. */
function useChecks(
  app: Hono<ApiEnv>,
  { settings, lifecycle, log, metrics }: ApiDependencies,
  keys: Keys,
): void {
  const checkHost = hostCheck(settings);
  const budget = new BodyBudget(Math.max(settings.maxTotalBodyBytes, settings.maxBodyBytes));
  const checkOrigin = originCheck(settings.corsOrigins);

  app.use(async (context, next) => {
    const started = performance.now();
    const given = context.req.header("x-request-id");
    const id =
      given !== undefined && REQUEST_ID.test(given)
        ? given
        : `req_${crypto.randomUUID().replaceAll("-", "")}`;
    context.set("requestId", id);
    context.set("startedMs", started);
    context.set("body", budget.open());
    await next();
    context.get("body")?.release();
    metrics.answered(context.get("route"), context.req.method, context.res.status);
    context.res.headers.set("x-request-id", id);
    if (isAnthropic(context.req.path)) context.res.headers.set("request-id", id);
    const asked = isPolled(context.req.method, context.req.path) && context.res.status < 400;
    log[asked ? "debug" : "info"]("request", {
      request: id,
      method: context.req.method,
      path: context.req.path,
      status: context.res.status,
      ms: Math.round(performance.now() - started),
    });
  });

  app.use(async (context, next) => {
    if (context.env?.fromMember === true) {
      context.set("scope", "inference");
      lifecycle.requireOpen();
      await next();
      return;
    }
    const host = context.req.header("host") ?? hostOf(context.req.url);
    checkHost(host);
    const origin = checkOrigin(context.req.header("origin") ?? null, host);
    const preflight = isPreflight(context);
    const { path } = context.req;
    const open = path in PAGE_FILES || path === HEALTH || path === LOGIN || preflight;
    // A listed page of another origin presents a key of its own, not the cookie of whoever sits at the browser.
    context.set("scope", open ? "inference" : keys.scopeOf(context.req.raw.headers, origin === undefined));
    if (!open) lifecycle.requireOpen();
    await next();
    if (origin === undefined) return;
    setHeaders(context, corsHeaders(origin));
    if (!preflight) return;
    const allow = context.res.headers.get("allow") ?? "OPTIONS";
    setHeaders(
      context,
      preflightHeaders(allow, context.req.header("access-control-request-headers") ?? null),
    );
  });
}

/** The host of a request that has no Host header: tests give a whole URL; a socket (HTTP/1.0) gives a path alone, in
 * which routes would not be found either. Throws invalid_argument. */
function hostOf(url: string): string {
  if (URL.canParse(url)) return new URL(url).host;
  throw new CaravanError("invalid_argument", "The request has no Host header.", { hint: "Use HTTP/1.1." });
}

/** A browser asks before it sends; it sends no key with the question. */
function isPreflight(context: ApiContext): boolean {
  return (
    context.req.method === "OPTIONS" && context.req.header("access-control-request-method") !== undefined
  );
}

function setHeaders(context: ApiContext, headers: Record<string, string>): void {
  for (const [name, value] of Object.entries(headers)) context.res.headers.set(name, value);
}
