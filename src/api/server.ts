// Serves the app on a socket with Bun.serve, and stops it in order: new requests are refused, running ones finish
// within a limit, a second signal ends them at once.

import { readFileSync } from "node:fs";
import type { Hono } from "hono";
import { CaravanError } from "../errors.ts";
import type { Logger } from "../log.ts";
import type { Lifecycle } from "./lifecycle.ts";
import { isLoopback } from "./origin.ts";
import type { ApiEnv } from "./routes.ts";

export interface ServerOptions {
  app: Hono<ApiEnv>;
  /** The one that the app was made with. */
  lifecycle: Lifecycle;
  host: string;
  /** 0 = any free one. */
  port: number;
  /** How long running requests may go on after drain(). */
  drainSeconds: number;
  /** Whether a key is asked for; without one, only this machine is served. */
  keyed: boolean;
  /** PEM files; absent = HTTP without TLS. */
  tls?: TlsFiles;
  log: Logger;
}

export interface TlsFiles {
  /** The certificate and those between it and its authority. */
  cert: string;
  key: string;
}

export interface RunningServer {
  /** `http://host:port` or `https://host:port`, as a client on this machine reaches it. */
  readonly url: string;
  readonly port: number;
  /** Resolves when the server has stopped. The second call ends running requests at once. */
  drain(): Promise<void>;
  /** Resolves once the server has stopped. */
  readonly stopped: Promise<void>;
}

/** Exit code for a port that is taken (EX_UNAVAILABLE); the error's `param` is then `--port`. */
export const PORT_TAKEN_EXIT_CODE = 69;

/** Seconds without a byte in either direction after which a connection that generates nothing is closed. */
const IDLE_SECONDS = 120;

/** How long requests that were cut off get to notice it, and replies to leave, before sockets are closed. */
const LAST_BYTES_MS = 500;

/** Whether it may serve so, before it binds: open to others only with a key, TLS only with readable files. Throws
 * invalid_argument. */
export function checkServing({ host, keyed, tls }: Pick<ServerOptions, "host" | "keyed" | "tls">) {
  if (!keyed && !isLoopback(host)) throw openToAll(host);
  return tls === undefined ? undefined : readTls(tls);
}

/** Starts serving. Throws invalid_argument when the address cannot be bound. */
export function startServer(options: ServerOptions): RunningServer {
  const { app, lifecycle, log } = options;
  const tls = checkServing(options);
  const server = bind(options);
  const url = `${tls === undefined ? "http" : "https"}://${urlHost(options.host)}:${server.port}`;
  if (tls === undefined && !isLoopback(options.host)) {
    log.warn("keys, prompts and answers cross the network unencrypted: no TLS certificate is set", { url });
  }

  let stop: () => void = () => undefined;
  const stopped = new Promise<void>((resolve) => {
    stop = resolve;
  });
  let cutOff: (() => void) | undefined;

  const drain = (): Promise<void> => {
    if (cutOff !== undefined) {
      cutOff();
      return stopped;
    }
    lifecycle.beginDrain();
    log.info("shutting down", { running: lifecycle.running, limit_seconds: options.drainSeconds });
    const cut = new Promise<void>((resolve) => {
      cutOff = resolve;
    });
    void finishRequests(lifecycle, cut, options.drainSeconds, log)
      // Requests that are done may still be writing; then idle connections are closed too.
      .then(() => within([server.stop()], LAST_BYTES_MS))
      .then(() => server.stop(true))
      .then(stop);
    return stopped;
  };

  return { url, port: server.port ?? options.port, drain, stopped };

  function bind({ host, port }: ServerOptions) {
    try {
      return Bun.serve({
        hostname: host,
        port,
        idleTimeout: IDLE_SECONDS,
        ...(tls === undefined ? {} : { tls }),
        // The app has its own limit and answers in JSON; Bun's would answer without a body.
        maxRequestBodySize: Number.MAX_SAFE_INTEGER,
        fetch: (request, running) => app.fetch(request, { keepOpen: () => running.timeout(request, 0) }),
      });
    } catch (thrown) {
      throw tls !== undefined && isTlsError(thrown)
        ? badTls(thrown, options.tls?.cert)
        : bindError(thrown, host, port);
    }
  }
}

/** Waits for running requests, until the limit or the cut; then ends them and gives their last bytes a moment. */
async function finishRequests(
  lifecycle: Lifecycle,
  cut: Promise<void>,
  limitSeconds: number,
  log: Logger,
): Promise<void> {
  const idle = lifecycle.idle();
  if ((await within([idle.then(() => "idle"), cut.then(() => "cut")], limitSeconds * 1000)) === "idle")
    return;
  log.warn("ending requests that are still running", { running: lifecycle.running });
  lifecycle.cutOff();
  await within([idle], LAST_BYTES_MS);
}

async function within<T>(promises: Promise<T>[], limitMs: number): Promise<T | undefined> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const limit = new Promise<undefined>((resolve) => {
    timer = setTimeout(() => resolve(undefined), limitMs);
  });
  try {
    return await Promise.race([...promises, limit]);
  } finally {
    clearTimeout(timer);
  }
}

function openToAll(host: string): CaravanError {
  return new CaravanError(
    "invalid_argument",
    `the server would be open to everybody who reaches ${host}: no key is set`,
    {
      where: host,
      param: "--host",
      hint: "Set api_keys or admin_keys in caravan.toml (or CARAVAN_API_KEYS), or listen on 127.0.0.1.",
    },
  );
}

/** Reads both files, and checks that they are PEM. Throws invalid_argument. */
function readTls({ cert, key }: TlsFiles): { cert: string; key: string } {
  const read = (path: string, what: string, pattern: RegExp): string => {
    let text: string;
    try {
      text = readFileSync(path, "utf8");
    } catch (thrown) {
      const reason = thrown instanceof Error ? thrown.message : String(thrown);
      throw new CaravanError("invalid_argument", `the ${what} cannot be read: ${reason}`, { where: path });
    }
    if (pattern.test(text)) return text;
    throw new CaravanError("invalid_argument", `the ${what} is not in PEM form`, { where: path });
  };
  return {
    cert: read(cert, "TLS certificate", /-----BEGIN (TRUSTED )?CERTIFICATE-----/),
    key: read(key, "TLS key", /-----BEGIN [A-Z ]*PRIVATE KEY-----/),
  };
}

function isTlsError(thrown: unknown): boolean {
  return (
    thrown instanceof Error &&
    !("code" in thrown && (thrown.code === "EADDRINUSE" || thrown.code === "EACCES")) &&
    /ssl|tls|x509|pem|key values mismatch|certificate/i.test(`${thrown.message} ${thrown.name}`)
  );
}

function badTls(thrown: unknown, where: string | undefined): CaravanError {
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  return new CaravanError("invalid_argument", `the TLS certificate and key cannot be used: ${message}`, {
    ...(where === undefined ? {} : { where }),
    hint: "The key must be the certificate's own, and not be encrypted.",
    cause: thrown,
  });
}

/** An address to dial for one that means "all". */
function urlHost(host: string): string {
  if (host === "0.0.0.0" || host === "::") return "localhost";
  return host.includes(":") ? `[${host}]` : host;
}

function bindError(thrown: unknown, host: string, port: number): CaravanError {
  const code = thrown instanceof Error && "code" in thrown ? thrown.code : undefined;
  const where = `${host}:${port}`;
  if (code === "EADDRINUSE") {
    return new CaravanError("invalid_argument", `Port ${port} is already in use by another program.`, {
      where,
      param: "--port",
      hint: "Choose another with `--port`, or stop the program that uses it.",
      cause: thrown,
    });
  }
  if (code === "EACCES") {
    return new CaravanError("invalid_argument", `This user may not listen on port ${port}.`, {
      where,
      param: "--port",
      hint: "Choose a port of 1024 or more with `--port`.",
      cause: thrown,
    });
  }
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  return new CaravanError("invalid_argument", `The server cannot listen on ${where}: ${message}.`, {
    where,
    param: "--host",
    hint: "Choose an address of this machine with `--host`.",
    cause: thrown,
  });
}

/** Drains at the first SIGTERM or SIGINT and ends at once at the second. Returns what takes the handlers away. */
export function drainOnSignals(server: Pick<RunningServer, "drain">): () => void {
  const onSignal = () => void server.drain();
  process.on("SIGTERM", onSignal);
  process.on("SIGINT", onSignal);
  return () => {
    process.off("SIGTERM", onSignal);
    process.off("SIGINT", onSignal);
  };
}
