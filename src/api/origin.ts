// What browsers may do. A page from elsewhere can send requests to a local server, and by DNS rebinding even under
// its own name; so a loopback server answers to loopback names only, and other origins must be listed.

import { CaravanError } from "../errors.ts";
import type { ApiSettings } from "./settings.ts";

const LOOPBACK_NAME = /^(localhost|[a-z0-9-]+\.localhost|127(\.\d{1,3}){3}|\[::1\]|::1)$/;

export function isLoopback(host: string): boolean {
  return LOOPBACK_NAME.test(host.toLowerCase());
}

/** The name in a Host header, without port, in lower case; undefined if it is none. */
function hostName(header: string): string | undefined {
  const match = /^(\[[0-9a-f:.]+\]|[^:\s/@[\]]+)(:\d{1,5})?$/i.exec(header.trim());
  return match?.[1]?.toLowerCase();
}

/** Returns a check of the Host header that throws permission_denied. */
export function hostCheck(settings: Pick<ApiSettings, "host" | "allowedHosts">): (host: string) => void {
  const allowed = new Set(settings.allowedHosts.map((name) => name.toLowerCase()));
  const loopback = isLoopback(settings.host);
  return (host) => {
    if (!loopback && allowed.size === 0) return;
    const name = hostName(host);
    if (name !== undefined && (isLoopback(name) || allowed.has(name) || name === settings.host.toLowerCase()))
      return;
    throw new CaravanError(
      "permission_denied",
      `This server does not answer to the host name ${JSON.stringify(host)}.`,
      {
        hint: "Use localhost, or add the name to the server's allowed hosts.",
      },
    );
  };
}

/**
 * Whether a request's Origin may call: absent (not a browser), the server's own, or listed.
 * Returns the origin to name in access-control-allow-origin, or undefined where no CORS header is needed.
 * Throws permission_denied.
 */
export function originCheck(
  corsOrigins: readonly string[],
): (origin: string | null, host: string) => string | undefined {
  const listed = new Set(corsOrigins.map((origin) => origin.toLowerCase()));
  return (origin, host) => {
    if (origin === null) return undefined;
    if (
      /^https?:\/\//.test(origin) &&
      origin.replace(/^https?:\/\//, "").toLowerCase() === host.toLowerCase()
    ) {
      return undefined;
    }
    if (listed.has("*") || listed.has(origin.toLowerCase())) return origin;
    throw new CaravanError(
      "permission_denied",
      `Pages of ${JSON.stringify(origin)} may not call this server.`,
      {
        hint: "Add the origin to the server's CORS origins.",
      },
    );
  };
}

/** Headers that let a page of `origin` read the reply. */
export function corsHeaders(origin: string): Record<string, string> {
  return {
    "access-control-allow-origin": origin,
    "access-control-expose-headers": "x-request-id, retry-after",
    vary: "Origin",
  };
}

/** Headers that answer a preflight. */
export function preflightHeaders(allow: string, requestedHeaders: string | null): Record<string, string> {
  return {
    "access-control-allow-methods": allow,
    "access-control-allow-headers": requestedHeaders ?? "authorization, content-type",
    "access-control-max-age": "600",
  };
}
