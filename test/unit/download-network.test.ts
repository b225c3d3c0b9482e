// Downloads as the environment wants them: through proxies and past them, into HF_HOME, several files at a time; and the
// licence that is named at the end.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { createServer, request, type Server } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pullModel } from "../../src/model/download/pull.ts";
import { licenceText } from "../../src/model/licence.ts";
import { MisbehavingHub } from "../tools/misbehaving-hub.ts";
import { text, tinyModel } from "../tools/tiny-model.ts";

const ID = "org/tiny";
const CHILD = join(import.meta.dir, "..", "tools", "pull-child.ts");

let root = "";
let hub: MisbehavingHub;
let proxy: Server | undefined;

beforeEach(async () => {
  root = mkdtempSync(join(tmpdir(), "caravan-network-"));
  hub = await MisbehavingHub.start(ID, tinyModel(100_000));
});
afterEach(() => {
  hub.stop();
  proxy?.closeAllConnections();
  proxy?.close();
  proxy = undefined;
  rmSync(root, { recursive: true, force: true });
});

/** An HTTP proxy that sends everything to the hub, and notes what it was asked for. */
async function startProxy(asked: string[]): Promise<string> {
  const started = createServer((incoming, outgoing) => {
    asked.push(incoming.url ?? "");
    const url = new URL(incoming.url ?? "");
    const onward = request(
      `${hub.url}${url.pathname}${url.search}`,
      { method: incoming.method, headers: incoming.headers },
      (answer) => {
        outgoing.writeHead(answer.statusCode ?? 502, answer.headers);
        answer.pipe(outgoing);
      },
    );
    onward.on("error", () => outgoing.destroy());
    incoming.pipe(onward);
  });
  proxy = started;
  await new Promise<void>((resolve) => started.listen(0, "127.0.0.1", resolve));
  const address = started.address();
  if (address === null || typeof address === "string") throw new Error("no port");
  return `http://127.0.0.1:${address.port}`;
}

async function pullInChild(env: Record<string, string>): Promise<string> {
  const child = Bun.spawn([process.execPath, CHILD, ID], {
    env: { PATH: process.env.PATH ?? "", HOME: root, ...env },
    stdout: "pipe",
    stderr: "pipe",
  });
  const [out, err] = await Promise.all([child.stdout.text(), child.stderr.text()]);
  return (await child.exited) === 0 ? out.trim() : `failed: ${err}`;
}

describe("a pull", () => {
  test("goes through HTTP_PROXY", async () => {
    const asked: string[] = [];
    const address = await startProxy(asked);
    const path = await pullInChild({ HF_ENDPOINT: "http://hub.test", HTTP_PROXY: address });
    expect(existsSync(join(path, "config.json"))).toBe(true);
    expect(asked.length).toBeGreaterThan(3);
    expect(asked.every((url) => url.startsWith("http://hub.test/"))).toBe(true);
  });

  test("goes past it to what NO_PROXY names", async () => {
    const asked: string[] = [];
    const address = await startProxy(asked);
    const path = await pullInChild({
      HF_ENDPOINT: hub.url,
      HTTP_PROXY: address,
      NO_PROXY: "example.com,127.0.0.1",
    });
    expect(existsSync(join(path, "config.json"))).toBe(true);
    expect(asked).toEqual([]);
  });

  test("lands in HF_HOME, where the hub's own library looks", async () => {
    const path = await pullInChild({ HF_ENDPOINT: hub.url, HF_HOME: join(root, "hf") });
    expect(path).toStartWith(join(root, "hf/hub/models--org--tiny/snapshots/"));
  });

  test("fetches several files at once", async () => {
    for (const name of ["a", "b"]) hub.files.push({ path: `${name}.json`, content: text(`["${name}"]`) });
    let open = 0;
    let most = 0;
    const all = Promise.withResolvers<void>();
    hub.behave = () => ({
      do: "after",
      work: async () => {
        open += 1;
        most = Math.max(most, open);
        if (most >= 3) all.resolve();
        await all.promise;
        open -= 1;
      },
    });
    await pullModel(ID, { endpoint: hub.url, hub: join(root, "hub"), env: { HOME: root } });
    expect(most).toBeGreaterThanOrEqual(3);
  });
});

describe("the licence", () => {
  const pulled = async (cardData: object | undefined, config = "{}") => {
    hub.files = hub.files.map((file) =>
      file.path === "config.json" ? { path: "config.json", content: text(config) } : file,
    );
    hub.behaveApi = (path) =>
      path.includes("/revision/")
        ? {
            status: 200,
            body: JSON.stringify({ sha: hub.commit, ...(cardData === undefined ? {} : { cardData }) }),
          }
        : undefined;
    const result = await pullModel(ID, { endpoint: hub.url, hub: join(root, "hub"), env: { HOME: root } });
    return result.licence;
  };

  test("is that of the repository's page, with Meta's by their full names", async () => {
    expect(await pulled({ license: "llama3.2" })).toEqual({
      name: "Llama 3.2 Community License Agreement",
      url: "https://www.llama.com/llama3_2/license/",
    });
    expect(await pulled({ license: "other", license_name: "llama4" })).toMatchObject({
      url: "https://www.llama.com/llama4/license/",
    });
    expect(await pulled({ license: "apache-2.0" })).toEqual({ name: "apache-2.0" });
  });

  test("follows from the model's kind where the page says nothing of use, whatever it holds", async () => {
    const llama4 = JSON.stringify({ model_type: "llama4" });
    for (const page of [undefined, {}, { license: "other" }, { license: ["a", 1] }])
      expect((await pulled(page, llama4))?.name).toBe("Llama 4 Community License Agreement");
    expect(await pulled(undefined)).toBeUndefined();
  });

  test("is told with its address", () => {
    const said = licenceText({ name: "Llama 4 Community License Agreement", url: "https://x" });
    expect(said).toBe(
      "licence: Llama 4 Community License Agreement, https://x\n  Whoever uses the model accepts it. Built with Llama.",
    );
    expect(licenceText({ name: "mit" })).toBe("licence: mit");
  });
});
