// Connections between nodes: who is let in, what hostile bytes do, and what every wait is bounded by.

import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { randomBytes } from "node:crypto";
import { connect as connectTcp } from "node:net";
import { connect as connectTls, type TLSSocket } from "node:tls";
import fc from "fast-check";
import { Channel, MAX_BYTES_FRAME } from "../../src/cluster/net/channel.ts";
import { newCluster, secretName } from "../../src/cluster/net/cluster-file.ts";
import { dial, joinAddress, splitAddress } from "../../src/cluster/net/dial.ts";
import type { HelloSettings, Peer, Purpose } from "../../src/cluster/net/hello.ts";
import { type Identity, newIdentity } from "../../src/cluster/net/identity.ts";
import { type Listener, listen } from "../../src/cluster/net/listener.ts";
import { CARAVAN_PROTOCOL } from "../../src/cluster/protocol-version.ts";
import { createLogger } from "../../src/log.ts";
import { until } from "../tools/until.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(120_000);

const SILENT = createLogger({ level: "silent" });
const HOME = newCluster("home");

function settingsOf(identity: Identity, cluster: HelloSettings["cluster"], version = "1.0"): HelloSettings {
  return {
    cluster,
    node: { id: identity.id, name: `node ${identity.id.slice(0, 4)}`, version, incarnation: 1, port: 0 },
  };
}

interface Node {
  identity: Identity;
  listener: Listener;
  address: string;
  peers: { channel: Channel; peer: Peer; purpose: Purpose }[];
}

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

async function node(cluster: HelloSettings["cluster"] = HOME): Promise<Node> {
  const identity = newIdentity();
  const peers: Node["peers"] = [];
  const listener = await listen({
    identity,
    settings: () => settingsOf(identity, cluster),
    host: "127.0.0.1",
    port: 0,
    log: SILENT,
    onPeer: (channel, peer, purpose) => peers.push({ channel, peer, purpose }),
  });
  cleanups.push(() => listener.close());
  return { identity, listener, address: `127.0.0.1:${listener.port}`, peers };
}

async function member(to: Node, purpose: Purpose = "control") {
  const identity = newIdentity();
  const settings = settingsOf(identity, HOME);
  const met = await dial({ identity, settings, address: to.address, purpose, expected: to.identity.id });
  cleanups.push(() => met.channel.close());
  await until(() => to.peers.length > 0, "the called node has the peer");
  const there = to.peers.at(-1);
  if (there === undefined) throw new Error("no peer");
  return { identity, ...met, there };
}

/** A TLS connection that says nothing by itself. */
function rawTls(to: Node, identity?: Identity): Promise<TLSSocket> {
  return new Promise((resolve, reject) => {
    const socket = connectTls(
      {
        host: "127.0.0.1",
        port: to.listener.port,
        rejectUnauthorized: false,
        ...(identity === undefined ? {} : { cert: identity.certificate, key: identity.privateKey }),
      },
      () => resolve(socket),
    );
    socket.once("error", reject);
    cleanups.push(() => socket.destroy());
  });
}

function frame(kind: number, payload: Uint8Array | string): Buffer {
  const body = Buffer.from(payload as string);
  const head = Buffer.alloc(5);
  head.writeUInt32BE(body.length, 0);
  head[4] = kind;
  return Buffer.concat([head, body]);
}

describe("members", () => {
  test("two members know each other's ids, names and versions, and exchange messages", async () => {
    const a = await node();
    const { identity, channel, peer, there } = await member(a);
    expect(peer.id).toBe(a.identity.id);
    expect(there.peer).toEqual({
      id: identity.id,
      name: `node ${identity.id.slice(0, 4)}`,
      version: "1.0",
      incarnation: 1,
      port: 0,
      clockAheadMs: expect.any(Number),
      proved: secretName(HOME.secret),
      secretsDiffer: false,
    });
    expect(there.purpose).toBe("control");
    channel.send({ hello: "world" });
    expect(await there.channel.readJson(20_000)).toEqual({ hello: "world" });
    expect(channel.socket.getProtocol()).toBe("TLSv1.3");
  });

  test("megabytes arrive whole and in order, and a reader that stops holds the writer back", async () => {
    const { channel, there } = await member(await node());
    const data = randomBytes(40 * 1024 * 1024);
    let sent = false;
    const sending = channel.sendBytes(data).then(() => {
      sent = true;
      channel.finish();
    });
    const first = await there.channel.read(20_000);
    expect(first?.kind).toBe("bytes");
    expect(sent).toBe(false);
    let got = first?.kind === "bytes" ? first.bytes.length : 0;
    let same = first?.kind === "bytes" && Buffer.compare(first.bytes, data.subarray(0, got)) === 0;
    for (;;) {
      const next = await there.channel.read(20_000);
      if (next === undefined) break;
      if (next.kind !== "bytes") throw new Error("a message came");
      expect(next.bytes.length).toBeLessThanOrEqual(MAX_BYTES_FRAME);
      same &&= Buffer.compare(next.bytes, data.subarray(got, got + next.bytes.length)) === 0;
      got += next.bytes.length;
    }
    await sending;
    expect(got).toBe(data.length);
    expect(same).toBe(true);
  });

  test("a wait for words that never come ends at its limit and closes the connection on both sides", async () => {
    const { channel, there } = await member(await node());
    await expect(channel.read(50)).rejects.toThrow("answered nothing for 50 ms");
    await there.channel.closed;
    expect(there.channel.open).toBe(false);
  });

  test("a caller that expects another key hangs up before it says anything", async () => {
    const a = await node();
    const identity = newIdentity();
    const attempt = dial({
      identity,
      settings: settingsOf(identity, HOME),
      address: a.address,
      purpose: "control",
      expected: newIdentity().id,
    });
    await expect(attempt).rejects.toThrow("its key differs");
    expect(a.peers).toEqual([]);
  });

  test("an address where nobody listens is reported soon and by name", async () => {
    const a = await node();
    await a.listener.close();
    const identity = newIdentity();
    const attempt = dial({
      identity,
      settings: settingsOf(identity, HOME),
      address: a.address,
      purpose: "control",
    });
    await expect(attempt).rejects.toThrow("cannot reach the node");
  });

  test("addresses of both families are split and joined", () => {
    expect(splitAddress("mac.local:1234")).toEqual({ host: "mac.local", port: 1234 });
    expect(splitAddress(joinAddress("fe80::1%eth0", 7))).toEqual({ host: "fe80::1%eth0", port: 7 });
    for (const bad of ["mac", "mac:", ":7", "mac:0", "mac:70000", "::1:7"]) {
      expect(() => splitAddress(bad)).toThrow("HOST:PORT");
    }
  });
});

describe("strangers", () => {
  const refusals: [string, HelloSettings["cluster"], string][] = [
    ["another secret", newCluster("home"), "the proof of the cluster's secret is wrong"],
    ["another cluster name", { ...HOME, name: "office" }, "belongs to a cluster of another name"],
    ["no secret", undefined, "another name"],
  ];
  for (const [what, cluster, reason] of refusals) {
    test(`a node with ${what} is refused with the reason`, async () => {
      const a = await node();
      const identity = newIdentity();
      const attempt = dial({
        identity,
        settings: settingsOf(identity, cluster),
        address: a.address,
        purpose: "control",
      });
      await expect(attempt).rejects.toThrow(reason);
      await until(() => a.listener.counters.refused === 1, "the refusal is counted");
      expect(a.peers).toEqual([]);
    });
  }

  test("another protocol version is refused on both sides, with both versions named", async () => {
    const a = await node();
    const other = CARAVAN_PROTOCOL + 41;
    const socket = await rawTls(a, newIdentity());
    const channel = new Channel(socket);
    channel.send({ caravan: other, version: "9.9", anything: true });
    const answer = (await channel.readJson(20_000)) as { refused: string; caravan: number };
    expect(answer.caravan).toBe(CARAVAN_PROTOCOL);
    expect(answer.refused).toContain(`protocol ${other} (caravan 9.9)`);
    expect(answer.refused).toContain(`protocol ${CARAVAN_PROTOCOL} (caravan 1.0)`);

    const { createServer } = await import("node:tls");
    const future = newIdentity();
    const server = createServer({ cert: future.certificate, key: future.privateKey }, (accepted) => {
      accepted.write(frame(1, JSON.stringify({ caravan: other, version: "9.9", refused: "no" })));
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", () => resolve()));
    cleanups.push(() => server.close());
    const identity = newIdentity();
    const address = `127.0.0.1:${(server.address() as { port: number }).port}`;
    const attempt = dial({ identity, settings: settingsOf(identity, HOME), address, purpose: "control" });
    await expect(attempt).rejects.toThrow(
      `protocol ${other} (caravan 9.9), this one protocol ${CARAVAN_PROTOCOL}`,
    );
  });

  test("a proof that was right on one connection is worth nothing on the next", async () => {
    const a = await node();
    const identity = newIdentity();
    let overheard: unknown;
    const settings = settingsOf(identity, HOME);
    const send = Channel.prototype.send;
    Channel.prototype.send = function (value: unknown) {
      if (this.socket.localPort !== a.listener.port) overheard ??= value;
      return send.call(this, value);
    };
    try {
      const met = await dial({ identity, settings, address: a.address, purpose: "control" });
      cleanups.push(() => met.channel.close());
    } finally {
      Channel.prototype.send = send;
    }
    expect(overheard).toMatchObject({ purpose: "control" });
    const replay = new Channel(await rawTls(a, identity));
    replay.send(overheard);
    expect(await replay.readJson(20_000)).toMatchObject({ refused: expect.stringContaining("proof") });
  });

  test("a connection without a certificate, and one with our own, are refused", async () => {
    const a = await node();
    const nameless = new Channel(await rawTls(a));
    nameless.send({ caravan: CARAVAN_PROTOCOL, version: "1" });
    expect(await nameless.readJson(20_000)).toMatchObject({
      refused: expect.stringContaining("certificate"),
    });
    const attempt = dial({
      identity: a.identity,
      settings: settingsOf(a.identity, HOME),
      address: a.address,
      purpose: "control",
    });
    await expect(attempt).rejects.toThrow("this node's own key");
  });

  test("random bytes on the port end that connection, are counted, and change nothing", async () => {
    const a = await node();
    let connections = 0;
    await fc.assert(
      fc.asyncProperty(fc.uint8Array({ minLength: 1, maxLength: 2000 }), async (bytes) => {
        await new Promise<void>((resolve) => {
          connections++;
          const socket = connectTcp(a.listener.port, "127.0.0.1", () => socket.end(bytes));
          socket.resume();
          socket.on("error", () => undefined);
          socket.on("close", () => resolve());
        });
      }),
      { numRuns: 40 },
    );
    await until(() => a.listener.counters.noTls === connections, "every one is counted");
    expect(a.peers).toEqual([]);
    await member(a);
    expect(a.peers.length).toBe(1);
  });

  test("random frames inside TLS end that connection, are counted, and change nothing", async () => {
    const a = await node();
    const stranger = newIdentity();
    const hostile = fc.oneof(
      fc.uint8Array({ minLength: 5, maxLength: 600 }).map((bytes) => Buffer.from(bytes)),
      fc.json().map((text) => frame(1, text)),
      fc.constant(frame(2, "bytes before trust")),
      fc.constant(Buffer.from([0xff, 0xff, 0xff, 0xff, 1])),
      fc
        .record({
          caravan: fc.constant(CARAVAN_PROTOCOL),
          version: fc.string(),
          purpose: fc.string(),
          cluster: fc.string(),
          name: fc.string(),
          incarnation: fc.integer(),
          at: fc.double(),
          latest: fc.string(),
          proofs: fc.array(fc.record({ secret: fc.string(), proof: fc.string() })),
        })
        .map((hello) => frame(1, JSON.stringify(hello))),
    );
    let connections = 0;
    await fc.assert(
      fc.asyncProperty(hostile, async (bytes) => {
        const socket = await rawTls(a, stranger);
        connections++;
        await new Promise<void>((resolve) => {
          socket.on("close", () => resolve());
          socket.on("end", () => socket.end());
          socket.resume();
          socket.end(bytes);
        });
      }),
      { numRuns: 60 },
    );
    await until(() => a.listener.counters.refused === connections, "every one is counted");
    expect(a.listener.counters.malformed).toBeGreaterThan(0);
    expect(a.peers).toEqual([]);
    await member(a);
  });

  test("an oversized or unknown frame from a member ends its connection", async () => {
    for (const bad of [
      Buffer.from([0, 0x20, 0, 0, 1]),
      Buffer.from([0, 0, 0, 1, 9, 0]),
      frame(1, "{not json"),
    ]) {
      const a = await node();
      const { channel, there } = await member(a);
      channel.socket.write(bad);
      await there.channel.closed;
      expect(a.listener.counters.malformed).toBe(1);
    }
  });

  test("strangers that say nothing hold a bounded number of sockets and then lose them", async () => {
    const a = await node();
    const sockets = Array.from({ length: 60 }, () => {
      const socket = connectTcp(a.listener.port, "127.0.0.1");
      socket.on("error", () => undefined);
      cleanups.push(() => socket.destroy());
      return socket;
    });
    await until(() => a.listener.counters.tooMany >= 28, "the surplus is turned away");
    for (const socket of sockets) socket.destroy();
    let last: unknown;
    await until(() => sockets.every((socket) => socket.destroyed), "all are gone");
    for (let attempt = 0; attempt < 20 && a.peers.length === 0; attempt++) {
      last = await member(a).catch((thrown) => thrown);
    }
    expect(a.peers.length, String(last)).toBe(1);
  });
});
