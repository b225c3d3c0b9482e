// Who a request comes from and what it may do: keys with two scopes, presented in a header, or once at /login for a
// cookie, because a browser's EventSource sends no headers.

import { createHash, randomBytes, timingSafeEqual } from "node:crypto";
import { CaravanError } from "../errors.ts";

/** "inference": generate and look. "administration": also load, unload, delete and pull models, and join nodes. */
export type Scope = "inference" | "administration";

export const SESSION_COOKIE = "caravan_session";
/** A browser that was used less than this ago stays logged in. */
const SESSION_SECONDS = 7 * 24 * 3600;
const MAX_SESSIONS = 1000;

function digest(text: string): Uint8Array {
  return createHash("sha256").update(text).digest();
}

/** The key in `authorization: Bearer …` or, as Anthropic's clients send it, `x-api-key`. */
function presentedKey(headers: Headers): string | undefined {
  const bearer = /^bearer +(.+)$/i.exec(headers.get("authorization") ?? "");
  return bearer?.[1]?.trim() ?? headers.get("x-api-key") ?? undefined;
}

function cookieOf(headers: Headers, name: string): string | undefined {
  for (const pair of (headers.get("cookie") ?? "").split(";")) {
    const at = pair.indexOf("=");
    if (at > 0 && pair.slice(0, at).trim() === name) return pair.slice(at + 1).trim();
  }
  return undefined;
}

interface Session {
  scope: Scope;
  expiresMs: number;
}

export class Keys {
  readonly #accepted: { digest: Uint8Array; scope: Scope }[];
  /** By the digest of the cookie, so that no cookie can be read out of memory dumps. Oldest use first. */
  readonly #sessions = new Map<string, Session>();

  /** `apiKeys` open inference, `adminKeys` everything. Neither: nobody is asked for a key. */
  constructor(
    apiKeys: readonly string[],
    adminKeys: readonly string[],
    private readonly nowMs: () => number = Date.now,
  ) {
    this.#accepted = [
      ...apiKeys.map((key) => ({ digest: digest(key), scope: "inference" as const })),
      ...adminKeys.map((key) => ({ digest: digest(key), scope: "administration" as const })),
    ];
  }

  get required(): boolean {
    return this.#accepted.length > 0;
  }

  /** What the sender may do. `cookies`: whether one counts; not from pages of other origins. Throws invalid_api_key. */
  scopeOf(headers: Headers, cookies: boolean): Scope {
    if (!this.required) return "administration";
    const presented = presentedKey(headers);
    if (presented !== undefined) return this.#scopeOfKey(presented);
    const session = cookies ? this.#session(cookieOf(headers, SESSION_COOKIE)) : undefined;
    if (session !== undefined) return session.scope;
    throw new CaravanError("invalid_api_key", "This server needs an API key and the request has none.", {
      hint: "Send it as `authorization: Bearer KEY`.",
    });
  }

  /** Digests are compared, each in constant time and always all of them. */
  #scopeOfKey(key: string): Scope {
    const candidate = digest(key);
    let found: Scope | undefined;
    for (const { digest: accepted, scope } of this.#accepted) {
      if (timingSafeEqual(accepted, candidate) && found !== "administration") found = scope;
    }
    if (found === undefined)
      throw new CaravanError("invalid_api_key", "The API key is not one of this server's.");
    return found;
  }

  /** Starts a session for the bearer of the key: the cookie's value and what it opens. Throws invalid_api_key. */
  login(key: string): { cookie: string; scope: Scope } {
    const scope = this.required ? this.#scopeOfKey(key) : "administration";
    const cookie = randomBytes(32).toString("base64url");
    this.#sessions.set(sessionId(cookie), { scope, expiresMs: this.nowMs() + SESSION_SECONDS * 1000 });
    if (this.#sessions.size > MAX_SESSIONS) {
      const oldest = this.#sessions.keys().next().value;
      if (oldest !== undefined) this.#sessions.delete(oldest);
    }
    return { cookie, scope };
  }

  logout(headers: Headers): void {
    const cookie = cookieOf(headers, SESSION_COOKIE);
    if (cookie !== undefined) this.#sessions.delete(sessionId(cookie));
  }

  #session(cookie: string | undefined): Session | undefined {
    if (cookie === undefined) return undefined;
    const id = sessionId(cookie);
    const session = this.#sessions.get(id);
    if (session === undefined) return undefined;
    this.#sessions.delete(id);
    if (session.expiresMs <= this.nowMs()) return undefined;
    session.expiresMs = this.nowMs() + SESSION_SECONDS * 1000;
    this.#sessions.set(id, session);
    return session;
  }
}

function sessionId(cookie: string): string {
  return createHash("sha256").update(cookie).digest("base64");
}

/** Set-Cookie of a session; without a value, of its end. Scripts cannot read it, other sites do not send it. */
export function sessionCookie(value: string | undefined, secure: boolean): string {
  const age = value === undefined ? 0 : SESSION_SECONDS;
  return `${SESSION_COOKIE}=${value ?? ""}; Path=/; HttpOnly; SameSite=Strict; Max-Age=${age}${secure ? "; Secure" : ""}`;
}

/** Throws permission_denied unless `scope` covers what is needed. */
export function requireScope(scope: Scope, needed: Scope): void {
  if (scope === "administration" || needed === "inference") return;
  throw new CaravanError("permission_denied", "This API key may generate, but not administer this node.", {
    hint: "Use one of the server's admin_keys.",
  });
}
