// caravan doctor against one seeded fault at a time: it finds the fault, names it, and prints what mends it.

import { afterEach, beforeEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer as createTcpServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createServer } from "node:tls";
import { clockCheck, ownClockCheck } from "../../src/cli/doctor-nodes.ts";
import { Channel } from "../../src/cluster/net/channel.ts";
import { type ClusterCredentials, newCluster, saveCluster } from "../../src/cluster/net/cluster-file.ts";
import { calleeHello } from "../../src/cluster/net/hello.ts";
import { clusterFolder, type Identity, loadIdentity, newIdentity } from "../../src/cluster/net/identity.ts";
import { countProbe } from "../../src/cluster/net/link-probe.ts";
import { listen } from "../../src/cluster/net/listener.ts";
import { withoutNode } from "../../src/cluster/net/rotation.ts";
import { CARAVAN_PROTOCOL } from "../../src/cluster/protocol-version.ts";
import { createLogger } from "../../src/log.ts";

// Of a busy machine.
setDefaultTimeout(120_000);

interface Check {
  name: string;
  ok: boolean;
  detail: string;
  fix?: string;
}

let place = "";
const cleanups: (() => unknown)[] = [];
beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), "caravan-doctor-"));
});
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
  rmSync(place, { recursive: true, force: true });
});

const folder = () => clusterFolder(join(place, "data"));

async function doctor(
  env: Record<string, string> = {},
): Promise<{ checks: Check[]; text: string; code: number }> {
  const run = async (...args: string[]) => {
    const child = Bun.spawn(
      [process.execPath, join(import.meta.dir, "../../src/main.ts"), "doctor", ...args],
      {
        env: {
          ...{ PATH: process.env.PATH ?? "", HOME: place, CARAVAN_DATA_DIR: join(place, "data") },
          ...{ CARAVAN_CONFIG_DIR: join(place, "config"), HF_HUB_CACHE: join(place, "hub") },
          ...{ CARAVAN_DISCOVERY_PORT: "0", CARAVAN_CLUSTER_PORT: "0", ...env },
        },
        stdout: "pipe",
        stderr: "pipe",
      },
    );
    const [out, err] = await Promise.all([child.stdout.text(), child.stderr.text()]);
    return { out, err, code: await child.exited };
  };
  const json = await run("--json");
  if (json.out === "") throw new Error(json.err);
  const plain = await run();
  return { checks: JSON.parse(json.out), text: plain.out, code: json.code };
}

/** The one check that fails, and that the page for people says so with its fix. */
async function fault(name: string, env?: Record<string, string>): Promise<Check> {
  const { checks, text, code } = await doctor(env);
  const found = checks.find((check) => check.name === name && !check.ok);
  if (found === undefined) throw new Error(`${name} is well: ${JSON.stringify(checks, undefined, 1)}`);
  expect(code).toBe(1);
  expect(found.fix?.length ?? 0, `${name} has no fix`).toBeGreaterThan(10);
  expect(text).toMatch(new RegExp(`^FAIL  ${name}`, "m"));
  expect(text).toContain(`→ ${found.fix}`);
  return found;
}

/** This machine is in the cluster and has met `identity` at `address`. */
function met(cluster: ClusterCredentials, identity: Identity, address: string): void {
  saveCluster(folder(), { ...cluster, nodes: [{ id: identity.id, name: "studio", addresses: [address] }] });
}

async function member(cluster: ClusterCredentials, identity = newIdentity()) {
  const node = { id: identity.id, name: "studio", version: "1", incarnation: 1, port: 0 };
  const listener = await listen({
    ...{ identity, host: "127.0.0.1", port: 0, log: createLogger({ level: "silent" }) },
    settings: () => ({ cluster, node }),
    onPeer: (channel) => void countProbe(channel),
  });
  cleanups.push(() => listener.close());
  return { identity, address: `127.0.0.1:${listener.port}` };
}

describe("doctor", () => {
  test("without a cluster and with one whose nodes answer has nothing to say against it", async () => {
    expect((await doctor()).checks.find(({ name }) => name === "cluster")).toMatchObject({ ok: true });
    const home = newCluster("home");
    const { identity, address } = await member(home);
    met(home, identity, address);
    const { checks } = await doctor();
    const node = checks.find(({ name }) => name === "node");
    expect(node).toMatchObject({ ok: true, detail: expect.stringContaining(`studio at ${address} answers`) });
  });

  test("finds a node with another secret", async () => {
    const { identity, address } = await member(newCluster("home"));
    met(newCluster("home"), identity, address);
    const { detail, fix } = await fault("node");
    expect(detail).toContain(address);
    expect(detail).toContain("secret is wrong");
    expect(fix).toContain("`caravan cluster leave`, then `caravan join`");
  });

  test("finds a node of another protocol version, and names both", async () => {
    const identity = newIdentity();
    const server = createServer(
      { cert: identity.certificate, key: identity.privateKey, requestCert: true, rejectUnauthorized: false },
      (socket) => {
        const channel = new Channel(socket);
        channel.readJson(5000).then(
          () => channel.send({ caravan: 99, version: "9.9.9" }),
          () => undefined,
        );
      },
    );
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    cleanups.push(() => server.close());
    const address = server.address();
    if (address === null || typeof address === "string") throw new Error("no port");
    met(newCluster("home"), identity, `127.0.0.1:${address.port}`);
    const { detail, fix } = await fault("node");
    expect(detail).toMatch(
      new RegExp(`protocol 99 \\(caravan 9\\.9\\.9\\), this one protocol ${CARAVAN_PROTOCOL} \\(caravan `),
    );
    expect(fix).toContain("same version");
  });

  test("finds that this machine was removed from the cluster", async () => {
    const home = newCluster("home");
    const own = loadIdentity(folder());
    const { identity, address } = await member(withoutNode(home, { id: own.id, name: "me" }));
    met(home, identity, address);
    const { detail, fix } = await fault("node");
    expect(detail).toContain("removed from the cluster");
    expect(fix).toContain("caravan join");
  });

  test("finds a node that does not answer, and one at whose address another answers", async () => {
    const home = newCluster("home");
    met(home, newIdentity(), "127.0.0.1:9");
    const { detail, fix } = await fault("node");
    expect(detail).toContain("cannot reach the node");
    expect(fix).toContain("let TCP 9 through");
    const { address } = await member(home);
    met(home, newIdentity(), address);
    expect((await fault("node")).detail).toContain("another node than expected");
  });

  test("finds a node whose clock is off", async () => {
    const home = newCluster("home");
    const identity = newIdentity();
    const now = Date.now;
    const server = createServer(
      { cert: identity.certificate, key: identity.privateKey, requestCert: true, rejectUnauthorized: false },
      (socket) => {
        const node = { id: identity.id, name: "studio", version: "1", incarnation: 1, port: 0 };
        // Only what this side says is late: nothing else in the test reads the clock meanwhile.
        Date.now = () => now() - 7_200_000;
        calleeHello(new Channel(socket), { cluster: home, node })
          .then(({ peer }) => expect(peer.clockAheadMs).toBeGreaterThan(7_000_000))
          .catch(() => undefined)
          .finally(() => {
            Date.now = now;
          });
      },
    );
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    cleanups.push(() => server.close());
    const address = server.address();
    if (address === null || typeof address === "string") throw new Error("no port");
    met(home, identity, `127.0.0.1:${address.port}`);
    const { detail, fix } = await fault("clock");
    expect(detail).toMatch(/^the clock of studio is 7\d\d\d s behind this machine's/);
    expect(fix).toMatch(/timedatectl|sntp/);
    expect(clockCheck("x", 20_000)).toBeUndefined();
    expect(clockCheck("x", 31_000)?.detail).toContain("31 s ahead of");
  });

  test("finds a clock of this machine that is before the program was made", () => {
    expect(ownClockCheck(Date.now(), Date.now() - 1000).ok).toBe(true);
    const check = ownClockCheck(Date.parse("1970-01-02"), Date.parse("2026-11-01"));
    expect(check).toMatchObject({ ok: false, detail: expect.stringContaining("1970-01-02 here") });
    expect(check.fix).toMatch(/timedatectl|sntp/);
  });

  test("finds a cluster port that another program has", async () => {
    saveCluster(folder(), newCluster("home"));
    const server = createTcpServer();
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    cleanups.push(() => server.close());
    const address = server.address();
    if (address === null || typeof address === "string") throw new Error("no port");
    const env = { CARAVAN_CLUSTER_PORT: String(address.port), CARAVAN_CLUSTER_HOST: "127.0.0.1" };
    const { detail, fix } = await fault("cluster port", env);
    expect(detail).toContain(`Port ${address.port} is already in use`);
    expect(fix).toContain("--cluster-port");
  });

  test("finds a secret that other users can read, a damaged cluster file and a damaged key", async () => {
    saveCluster(folder(), newCluster("home"));
    chmodSync(join(folder(), "cluster.json"), 0o644);
    expect((await fault("cluster")).fix).toContain("chmod 600");
    writeFileSync(join(folder(), "cluster.json"), "{", { mode: 0o600 });
    chmodSync(join(folder(), "cluster.json"), 0o600);
    expect((await fault("cluster")).fix).toContain("caravan join");
    saveCluster(folder(), newCluster("home"));
    writeFileSync(join(folder(), "node.pem"), "nonsense", { mode: 0o600 });
    expect((await fault("cluster")).fix).toContain("join its cluster again");
  });

  test("finds a card that cannot be read, a model that is not whole, and settings that mean nothing", async () => {
    mkdirSync(join(place, "data/cards"), { recursive: true });
    writeFileSync(join(place, "data/cards/mine.toml"), "not = [toml");
    expect((await fault("cards")).fix).toContain("data/cards");
    mkdirSync(join(place, "data/models/half"), { recursive: true });
    writeFileSync(join(place, "data/models/half/config.json"), "{}");
    expect((await fault("models")).fix).toContain("caravan");
    expect((await fault("settings", { CARAVAN_API_KEYS: "short" })).fix).toContain("caravan.toml");
  });
});

test("a beacon of doctor's own that does not come back is said so, with what to open", async () => {
  // A network of its own, with nothing in it but a loopback interface that is down.
  const probe = Bun.spawnSync(["unshare", "-n", "true"]);
  if (probe.exitCode !== 0) {
    console.log("skipped: no network namespaces here");
    return;
  }
  saveCluster(folder(), newCluster("home"));
  const command = [process.execPath, join(import.meta.dir, "../../src/main.ts"), "doctor"];
  const child = Bun.spawn(["unshare", "-n", ...command], {
    env: {
      ...{ PATH: process.env.PATH ?? "", HOME: place, CARAVAN_DATA_DIR: join(place, "data") },
      ...{ CARAVAN_CONFIG_DIR: join(place, "config"), HF_HUB_CACHE: join(place, "hub") },
    },
    stdout: "pipe",
    stderr: "pipe",
  });
  const text = await child.stdout.text();
  expect(text).toMatch(/^FAIL {2}multicast/m);
  expect(text).toContain("→ Open UDP 11712 in the firewall, or name nodes with `--peer HOST:PORT`.");
});
