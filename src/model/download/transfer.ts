// One HTTP request to the hub: follows redirects itself, so that the token goes to the hub alone; gives up on a
// connection that falls silent; and sorts failures into those that may pass and those that will not.

import { CaravanError } from "../../errors.ts";
import { PassingFault, retryAfterMs } from "./retry.ts";

export interface TransferOptions {
  /** Base URL of the hub: only its origin is sent the token. */
  endpoint: string;
  token: string | undefined;
  /** Time without a byte after which a connection counts as dead. There is no limit on the whole. */
  stallMs: number;
  signal: AbortSignal;
}

/** What the hub itself said before it sent us elsewhere. */
export interface HubHeaders {
  /** Content hash of the file, unquoted. */
  linkedEtag: string | undefined;
  commit: string | undefined;
}

export interface Transfer {
  /** 200 or 206. */
  status: number;
  headers: Headers;
  /** Where the bytes come from, after redirects. */
  url: string;
  hub: HubHeaders;
  /** The body; throws PassingFault when the connection breaks or stalls. Read it to the end or call close. */
  body: AsyncIterable<Uint8Array>;
  /** Drops the connection. Harmless after the end. */
  close(): void;
}

/** A link to a file server that no longer works: ask the hub for a new one. */
export class StaleLink extends PassingFault {}

const MAX_REDIRECTS = 8;
const USER_AGENT = "caravan/0.1";
const PASSING_STATUS = new Set([408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529]);

/** ETag without quotes and weakness mark. */
export function plainEtag(value: string | null): string | undefined {
  return value === null ? undefined : value.replace(/^W\//, "").replace(/^"(.*)"$/, "$1");
}

/** GETs `url`, whole or the bytes from `start` to before `end`. Throws PassingFault, StaleLink or CaravanError. */
export async function openTransfer(
  url: string,
  range: { start: number; end: number } | undefined,
  options: TransferOptions,
): Promise<Transfer> {
  const guard = new StallGuard(options.stallMs, options.signal);
  try {
    const hub: HubHeaders = { linkedEtag: undefined, commit: undefined };
    let at = new URL(url);
    for (let hops = 0; ; hops += 1) {
      const response = await send(at, range, options, guard);
      guard.touch();
      if (at.origin === new URL(options.endpoint).origin) {
        hub.linkedEtag = plainEtag(response.headers.get("x-linked-etag")) ?? hub.linkedEtag;
        hub.commit = response.headers.get("x-repo-commit") ?? hub.commit;
      }
      const next = redirectOf(response, at, hops);
      if (next !== undefined) {
        await response.body?.cancel();
        at = next;
        continue;
      }
      if (response.status !== 200 && response.status !== 206) {
        throw await refusal(response, at, options, guard);
      }
      const body = readBody(response, guard);
      return {
        status: response.status,
        headers: response.headers,
        url: at.href,
        hub,
        body,
        close: () => guard.end(),
      };
    }
  } catch (error) {
    guard.end();
    throw error;
  }
}

async function send(
  url: URL,
  range: { start: number; end: number } | undefined,
  options: TransferOptions,
  guard: StallGuard,
): Promise<Response> {
  const headers: Record<string, string> = { "user-agent": USER_AGENT, "accept-encoding": "identity" };
  if (range !== undefined) headers.range = `bytes=${range.start}-${range.end - 1}`;
  if (options.token !== undefined && url.origin === new URL(options.endpoint).origin) {
    headers.authorization = `Bearer ${options.token}`;
  }
  try {
    // Bun takes HTTP_PROXY, HTTPS_PROXY and NO_PROXY from the environment. Its own idle limit is off: ours counts.
    const init = { headers, redirect: "manual", decompress: false, timeout: false } as const;
    return await fetch(url, { ...init, signal: guard.signal });
  } catch (error) {
    throw guard.explain(error);
  }
}

function redirectOf(response: Response, from: URL, hops: number): URL | undefined {
  if (![301, 302, 303, 307, 308].includes(response.status)) return undefined;
  const location = response.headers.get("location");
  if (location === null || !URL.canParse(location, from.href)) {
    throw new PassingFault("the server redirects to nowhere");
  }
  const next = new URL(location, from);
  if (hops >= MAX_REDIRECTS) throw new PassingFault("the server redirects in circles");
  if (next.protocol !== from.protocol && next.protocol !== "https:") {
    throw new CaravanError(
      "download_failed",
      `the server redirects from ${from.protocol} to ${next.protocol}`,
      {
        where: from.origin,
        hint: "something on the way changes the hub's answers; check HF_ENDPOINT and the proxy",
      },
    );
  }
  return next;
}

async function refusal(
  response: Response,
  url: URL,
  options: TransferOptions,
  guard: StallGuard,
): Promise<Error> {
  const { status } = response;
  const atHub = url.origin === new URL(options.endpoint).origin;
  const reason = (response.headers.get("x-error-message") ?? "").replace(/\p{Cc}/gu, " ").slice(0, 200);
  const said = `${url.host} answered ${status}${reason === "" ? "" : ` (${reason})`}`;
  await response.body?.cancel();
  guard.end();
  if (PASSING_STATUS.has(status)) return new PassingFault(said, retryAfterMs(response.headers, Date.now()));
  if (!atHub && [400, 401, 403, 404, 410].includes(status)) return new StaleLink(said);
  const where = `${url.origin}${url.pathname}`;
  if (status === 401 || status === 403) {
    const hint =
      options.token === undefined
        ? "the model does not exist, is private, or asks you to accept its licence on its page; then set HF_TOKEN"
        : "the token in HF_TOKEN has no access: accept the licence on the model's page, or check the token";
    return new CaravanError("permission_denied", said, { where, hint });
  }
  if (status === 404) {
    return new CaravanError("model_not_found", `the hub has no such model, revision or file`, {
      where,
      hint: "check the name on https://huggingface.co/models",
    });
  }
  return new CaravanError("download_failed", said, { where });
}

async function* readBody(response: Response, guard: StallGuard): AsyncGenerator<Uint8Array, void, undefined> {
  try {
    if (response.body === null) return;
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      guard.touch();
      if (done) return;
      if (value.byteLength > 0) yield value;
    }
  } catch (error) {
    throw guard.explain(error);
  } finally {
    guard.end();
  }
}

/** Codes of failures that no second try will mend: the other side's certificate. */
const CERTIFICATE = /CERT|SELF_SIGNED|UNABLE_TO_VERIFY|UNABLE_TO_GET_ISSUER|HOSTNAME_MISMATCH|ALTNAME/i;

/** Aborts a request when no byte came for a while, or when the caller's signal says so. */
class StallGuard {
  readonly #abort = new AbortController();
  readonly #outer: AbortSignal;
  readonly #stallMs: number;
  readonly #onOuter: () => void;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #stalled = false;
  #ended = false;

  constructor(stallMs: number, outer: AbortSignal) {
    outer.throwIfAborted();
    this.#outer = outer;
    this.#stallMs = stallMs;
    this.#onOuter = () => this.end();
    outer.addEventListener("abort", this.#onOuter, { once: true });
    this.touch();
  }

  get signal(): AbortSignal {
    return this.#abort.signal;
  }

  touch(): void {
    clearTimeout(this.#timer);
    if (this.#ended) return;
    this.#timer = setTimeout(() => {
      this.#stalled = true;
      this.#abort.abort(new Error("stalled"));
    }, this.#stallMs);
  }

  /** Drops the connection and the timer. */
  end(): void {
    if (this.#ended) return;
    this.#ended = true;
    clearTimeout(this.#timer);
    this.#outer.removeEventListener("abort", this.#onOuter);
    this.#abort.abort(new Error("closed"));
  }

  /** The error to throw for what fetch or the body threw. */
  explain(error: unknown): unknown {
    if (this.#outer.aborted) return this.#outer.reason;
    if (this.#stalled) return new PassingFault(`no byte came for ${this.#stallMs / 1000} s`);
    const code = error instanceof Error && "code" in error ? String(error.code) : "";
    const message =
      error instanceof Error ? error.message.replace(/ For more information, pass.*$/, "") : String(error);
    if (CERTIFICATE.test(code)) {
      return new CaravanError("download_failed", `the server's certificate is not trusted: ${message}`, {
        hint: "a proxy that inspects traffic? set NODE_EXTRA_CA_CERTS to its certificate",
        cause: error,
      });
    }
    return new PassingFault(`the connection failed: ${message}`, undefined, error);
  }
}
