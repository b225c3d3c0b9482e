// Keys with scopes, the login of browsers, TLS, and what is refused before it can do harm.

import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createApp } from "../../src/api/app.ts";
import { Keys } from "../../src/api/auth.ts";
import { Lifecycle } from "../../src/api/lifecycle.ts";
import { startServer } from "../../src/api/server.ts";
import type { ApiSettings } from "../../src/api/settings.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { selfSigned } from "../tools/self-signed.ts";

const folder = mkdtempSync(join(tmpdir(), "caravan-security-"));
afterAll(() => rmSync(folder, { recursive: true }));

function app(settings: Partial<ApiSettings> = {}) {
  return createApp({
    models: scriptedModels(sayScript("hello")),
    settings: { apiKeys: ["user-key"], adminKeys: ["admin-key"], ...settings },
  });
}

const bearer = (key: string) => ({ authorization: `Bearer ${key}` });
const login = (key: string, headers: Record<string, string> = {}): RequestInit => ({
  method: "POST",
  body: JSON.stringify({ key }),
  headers,
});

function refused(action: () => unknown): CaravanError {
  try {
    action();
  } catch (thrown) {
    if (thrown instanceof CaravanError) return thrown;
    throw thrown;
  }
  throw new Error("it was not refused");
}

describe("scopes", () => {
  test("an inference key generates and may not administer; an administration key may do both", async () => {
    const it = app();
    const status = async (path: string, key: string) =>
      (await it.request(path, { headers: bearer(key) })).status;
    expect(await status("/v1/models", "user-key")).toBe(200);
    expect(await status("/requests", "user-key")).toBe(403);
    expect(await status("/v1/models", "admin-key")).toBe(200);
    expect(await status("/requests", "admin-key")).toBe(200);
    expect(await status("/requests", "nobody")).toBe(401);
  });

  test("without keys everybody on this machine may do everything", async () => {
    const it = app({ apiKeys: [], adminKeys: [] });
    expect((await it.request("/requests")).status).toBe(200);
  });

  test("administration keys alone close inference too", async () => {
    expect((await app({ apiKeys: [] }).request("/v1/models")).status).toBe(401);
  });

  test("a key in both lists administers", () => {
    const keys = new Keys(["same"], ["same"]);
    expect(keys.scopeOf(new Headers(bearer("same")), false)).toBe("administration");
    const other = new Keys(["a", "same"], ["same", "b"]);
    expect(other.scopeOf(new Headers(bearer("same")), false)).toBe("administration");
  });
});

describe("the login of browsers", () => {
  const cookieOf = (reply: Response) => reply.headers.get("set-cookie")?.split(";")[0] ?? "";

  test("gives a cookie that scripts cannot read and other sites do not send, and that opens what the key opens", async () => {
    const it = app();
    const reply = await it.request("/login", login("user-key"));
    expect(await reply.json()).toEqual({ key_required: true, scope: "inference" });
    const set = reply.headers.get("set-cookie") ?? "";
    expect(set).toMatch(/^caravan_session=[\w-]{43}; Path=\/; HttpOnly; SameSite=Strict; Max-Age=\d+$/);
    const cookie = cookieOf(reply);
    expect((await it.request("/v1/models", { headers: { cookie } })).status).toBe(200);
    expect((await it.request("/requests", { headers: { cookie } })).status).toBe(403);
    const who = await it.request("/login", { headers: { cookie } });
    expect(await who.json()).toEqual({ key_required: true, scope: "inference" });
  });

  test("is refused with a wrong key, and ends at logout", async () => {
    const it = app();
    const wrong = await it.request("/login", login("guess"));
    expect(wrong.status).toBe(401);
    expect(wrong.headers.get("set-cookie")).toBeNull();
    const cookie = cookieOf(await it.request("/login", login("admin-key")));
    const out = await it.request("/logout", { method: "POST", headers: { cookie } });
    expect(out.headers.get("set-cookie")).toContain("Max-Age=0");
    expect((await it.request("/v1/models", { headers: { cookie } })).status).toBe(401);
    const who = await it.request("/login", { headers: { cookie } });
    expect(await who.json()).toEqual({ key_required: true, scope: null });
  });

  test("does not count for pages of other origins, listed ones too", async () => {
    const it = app({ corsOrigins: ["*"] });
    const cookie = cookieOf(await it.request("/login", login("admin-key")));
    const from = (origin: string) =>
      it.request("/v1/models", { headers: { cookie, origin, host: "localhost:11711" } });
    expect((await from("http://localhost:9999")).status).toBe(401);
    expect((await from("http://localhost:11711")).status).toBe(200);
  });

  test("is for TLS only where the server speaks TLS", async () => {
    const reply = await app({ secure: true }).request("/login", login("user-key"));
    expect(reply.headers.get("set-cookie")).toEndWith("; Secure");
  });

  test("lasts a week from its last use, and the number of sessions is bounded", () => {
    let now = 0;
    const keys = new Keys(["key"], [], () => now);
    const headers = (cookie: string) => new Headers({ cookie: `other=1; caravan_session=${cookie}` });
    const first = keys.login("key").cookie;
    const day = 24 * 3600 * 1000;
    now = 6 * day;
    expect(keys.scopeOf(headers(first), true)).toBe("inference");
    now = 12 * day;
    expect(keys.scopeOf(headers(first), true)).toBe("inference");
    now = 20 * day;
    expect(refused(() => keys.scopeOf(headers(first), true)).code).toBe("invalid_api_key");
    const old = keys.login("key").cookie;
    for (let count = 0; count < 1000; count += 1) keys.login("key");
    expect(refused(() => keys.scopeOf(headers(old), true)).code).toBe("invalid_api_key");
  });
});

describe("the address", () => {
  const start = (options: { host: string; keyed: boolean; tls?: { cert: string; key: string } }) => {
    const lifecycle = new Lifecycle();
    return startServer({
      app: createApp({ models: scriptedModels(sayScript("x")), lifecycle }),
      lifecycle,
      port: 0,
      drainSeconds: 0,
      log: createLogger({ level: "silent" }),
      ...options,
    });
  };

  test("beyond loopback is refused without a key", () => {
    for (const host of ["0.0.0.0", "::", "192.0.2.1", "node.example"]) {
      const error = refused(() => start({ host, keyed: false }));
      expect(error.message).toContain("no key is set");
      expect(error.hint).toContain("api_keys");
    }
  });

  test("is served with TLS when there are a certificate and its key", async () => {
    const { cert, key } = selfSigned();
    const files = { cert: join(folder, "cert.pem"), key: join(folder, "key.pem") };
    writeFileSync(files.cert, cert);
    writeFileSync(files.key, key);
    const server = start({ host: "127.0.0.1", keyed: false, tls: files });
    try {
      expect(server.url).toStartWith("https://127.0.0.1:");
      const reply = await fetch(`${server.url}/health`, { tls: { ca: cert } });
      expect(await reply.json()).toEqual({ status: "ok" });
      const plain = await fetch(`${server.url.replace("https", "http")}/health`).then(
        (answer) => answer.status,
        () => "refused",
      );
      expect(plain).not.toBe(200);
    } finally {
      await server.drain();
    }
  });

  test("says what is wrong with TLS files: missing, not PEM, not a pair", () => {
    const { cert } = selfSigned();
    const { key: otherKey } = selfSigned();
    const write = (name: string, text: string) => {
      writeFileSync(join(folder, name), text);
      return join(folder, name);
    };
    const good = write("good.pem", cert);
    const other = write("other.pem", otherKey);
    const wrong = (tls: { cert: string; key: string }) =>
      refused(() => start({ host: "127.0.0.1", keyed: false, tls })).toText();
    expect(wrong({ cert: join(folder, "absent.pem"), key: other })).toContain("cannot be read");
    expect(wrong({ cert: write("text.pem", "hello"), key: other })).toContain("not in PEM form");
    expect(wrong({ cert: good, key: good })).toContain("not in PEM form");
    expect(wrong({ cert: good, key: other })).toContain("cannot be used");
  });
});

test("the node's own keys never reach the log, whatever form the line has", () => {
  for (const format of ["text", "json"] as const) {
    let lines = "";
    const log = createLogger({
      format,
      secrets: ['my"secret-key', "abc"],
      write: (line) => {
        lines += line;
      },
    });
    log.warn('failed with my"secret-key', {
      note: 'x my"secret-key y',
      inner: ['my"secret-key'],
      abc: "abc",
    });
    expect(lines).not.toContain("secret-key");
    expect(lines).toContain("[redacted]");
    expect(lines).toContain("abc");
  }
});
