// The logger: levels, forms, and that no secret gets out.

import { describe, expect, test } from "bun:test";
import { CaravanError } from "../../src/errors.ts";
import { createLogger, type LoggerOptions, redactText } from "../../src/log.ts";

function capture(options: LoggerOptions = {}) {
  const lines: string[] = [];
  const logger = createLogger({ now: () => new Date(0), write: (line) => lines.push(line), ...options });
  return { logger, lines, json: () => JSON.parse(lines.at(-1) ?? "") as Record<string, unknown> };
}

describe("lines", () => {
  test("below the level are not written", () => {
    const { logger, lines } = capture({ level: "warn" });
    logger.debug("a");
    logger.info("b");
    logger.warn("c");
    logger.error("d");
    expect(lines.length).toBe(2);
    const silent = capture({ level: "silent" });
    silent.logger.error("x");
    expect(silent.lines).toEqual([]);
  });

  test("as text hold time, level, message and fields", () => {
    const { logger, lines } = capture();
    logger.info("model loaded", { model: "scout-4bit", ms: 12, note: "two words", gone: undefined });
    expect(lines).toEqual([
      '1970-01-01T00:00:00.000Z INFO  model loaded model=scout-4bit ms=12 note="two words"\n',
    ]);
  });

  test("as JSON are one object a line; fields cannot replace time, level or message", () => {
    const { logger, lines, json } = capture({ format: "json" });
    logger.warn("line\nbreak", { level: "forged", n: 1 });
    expect(lines[0]?.split("\n").length).toBe(2);
    expect(json()).toEqual({ time: "1970-01-01T00:00:00.000Z", level: "warn", message: "line\nbreak", n: 1 });
  });

  test("of a child carry its fields, of its child both", () => {
    const { logger, json } = capture({ format: "json" });
    logger.child({ request: "r1" }).child({ model: "m" }).info("x", { model: "n" });
    expect(json()).toMatchObject({ request: "r1", model: "n" });
  });

  test("cannot be forged, nor drive the terminal", () => {
    const { logger, lines } = capture();
    logger.info("a\n1970 ERROR b\u001b[2J", { "k\n": "v\r\n\u009bx" });
    expect(lines[0]?.slice(0, -1)).not.toMatch(/[\p{Cc}]/u);
    expect(lines[0]).toContain("a\\n1970 ERROR b\\u001b[2J");
  });

  test("hold any value: errors, cycles, big integers, bytes, dates, long text", () => {
    const { logger, json } = capture({ format: "json" });
    const cycle: Record<string, unknown> = { a: 1 };
    cycle.self = cycle;
    logger.error("x", {
      cycle,
      big: 1n,
      nan: Number.NaN,
      bytes: new Uint8Array(3),
      when: new Date(0),
      known: new CaravanError("disk_full", "full", { where: "/x" }),
      thrown: new TypeError("oops"),
      long: "y".repeat(100_000),
      call: () => 1,
    });
    expect(json()).toMatchObject({
      cycle: { a: 1, self: "[…]" },
      big: "1",
      nan: "NaN",
      bytes: "[3 bytes]",
      when: "1970-01-01T00:00:00.000Z",
      known: { code: "disk_full", message: "full", where: "/x" },
      thrown: { name: "TypeError", message: "oops" },
      call: "[function]",
    });
    expect(String(json().long).length).toBeLessThan(10_000);
  });
});

describe("secrets", () => {
  const SECRET = "hf_abcdefghijklmnop";
  const forms: Record<string, unknown>[] = [
    { authorization: "Token zzz-secret-zzz" },
    {
      headers: { Authorization: "zzz-secret-zzz", "x-api-key": "zzz-secret-zzz", Cookie: "a=zzz-secret-zzz" },
    },
    { headers: new Headers({ "proxy-authorization": "zzz-secret-zzz" }) },
    {
      api_keys: ["zzz-secret-zzz"],
      apiKey: "zzz-secret-zzz",
      token: "zzz-secret-zzz",
      HF_TOKEN: "zzz-secret-zzz",
    },
    { deep: { list: [{ password: "zzz-secret-zzz" }] } },
    { url: "https://me:zzz-secret-zzz@host/x", cdn: "https://cdn/x?X-Amz-Signature=zzz-secret-zzz&a=1" },
    { note: "sent Bearer zzz-secret-zzz to it" },
    { error: new Error("bad header: Bearer zzz-secret-zzz") },
    {
      error: new CaravanError("download_failed", "Bearer zzz-secret-zzz", {
        where: "https://a:zzz-secret-zzz@b",
      }),
    },
  ];
  for (const format of ["text", "json"] as const) {
    test(`under telling names or in known forms are masked in ${format}`, () => {
      for (const fields of forms) {
        const { logger, lines } = capture({ format });
        logger.info(`with ${SECRET}`, fields);
        expect(lines[0]).not.toContain("zzz-secret-zzz");
        expect(lines[0]).not.toContain(SECRET);
        expect(lines[0]).toContain("[redacted]");
      }
    });
  }

  test("are told from numbers and plain names", () => {
    const { logger, json } = capture({ format: "json" });
    logger.info("x", { prompt_tokens: 12, tokens: 5, key: "n_layers", model: "scout" });
    expect(json()).toMatchObject({ prompt_tokens: 12, tokens: 5, key: "n_layers", model: "scout" });
    expect(redactText("https://host/path?page=2")).toBe("https://host/path?page=2");
  });
});
