// What an operator does at the terminal: several nodes, keys, TLS, unloading and stopping, checking the configuration.

import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { built, isAlive, type Node, Place, runnersOf } from "../tools/built-caravan.ts";
import { selfSigned } from "../tools/self-signed.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";
import { until } from "../tools/until.ts";

const place = new Place();
const KEYS = { CARAVAN_API_KEYS: "an-inference-key", CARAVAN_ADMIN_KEYS: "an-administration-key" };
/** Empty: the default port, so that nodes are looked for wherever they are. */
const ANY_PORT = { CARAVAN_PORT: "" };

beforeAll(() => {
  writeTinyChatModel(join(place.models, "first"), 1);
});
afterAll(() => place.remove());

const nodes: Node[] = [];
afterEach(async () => {
  for (const node of nodes.splice(0)) {
    const runners = runnersOf(node.pid);
    node.kill("SIGKILL");
    await node.ended;
    await until(() => !runners.some(isAlive), "the runners of a killed node end");
  }
});

async function serve(args: string[] = [], env: Record<string, string> = {}): Promise<Node> {
  const node = await place.serve(args, env);
  nodes.push(node);
  return node;
}

describe.skipIf(!built)("nodes on this machine", () => {
  test("are listed with their models, unload one, and end; nothing is left behind", async () => {
    const node = await serve(["first"], KEYS);
    await until(() => node.err().includes("model ready"), "the model is loaded");
    for (const runner of process.platform === "linux" ? runnersOf(node.pid) : [])
      expect(readFileSync(`/proc/${runner}/environ`, "utf8")).not.toContain("CARAVAN_ADMIN_KEYS");
    const listed = await place.run(["ps"], { env: KEYS });
    expect(listed.out).toMatch(new RegExp(`${node.url} +${node.pid} +first +ready`));
    const json = JSON.parse((await place.run(["ps", "--json"], { env: KEYS })).out);
    expect(json).toMatchObject([{ url: node.url, pid: node.pid, models: [{ id: "first", state: "ready" }] }]);
    expect((await place.run(["ps"])).out).toContain("needs an API key");

    const forbidden = await place.run(["stop", "first"], {
      env: { CARAVAN_API_KEYS: KEYS.CARAVAN_API_KEYS },
    });
    expect(forbidden).toMatchObject({ code: 1 });
    expect(forbidden.err).toContain("not administer");
    const unloaded = await place.run(["stop", "first"], { env: KEYS });
    expect(unloaded.out).toBe(`unloaded first at ${node.url}\n`);
    expect(runnersOf(node.pid)).toEqual([]);
    expect((await place.run(["ps"], { env: KEYS })).out).toContain("no model loaded");

    const stopped = await place.run(["stop", "--port", node.port]);
    expect(stopped).toMatchObject({ code: 0, out: `stopped the node at ${node.url}\n` });
    expect((await node.ended).code).toBe(0);
    expect(readdirSync(place.path("data/nodes"))).toEqual([]);
    expect((await place.run(["stop"])).err).toContain("no node of this user runs here");
  });

  test("answer `caravan run` on whatever port they listen, and a dead one's file goes away", async () => {
    const node = await serve();
    writeFileSync(
      place.path("data/nodes/999999999.json"),
      JSON.stringify({ pid: 999_999_999, id: "0".repeat(16), url: "http://127.0.0.1:9", started: 1 }),
    );
    const answer = await place.run(["run", "first", "Hi", "-n", "4"], { env: ANY_PORT });
    expect(answer.err).toContain(`first, answered by the node at ${node.url}`);
    expect(answer.code).toBe(0);
    expect(existsSync(place.path("data/nodes/999999999.json"))).toBe(false);
  });

  test("serve TLS, and are found there by their certificate", async () => {
    const { cert, key } = selfSigned();
    writeFileSync(place.path("cert.pem"), cert);
    writeFileSync(place.path("key.pem"), key);
    const node = await serve(["--tls-cert", place.path("cert.pem"), "--tls-key", place.path("key.pem")]);
    expect(node.url).toStartWith("https://");
    const answer = await place.run(["run", "first", "Hi", "-n", "4"], { env: ANY_PORT });
    expect(answer.err).toContain(`first, answered by the node at ${node.url}`);
  });

  test("do not listen beyond this machine without a key", async () => {
    const refused = await place.run(["serve", "--host", "0.0.0.0", "--port", "0"]);
    expect(refused.code).toBe(2);
    expect(refused.err).toContain("no key is set");
    const half = await place.run(["serve", "--tls-cert", "cert.pem", "--port", "0"]);
    expect(half.err).toContain("belong together");
  });
});

describe.skipIf(!built)("caravan config", () => {
  const file = () => place.path("checked.toml");
  const check = (text: string, args: string[] = ["config", "check"]) => {
    writeFileSync(file(), text, { mode: 0o600 });
    return place.run(args, { env: { CARAVAN_CONFIG: file(), CARAVAN_PORT: "" } });
  };

  test("names the file and the line of what is wrong", async () => {
    for (const [text, message] of [
      ['host = "127.0.0.1"\nprot = 1\n', "line 2: prot is not a setting"],
      ["port = 123456\n", "line 1: port: must be <=65535"],
      ['api_key = "open sesame"\n', "line 1: api_key"],
      ["port = [1\n", "line 2"],
      ['tls_cert = "x.pem"\n', "line 1: tls_cert and tls_key belong together"],
    ] as const) {
      const checked = await check(text);
      expect(checked.code).toBe(2);
      expect(checked.err).toContain(file());
      expect(checked.err).toContain(message);
      expect(checked.err).not.toContain("sesame");
    }
  });

  test("refuses what the server would refuse to start with", async () => {
    const open = await check('host = "0.0.0.0"\n');
    expect([open.code, open.err]).toEqual([2, expect.stringContaining("no key is set")]);
    const absent = await check('tls_cert = "/nowhere/c.pem"\ntls_key = "/nowhere/k.pem"\n');
    expect([absent.code, absent.err]).toEqual([2, expect.stringContaining("/nowhere/c.pem")]);
  });

  test("shows each setting with its source, and of keys only their number", async () => {
    const shown = await check('port = 4321\napi_keys = ["a-key-that-nobody-may-see"]\n', ["config", "show"]);
    expect(shown.code).toBe(0);
    expect(shown.out).toMatch(/^port +4321 +file$/m);
    expect(shown.out).toMatch(/^api_keys +1 set +file$/m);
    expect(shown.out).toContain("is in order");
    const json = await check('api_keys = ["a-key-that-nobody-may-see"]\n', ["config", "--json"]);
    expect(JSON.parse(json.out)).toMatchObject({ file: file(), warnings: [] });
    expect(shown.out + json.out).not.toContain("nobody-may-see");
    const short = await check('api_keys = ["short"]\n');
    expect(short).toMatchObject({ code: 1 });
    expect(short.err).toContain("fewer than 16 characters");
  });
});

describe.skipIf(!built)("caravan completion", () => {
  test("gives bash a script that offers commands, options and models", async () => {
    const { out, code } = await place.run(["completion", "bash"]);
    expect(code).toBe(0);
    writeFileSync(place.path("completion.bash"), out);
    const complete = (line: string) => {
      const words = line.split(" ");
      const script = `source ${place.path("completion.bash")}; caravan() { echo first second; }
        COMP_WORDS=(${words.map((word) => `'${word}'`).join(" ")}); COMP_CWORD=${words.length - 1}; _caravan; echo "\${COMPREPLY[@]}"`;
      return Bun.spawnSync(["bash", "-c", script]).stdout.toString().trim().split(" ");
    };
    expect(complete("caravan pu")).toEqual(["pull"]);
    expect(complete("caravan serve --tls")).toEqual(["--tls-cert", "--tls-key"]);
    expect(complete("caravan run f")).toEqual(["first"]);
    expect(complete("caravan ").length).toBeGreaterThan(10);
    expect(complete("caravan ")).not.toContain("runner");
  });

  test("knows zsh and fish, the names of models, and no other shell", async () => {
    const [zsh, fish, names, other] = await Promise.all(
      ["zsh", "fish", "models", "csh"].map((what) => place.run(["completion", what])),
    );
    expect(zsh?.out).toStartWith("#compdef caravan");
    expect(fish?.out).toContain("-a serve -d");
    expect(names?.out.split("\n")).toContain("first");
    expect(other?.code).toBe(2);
  });
});
