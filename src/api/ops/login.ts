// POST /login and /logout: a key for a cookie, so that the page need not keep the key, and GET /login: who one is.

import * as v from "valibot";
import { type Keys, sessionCookie } from "../auth.ts";
import { readJsonObject } from "../limits.ts";
import { parseParameters } from "../parameters.ts";
import type { ApiContext } from "../routes.ts";
import type { ApiSettings } from "../settings.ts";

export const loginSchema = v.strictObject({ key: v.pipe(v.string(), v.minLength(1), v.maxLength(4096)) });

export function loginRoute(keys: Keys, settings: ApiSettings) {
  return async (context: ApiContext): Promise<Response> => {
    const body = await readJsonObject(context, settings);
    const { cookie, scope } = keys.login(parseParameters(loginSchema, {}, body).key);
    return answer({ key_required: keys.required, scope }, sessionCookie(cookie, settings.secure));
  };
}

export function logoutRoute(keys: Keys, settings: ApiSettings) {
  return (context: ApiContext): Response => {
    keys.logout(context.req.raw.headers);
    return answer({ key_required: keys.required, scope: null }, sessionCookie(undefined, settings.secure));
  };
}

/** `scope` is null where a key is needed and the request has none. */
export function whoRoute(keys: Keys) {
  return (context: ApiContext): Response => {
    let scope: string | null = null;
    try {
      scope = keys.scopeOf(context.req.raw.headers, true);
    } catch {
      // No key or a wrong one, which is what the reply says.
    }
    return answer({ key_required: keys.required, scope });
  };
}

function answer(body: object, cookie?: string): Response {
  const headers = { "cache-control": "no-store", ...(cookie === undefined ? {} : { "set-cookie": cookie }) };
  return Response.json(body, { headers });
}
