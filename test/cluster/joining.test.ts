// Joining by a code that a person carries: what both sides know afterwards, and that nobody in the middle gets anything.

import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { createServer } from "node:tls";
import fc from "fast-check";
import { Channel } from "../../src/cluster/net/channel.ts";
import { type ClusterCredentials, newCluster } from "../../src/cluster/net/cluster-file.ts";
import { dial } from "../../src/cluster/net/dial.ts";
import { calleeHello, type HelloSettings } from "../../src/cluster/net/hello.ts";
import { type Identity, newIdentity } from "../../src/cluster/net/identity.ts";
import {
  commitmentOf,
  formatCode,
  newNonce,
  newSecretHalf,
  parseCode,
} from "../../src/cluster/net/join-code.ts";
import { askToJoin, JoinRequests } from "../../src/cluster/net/joining.ts";
import { listen } from "../../src/cluster/net/listener.ts";
import { createLogger } from "../../src/log.ts";
import { until } from "../tools/until.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(120_000);

const LOG = createLogger({ level: "silent" });
const HOME: ClusterCredentials = {
  ...newCluster("home"),
  nodes: [{ id: "c".repeat(64), name: "third", addresses: ["10.0.0.3:11712"] }],
};

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

function settingsOf(identity: Identity, name: string, cluster?: ClusterCredentials): HelloSettings {
  return { cluster, node: { id: identity.id, name, version: "1", incarnation: 1, port: 0 } };
}

async function member(cluster = HOME, limitMs?: number) {
  const identity = newIdentity();
  const clock = { ms: 0 };
  const requests = new JoinRequests({
    ownId: identity.id,
    credentials: () => cluster,
    now: () => clock.ms,
    ...(limitMs === undefined ? {} : { limitMs }),
  });
  const listener = await listen({
    identity,
    settings: () => settingsOf(identity, "member", cluster),
    host: "127.0.0.1",
    port: 0,
    log: LOG,
    onPeer: (channel, peer) => void requests.add(channel, peer),
  });
  cleanups.push(() => listener.close());
  return { identity, requests, clock, address: `127.0.0.1:${listener.port}` };
}

/** Starts to join at an address; resolves with the code that the person sees. */
async function joiner(address: string, name = "new mac") {
  const identity = newIdentity();
  const { channel, peer } = await dial({
    identity,
    settings: settingsOf(identity, name),
    address,
    purpose: "join",
  });
  cleanups.push(() => channel.close());
  const shown = Promise.withResolvers<string>();
  const joined = askToJoin({
    channel,
    ownId: identity.id,
    member: peer,
    onCode: shown.resolve,
    limitMs: 20_000,
  });
  joined.catch(shown.reject);
  return { identity, channel, code: await shown.promise, joined };
}

describe("a person who carries the code", () => {
  test("makes the new node get name, secret and known nodes, and the member learn who joined", async () => {
    const a = await member();
    const b = await joiner(a.address);
    expect(b.code).toMatch(/^[0-9A-Z]{5}-[0-9A-Z]{5}$/);
    await until(() => a.requests.has(b.code), "the request waits");
    expect(a.requests.list()).toEqual([{ name: "new mac", from: "127.0.0.1", waitingSeconds: 0 }]);
    const [credentials, known] = await Promise.all([b.joined, a.requests.accept(b.code.toLowerCase())]);
    expect(credentials).toEqual(HOME);
    expect(known).toEqual({ id: b.identity.id, name: "new mac", addresses: [] });
    expect(a.requests.list()).toEqual([]);
  });

  test("chooses among several new nodes that wait", async () => {
    const a = await member();
    const waiting = [
      await joiner(a.address, "one"),
      await joiner(a.address, "two"),
      await joiner(a.address, "three"),
    ];
    await until(() => a.requests.list().length === 3, "all wait");
    const second = waiting[1];
    if (second === undefined) throw new Error("three joiners");
    expect((await a.requests.accept(second.code)).name).toBe("two");
    expect(await second.joined).toEqual(HOME);
    expect(a.requests.list().map(({ name }) => name)).toEqual(["one", "three"]);
    for (const other of [waiting[0], waiting[2]]) {
      other?.joined.catch(() => undefined);
      other?.channel.close();
    }
  });

  test("who mistypes the first half is told, and may type again", async () => {
    const a = await member();
    const b = await joiner(a.address);
    await until(() => a.requests.has(b.code), "the request waits");
    const wrong = `${b.code[0] === "0" ? "1" : "0"}${b.code.slice(1)}`;
    await expect(a.requests.accept(wrong)).rejects.toThrow("no node waits with this code");
    await Promise.all([b.joined, a.requests.accept(b.code)]);
  });

  test("who mistypes the second half has to start again: neither side believes the other", async () => {
    const a = await member();
    const b = await joiner(a.address);
    await until(() => a.requests.has(b.code), "the request waits");
    const wrong = `${b.code.slice(0, -1)}${b.code.endsWith("0") ? "1" : "0"}`;
    const [joined, accepted] = await Promise.allSettled([b.joined, a.requests.accept(wrong)]);
    expect(String(joined.status === "rejected" && joined.reason)).toContain("not this one");
    expect(String(accepted.status === "rejected" && accepted.reason)).toContain("second half");
    await expect(a.requests.accept(b.code)).rejects.toThrow("no node waits");
  });

  test("who comes too late finds the request gone, and the new node says so", async () => {
    const a = await member(HOME, 60);
    const b = await joiner(a.address);
    await expect(b.joined).rejects.toThrow("nobody approved the code in time");
    await expect(a.requests.accept(b.code)).rejects.toThrow("no node waits");
  });
});

describe("codes", () => {
  test("are read as people type them", () => {
    expect(parseCode(" 7k2qf-m9xpt ")).toEqual({ check: "7K2QF", secret: "M9XPT" });
    expect(parseCode("oil00 00000")).toEqual({ check: "01100", secret: "00000" });
    for (const bad of ["", "7K2QF", "7K2QF-M9XP", "7K2QF-M9XPU", "7K2QF-M9XPTT"]) {
      expect(() => parseCode(bad), bad).toThrow("ten letters and digits");
    }
  });

  test("of any halves survive being written and read", () => {
    fc.assert(
      fc.property(fc.integer(), () => {
        const [check, secret] = [newSecretHalf(), newSecretHalf()];
        expect(parseCode(formatCode(check, secret))).toEqual({ check, secret });
      }),
      { numRuns: 50 },
    );
  });
});

describe("an attacker", () => {
  /** Ends TLS with keys of his own on both sides and passes every message on. */
  async function inTheMiddle(of: { address: string }): Promise<{ address: string; seen: unknown[] }> {
    const identity = newIdentity();
    const seen: unknown[] = [];
    const server = createServer(
      { cert: identity.certificate, key: identity.privateKey, requestCert: true, rejectUnauthorized: false },
      async (socket) => {
        const left = new Channel(socket);
        await calleeHello(left, settingsOf(identity, "member", HOME));
        const { channel: right } = await dial({
          identity,
          settings: settingsOf(identity, "new mac"),
          address: of.address,
          purpose: "join",
        });
        const pass = async (from: Channel, to: Channel) => {
          for (let frame = await from.read(); frame?.kind === "json"; frame = await from.read()) {
            seen.push(frame.value);
            to.send(frame.value);
          }
        };
        void pass(left, right).catch(() => right.finish());
        void pass(right, left).catch(() => left.finish());
      },
    );
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", () => resolve()));
    cleanups.push(() => server.close());
    return { address: `127.0.0.1:${(server.address() as { port: number }).port}`, seen };
  }

  test("in the middle makes the code wrong at the member, and sees no secret", async () => {
    const a = await member();
    const middle = await inTheMiddle(a);
    const b = await joiner(middle.address);
    b.joined.catch(() => undefined);
    await until(() => a.requests.list().length === 1, "the member has a request");
    await expect(a.requests.accept(b.code)).rejects.toThrow("no node waits with this code");
    expect(JSON.stringify(middle.seen)).not.toContain(HOME.secret);
    b.channel.close();
  });

  test("who plays the member without the code cannot put a new node into his cluster", async () => {
    const identity = newIdentity();
    const evil = newCluster("home");
    const listener = await listen({
      identity,
      settings: () => settingsOf(identity, "member", evil),
      host: "127.0.0.1",
      port: 0,
      log: LOG,
      onPeer: async (channel) => {
        await channel.readJson(20_000);
        channel.send({ nonce: newNonce() });
        await channel.readJson(20_000);
        channel.send({ proof: "0".repeat(64) });
        channel.send({ credentials: evil });
      },
    });
    cleanups.push(() => listener.close());
    const b = await joiner(`127.0.0.1:${listener.port}`);
    await expect(b.joined).rejects.toThrow("somebody is between the two nodes");
  });

  test("who changes his random number after he has seen the member's is turned away", async () => {
    const a = await member();
    const identity = newIdentity();
    const { channel } = await dial({
      identity,
      settings: settingsOf(identity, "x"),
      address: a.address,
      purpose: "join",
    });
    channel.send({ commitment: commitmentOf(newNonce()) });
    await channel.readJson(20_000);
    channel.send({ nonce: newNonce() });
    expect(await channel.readJson(20_000)).toMatchObject({ declined: expect.stringContaining("promised") });
    expect(a.requests.list()).toEqual([]);
  });

  test("gets few tries: the sixth request within seconds is turned away, a later one is not", async () => {
    const a = await member();
    for (let i = 0; i < 5; i++) {
      const b = await joiner(a.address, `n${i}`);
      b.joined.catch(() => undefined);
      await until(() => a.requests.has(b.code), "the request waits");
      b.channel.close();
    }
    await until(() => a.requests.list().length === 0, "all are gone");
    await expect(joiner(a.address)).rejects.toThrow("too many nodes ask to join");
    a.clock.ms += 3000;
    const b = await joiner(a.address);
    await until(() => a.requests.has(b.code), "the request waits");
    b.joined.catch(() => undefined);
    b.channel.close();
  });
});
