// Downloads against a hub that misbehaves in one way at a time.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import {
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CaravanError } from "../../src/errors.ts";
import {
  type PullOptions,
  type PullProgress,
  type PullResult,
  pullModel,
} from "../../src/model/download/pull.ts";
import { COMMIT, MisbehavingHub, sha256 } from "../tools/misbehaving-hub.ts";
import { safetensors, text, tinyModel } from "../tools/tiny-model.ts";

const ID = "org/tiny";
const WEIGHTS = "model.safetensors";
const CHUNK = 64 * 1024;

let root = "";
let hub: MisbehavingHub;

beforeEach(async () => {
  root = mkdtempSync(join(tmpdir(), "caravan-pull-"));
  hub = await MisbehavingHub.start(ID, tinyModel(300_000));
});
afterEach(() => {
  hub.stop();
  rmSync(root, { recursive: true, force: true });
});

const repo = (): string => join(root, "models--org--tiny");

function pull(options: PullOptions = {}): Promise<PullResult> {
  return pullModel(ID, {
    endpoint: hub.url,
    hub: root,
    env: { HOME: root },
    chunkBytes: CHUNK,
    stallMs: 20_000,
    retry: { firstWaitMs: 1, maxWaitMs: 5 },
    ...options,
  });
}

async function failure(pending: Promise<unknown>): Promise<CaravanError> {
  try {
    await pending;
  } catch (error) {
    if (error instanceof CaravanError) return error;
    throw error;
  }
  throw new Error("it did not fail");
}

function expectWhole(result: PullResult): void {
  for (const file of hub.files) {
    expect(Buffer.compare(readFileSync(join(result.path, file.path)), Buffer.from(file.content))).toBe(0);
  }
  expect(readdirSync(join(repo(), "blobs")).filter((name) => name.includes("caravan"))).toEqual([]);
}

describe("a good hub", () => {
  test("a pull leaves the hub's cache layout: blobs by hash, relative links, the reference", async () => {
    const result = await pull();
    expectWhole(result);
    expect(result.path).toBe(join(repo(), "snapshots", COMMIT));
    const weights = hub.files.find((file) => file.path === WEIGHTS)?.content ?? new Uint8Array();
    expect(readlinkSync(join(result.path, WEIGHTS))).toBe(`../../blobs/${sha256(weights)}`);
    expect(readFileSync(join(repo(), "refs", "main"), "utf8")).toBe(COMMIT);
    expect(result.downloadedBytes).toBe(result.totalBytes);
    expect(result.misaligned).toEqual([]);
  });

  test("a second pull fetches no file", async () => {
    await pull();
    const before = hub.bytesServed();
    const again = await pull();
    expect(hub.bytesServed()).toBe(before);
    expect(again.downloadedBytes).toBe(0);
  });

  test("a blob of the wrong size is fetched again, and with verify one of the right size and wrong content too", async () => {
    const { path } = await pull();
    const blob = join(repo(), "blobs", sha256(hub.files[2]?.content ?? new Uint8Array()));
    writeFileSync(blob, "short");
    expectWhole(await pull());
    const damaged = Buffer.from(readFileSync(blob));
    damaged[1000] = (damaged[1000] ?? 0) ^ 255;
    writeFileSync(blob, damaged);
    expect((await pull()).downloadedBytes).toBe(0);
    expectWhole(await pull({ verify: true }));
    expect(path).toBe(join(repo(), "snapshots", COMMIT));
  });

  test("only what a model needs is taken, folders keep their depth in the links, empty files work", async () => {
    hub.files.push(
      { path: "pytorch_model.bin", content: text("no") },
      { path: "original/params.json", content: text("{}") },
      { path: "model.gguf", content: text("no") },
      { path: "checkpoint-5/model.safetensors", content: text("no") },
      { path: "additional_chat_templates/tool.jinja", content: text("{{ x }}") },
      { path: "chat_template.jinja", content: text("") },
    );
    const { path } = await pull();
    expect(readdirSync(path).sort()).toEqual([
      "additional_chat_templates",
      "chat_template.jinja",
      "config.json",
      WEIGHTS,
      "tokenizer.json",
    ]);
    expect(readlinkSync(join(path, "additional_chat_templates", "tool.jinja"))).toStartWith(
      "../../../blobs/",
    );
    expect(readFileSync(join(path, "additional_chat_templates", "tool.jinja"), "utf8")).toBe("{{ x }}");
    expect(readFileSync(join(path, "chat_template.jinja"), "utf8")).toBe("");
  });

  test("a list of files in several pages is read to its end", async () => {
    hub.pageSize = 1;
    expectWhole(await pull());
  });

  test("a revision may be part of the name, as in the hints of other commands", async () => {
    const { path } = await pullModel(`${ID}@v1`, { endpoint: hub.url, hub: root, env: { HOME: root } });
    expect(hub.requests[0]?.url).toEndWith("/revision/v1");
    expect(readFileSync(join(repo(), "refs", "v1"), "utf8")).toBe(COMMIT);
    expect(existsSync(path)).toBe(true);
  });

  test("a revision with a slash is encoded and gets a reference of its own", async () => {
    await pull({ revision: "refs/pr/1" });
    expect(hub.requests[0]?.url).toEndWith("/revision/refs%2Fpr%2F1");
    expect(readFileSync(join(repo(), "refs", "refs", "pr", "1"), "utf8")).toBe(COMMIT);
  });

  test("progress never runs backwards on a good connection and ends at the total", async () => {
    const seen: PullProgress[] = [];
    const result = await pull({ onProgress: (progress) => seen.push(progress) });
    const done = seen.map((progress) => progress.doneBytes);
    expect(done).toEqual([...done].sort((a, b) => a - b));
    expect(done.at(-1)).toBe(result.totalBytes);
    expect(seen.every((progress) => progress.totalBytes === result.totalBytes)).toBe(true);
  });

  test("big files come in ranges over several connections", async () => {
    await pull();
    const ranges = hub.requestsFor(WEIGHTS).map((request) => request.range);
    expect(ranges.length).toBe(5);
    expect(new Set(ranges).size).toBe(5);
  });

  test("misaligned weights are reported and left as they are", async () => {
    hub.files = [...hub.files.slice(0, 2), { path: WEIGHTS, content: safetensors(4000, 1, "F32", 1) }];
    const result = await pull();
    expect(result.misaligned).toEqual([WEIGHTS]);
    expectWhole(result);
  });
});

describe("faults that pass", () => {
  test("dropped connections lose nothing: the rest of the chunk is asked for", async () => {
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS && earlier < 5 ? { do: "drop", afterBytes: 30_000 } : undefined;
    const result = await pull({ connections: 1 });
    expectWhole(result);
    // Bytes of a broken connection may be lost on the way, never asked for twice when they came.
    expect(result.downloadedBytes).toBe(result.totalBytes);
  });

  test("a body that ends early without an error is noticed", async () => {
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS && earlier < 2 ? { do: "end-early", afterBytes: 999 } : undefined;
    expectWhole(await pull());
  });

  test("a stalled connection is given up after the stall time and the chunk goes on", async () => {
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS && earlier === 0 ? { do: "stall", afterBytes: 1000 } : undefined;
    const heard: string[] = [];
    expectWhole(await pull({ stallMs: 400, onRetry: (message) => heard.push(message) }));
    expect(heard.join()).toContain("no byte came for 0.4 s");
  });

  test("a burst of 5xx is waited out", async () => {
    hub.behaveApi = (_, earlier) => (earlier < 2 ? { status: 503 } : undefined);
    hub.behave = ({ earlier }) =>
      earlier < 4 ? { do: "status", status: [500, 502, 503, 504][earlier] ?? 500 } : undefined;
    expectWhole(await pull());
  });

  test("429 with Retry-After is honoured", async () => {
    let refusedAt = 0;
    let nextAt = 0;
    hub.behave = ({ path, earlier }) => {
      if (path !== "config.json") return undefined;
      if (earlier === 0) {
        refusedAt = performance.now();
        return { do: "status", status: 429, headers: { "retry-after": "1" } };
      }
      nextAt ||= performance.now();
      return undefined;
    };
    expectWhole(await pull());
    expect(nextAt - refusedAt).toBeGreaterThanOrEqual(990);
  });

  test("a Retry-After that is too long ends the pull and says when to come back", async () => {
    hub.behave = () => ({ do: "status", status: 429, headers: { "retry-after": "86400" } });
    const error = await failure(pull());
    expect(error.code).toBe("download_failed");
    expect(error.retryAfterSeconds).toBe(86400);
  });

  test("a hub that never recovers is given up after a bounded number of tries", async () => {
    hub.behave = ({ path }) => (path === WEIGHTS ? { do: "status", status: 502 } : undefined);
    const error = await failure(pull({ connections: 1 }));
    expect(error.code).toBe("download_failed");
    expect(error.message).toContain("502");
    expect(hub.requestsFor(WEIGHTS).length).toBe(6);
    expect(existsSync(join(repo(), "snapshots"))).toBe(false);
  });

  test("a server that knows no ranges gets one plain request, also when the connection drops in between", async () => {
    hub.behave = ({ path, range, earlier }) => {
      if (path !== WEIGHTS) return undefined;
      if (range !== undefined) return { do: "ignore-range" };
      return earlier < 8 ? { do: "drop", afterBytes: 150_000 } : undefined;
    };
    expectWhole(await pull({ retry: { firstWaitMs: 1, maxWaitMs: 5, failures: 12 } }));
  });

  test("a file server's link that has expired is asked for anew", async () => {
    const files = await MisbehavingHub.start(ID, hub.files);
    try {
      hub.behave = ({ path }) =>
        path === WEIGHTS
          ? { do: "redirect", to: `${files.url}/files/${path}?n=${hub.requestsFor(path).length}` }
          : undefined;
      files.behave = ({ earlier }) => (earlier === 2 ? { do: "status", status: 403 } : undefined);
      expectWhole(await pull({ connections: 1 }));
      expect(hub.requestsFor(WEIGHTS).length).toBe(2);
    } finally {
      files.stop();
    }
  });
});

describe("content that is not what it should be", () => {
  test("a lying Content-Range is never written into the file", async () => {
    hub.behave = ({ path, range }) =>
      path === WEIGHTS && range?.start === CHUNK
        ? { do: "content-range", value: `bytes 0-${CHUNK - 1}/300080` }
        : undefined;
    const error = await failure(pull());
    expect(error.code).toBe("download_failed");
    expect(error.message).toContain("answered range");
  });

  test("one chunk of wrong bytes is found by the hash and the file fetched again", async () => {
    const wrong = safetensors(300_000, 99);
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS && earlier === 3 ? { do: "other-content", content: wrong } : undefined;
    const heard: string[] = [];
    expectWhole(await pull({ onRetry: (message) => heard.push(message) }));
    expect(heard.join()).toContain("sha256");
  });

  test("a file whose hash stays wrong fails, names both hashes, and leaves no blob and no snapshot", async () => {
    const config = hub.files[0];
    if (config !== undefined) config.listedHash = "b".repeat(40);
    const error = await failure(pull());
    expect(error.code).toBe("download_failed");
    expect(error.message).toMatch(/git hash of config\.json is [0-9a-f]{12}…, not b{12}/);
    expect(existsSync(join(repo(), "blobs", "b".repeat(40)))).toBe(false);
    expect(existsSync(join(repo(), "snapshots"))).toBe(false);
    expect(existsSync(join(repo(), "refs"))).toBe(false);
  });

  test("an ETag that changes between chunks starts the file over, once", async () => {
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS && earlier === 2 ? { do: "headers", headers: { etag: '"other"' } } : undefined;
    const heard: string[] = [];
    expectWhole(await pull({ onRetry: (message) => heard.push(message) }));
    expect(heard.join()).toContain("ETag changed");
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS ? { do: "headers", headers: { etag: `"v${earlier}"` } } : undefined;
    rmSync(repo(), { recursive: true });
    expect((await failure(pull())).message).toContain(
      "ETag changed during the download, also after a new start",
    );
  });

  test("another commit or another hash than the list's ends the pull: the file changed", async () => {
    hub.behave = ({ path }) =>
      path === WEIGHTS ? { do: "headers", headers: { "x-repo-commit": "f".repeat(40) } } : undefined;
    expect((await failure(pull())).message).toContain("changed on the hub");
    hub.behave = ({ path }) =>
      path === WEIGHTS ? { do: "headers", headers: { "x-linked-etag": `"${"c".repeat(64)}"` } } : undefined;
    expect((await failure(pull())).message).toContain("changed on the hub");
  });

  test("a size that differs from the list's is refused", async () => {
    const config = hub.files[0];
    if (config !== undefined) config.listedSize = 5;
    expect((await failure(pull())).message).toContain("where the list of files says 5");
  });

  for (const path of [
    "../../evil.json",
    "/etc/evil.json",
    "a/../../evil.json",
    "a\\..\\evil.json",
    "./config2.json",
    "a//b.json",
    "x\u0000.json",
  ]) {
    test(`the file name ${JSON.stringify(path)} is refused before anything is fetched`, async () => {
      hub.files.push({ path, content: text("{}") });
      const error = await failure(pull());
      expect(error.code).toBe("download_failed");
      expect(error.message).toContain("refused");
      expect(hub.bytesServed()).toBe(0);
      expect(readdirSync(root)).toEqual([]);
    });
  }

  test("a link that waits in the snapshot is replaced, not written through", async () => {
    const outside = join(root, "outside.json");
    writeFileSync(outside, "precious");
    mkdirSync(join(repo(), "snapshots", COMMIT), { recursive: true });
    symlinkSync(outside, join(repo(), "snapshots", COMMIT, "config.json"));
    expectWhole(await pull());
    expect(readFileSync(outside, "utf8")).toBe("precious");
  });

  test("names that differ only in case, and hashes that are none, are refused", async () => {
    hub.files.push({ path: "CONFIG.json", content: text("{}") });
    expect((await failure(pull())).message).toContain("case");
    hub.files[3] = { path: "extra.json", content: text("{}"), listedHash: "../../../x" };
    expect((await failure(pull())).message).toContain("no usable hash");
  });
});

describe("repositories that cannot be had", () => {
  test("one without safetensors is refused with the way to go on", async () => {
    hub.files = [hub.files[0], hub.files[1], { path: "m.gguf", content: text("x") }].filter(
      (file) => file !== undefined,
    );
    const error = await failure(pull());
    expect(error.code).toBe("unsupported_model");
    expect(error.hint).toContain("caravan import");
  });

  test("an unknown one is model_not_found, a gated one permission_denied with the token's hint", async () => {
    expect(
      (await failure(pullModel("org/other", { endpoint: hub.url, hub: root, env: { HOME: root } }))).code,
    ).toBe("model_not_found");
    hub.behaveApi = () => ({
      status: 401,
      headers: { "x-error-message": "Access to model org/tiny is restricted" },
    });
    const error = await failure(pull());
    expect(error.code).toBe("permission_denied");
    expect(error.message).toContain("restricted");
    expect(error.hint).toContain("HF_TOKEN");
  });

  test("what is not a hub's answer is not believed", async () => {
    hub.behaveApi = () => ({ status: 200, body: '{"sha":"../../etc"}' });
    expect((await failure(pull())).message).toContain("makes no sense");
    hub.behaveApi = () => ({ status: 200, body: "<html>log in</html>" });
    expect((await failure(pull())).message).toContain("not JSON");
  });

  test("malformed ids and revisions never reach the network", async () => {
    for (const id of ["../x", "a/b/c", "org/..", "nothing", "org/a--b"]) {
      expect(["invalid_argument", "model_not_found"]).toContain(
        (await failure(pullModel(id, { endpoint: hub.url, hub: root, env: { HOME: root } }))).code,
      );
    }
    expect((await failure(pull({ revision: "../../x" }))).code).toBe("invalid_argument");
    expect(hub.requests).toEqual([]);
  });

  test("HF_HUB_OFFLINE gives what is here and asks nobody", async () => {
    const env = { HOME: root, HF_HUB_OFFLINE: "1" };
    expect((await failure(pull({ env }))).message).toContain("HF_HUB_OFFLINE");
    const { path } = await pull();
    const before = hub.requests.length;
    expect((await pull({ env })).path).toBe(path);
    expect(hub.requests.length).toBe(before);
  });
});

describe("the token", () => {
  test("goes to the hub and to nobody it redirects to", async () => {
    const files = await MisbehavingHub.start(ID, hub.files);
    try {
      hub.behave = ({ path }) => ({ do: "redirect", to: `${files.url}/files/${path}` });
      expectWhole(await pull({ token: "hf_secret" }));
      expect(hub.requests.every((request) => request.authorization === "Bearer hf_secret")).toBe(true);
      expect(files.requests.length).toBeGreaterThan(2);
      expect(files.requests.every((request) => request.authorization === undefined)).toBe(true);
    } finally {
      files.stop();
    }
  });

  test("comes from HF_TOKEN or from the token file in HF_HOME", async () => {
    await pull({ env: { HOME: root, HF_TOKEN: "hf_one" } });
    expect(hub.requests.at(-1)?.authorization).toBe("Bearer hf_one");
    writeFileSync(join(root, "token"), "hf_two\n");
    await pull({ env: { HOME: root, HF_HOME: root } });
    expect(hub.requests.at(-1)?.authorization).toBe("Bearer hf_two");
  });

  test("redirects in circles end", async () => {
    hub.behave = ({ path }) => ({ do: "redirect", to: `${hub.url}/files/${path}` });
    expect((await failure(pull())).message).toContain("circles");
  });
});

describe("stopping", () => {
  test("an abort in mid-download is 'cancelled', and the next pull fetches only the rest", async () => {
    const stop = new AbortController();
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS && earlier >= 2 ? { do: "after", work: () => stop.abort() } : undefined;
    const error = await failure(pull({ connections: 1, signal: stop.signal }));
    expect(error.code).toBe("cancelled");
    hub.behave = () => undefined;
    hub.requests.length = 0;
    const result = await pull();
    expectWhole(result);
    expect(result.downloadedBytes).toBeLessThanOrEqual(result.totalBytes - 2 * CHUNK);
    expect(hub.bytesServed()).toBe(result.downloadedBytes);
  });

  test("a signal that is aborted already asks nobody", async () => {
    const error = await failure(pull({ signal: AbortSignal.abort() }));
    expect(error.code).toBe("cancelled");
    expect(hub.requests).toEqual([]);
  });

  test("two pulls of one model: the second is refused while the first runs, and works after it", async () => {
    let release = (): void => undefined;
    const held = new Promise<void>((resolve) => {
      release = resolve;
    });
    let reached = (): void => undefined;
    const started = new Promise<void>((resolve) => {
      reached = resolve;
    });
    const hold = (): Promise<void> => {
      reached();
      return held;
    };
    hub.behave = ({ path }) => (path === WEIGHTS ? { do: "after", work: hold } : undefined);
    const first = pull();
    await started;
    expect((await failure(pull())).message).toContain("downloading this model already");
    release();
    expectWhole(await first);
    expectWhole(await pull());
  });

  test("the lock of a process that is gone is taken over", async () => {
    const folder = join(root, ".locks", "models--org--tiny");
    mkdirSync(folder, { recursive: true });
    const gone = Bun.spawnSync(["true"]).pid;
    const { hostname } = await import("node:os");
    writeFileSync(join(folder, "caravan.lock"), JSON.stringify({ pid: gone, host: hostname() }));
    expectWhole(await pull());
    expect(existsSync(join(folder, "caravan.lock"))).toBe(false);
  });

  test("a damaged map of chunks means a new beginning, not a damaged file", async () => {
    mkdirSync(join(repo(), "blobs"), { recursive: true });
    const hash = sha256(hub.files[2]?.content ?? new Uint8Array());
    const part = join(repo(), "blobs", `${hash}.caravan-part`);
    const size = hub.files[2]?.content.byteLength ?? 0;
    for (const map of [
      "{",
      "{}",
      JSON.stringify({ version: 1, size, chunk_bytes: CHUNK, done: [CHUNK, CHUNK, CHUNK, CHUNK, CHUNK] }),
      JSON.stringify({ version: 1, size, chunk_bytes: CHUNK, done: [CHUNK, 0, 0, 0, 0] }),
    ]) {
      rmSync(join(repo(), "blobs"), { recursive: true });
      mkdirSync(join(repo(), "blobs"));
      writeFileSync(part, new Uint8Array(100));
      writeFileSync(`${part}.json`, map);
      const heard: string[] = [];
      const result = await pull({ onRetry: (message) => heard.push(message) });
      expectWhole(result);
      // Found when it was read, not by the hash at the end.
      expect(heard).toEqual([]);
      expect(lstatSync(join(repo(), "blobs", hash)).size).toBe(size);
    }
  });
});
