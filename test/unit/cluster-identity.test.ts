// A node's key, certificate and cluster file: kept, private, and refused when damaged.

import { afterEach, beforeEach, expect, test } from "bun:test";
import { X509Certificate } from "node:crypto";
import { chmodSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { nodeIdOf } from "../../src/cluster/net/certificate.ts";
import {
  forgetCluster,
  loadCluster,
  newCluster,
  purposeKey,
  saveCluster,
  withKnownNode,
} from "../../src/cluster/net/cluster-file.ts";
import { loadIdentity, newIdentity, nextIncarnation } from "../../src/cluster/net/identity.ts";

let folder = "";
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "caravan-identity-"));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

test("a node keeps its id over restarts, in a file that only its user can read", () => {
  const first = loadIdentity(folder);
  const again = loadIdentity(folder);
  expect(again).toEqual(first);
  expect(first.id).toMatch(/^[0-9a-f]{64}$/);
  expect(statSync(join(folder, "node.pem")).mode & 0o777).toBe(0o600);
  expect(newIdentity().id).not.toBe(first.id);
});

test("the certificate is one that an X.509 reader takes, signed by its own key", () => {
  const { certificate, id } = newIdentity();
  const read = new X509Certificate(certificate);
  expect(read.verify(read.publicKey)).toBe(true);
  expect(read.subject).toBe("CN=caravan node");
  expect(nodeIdOf(read.raw)).toBe(id);
});

test("a key file that others can read, or that is damaged, is refused and not replaced", () => {
  loadIdentity(folder);
  const path = join(folder, "node.pem");
  chmodSync(path, 0o644);
  expect(() => loadIdentity(folder)).toThrow("other users of this machine can read this secret");
  chmodSync(path, 0o600);
  writeFileSync(path, readFileSync(path, "utf8").slice(0, 300));
  expect(() => loadIdentity(folder)).toThrow("this node's key is damaged");
  const [a, b] = [newIdentity(), newIdentity()];
  writeFileSync(path, a.privateKey + b.certificate);
  expect(() => loadIdentity(folder)).toThrow("of another key");
});

test("starts are counted, and a damaged count does not go back", () => {
  expect(nextIncarnation(folder)).toBe(1);
  expect(nextIncarnation(folder)).toBe(2);
  writeFileSync(join(folder, "incarnation"), "garbage");
  expect(nextIncarnation(folder)).toBeGreaterThan(1_000_000_000);
});

test("a cluster's file comes back as it was saved and is gone when forgotten", () => {
  expect(loadCluster(folder)).toBeUndefined();
  const cluster = withKnownNode(newCluster("home"), { id: "a".repeat(64), name: "mac", addresses: ["h:1"] });
  saveCluster(folder, cluster);
  expect(loadCluster(folder)).toEqual(cluster);
  expect(statSync(join(folder, "cluster.json")).mode & 0o777).toBe(0o600);
  writeFileSync(join(folder, "cluster.json"), JSON.stringify({ ...cluster, secret: "short" }));
  expect(() => loadCluster(folder)).toThrow("a secret has 32 bytes");
  forgetCluster(folder);
  expect(loadCluster(folder)).toBeUndefined();
});

test("a cluster's name has a plain form, and keys for different purposes differ", () => {
  expect(() => newCluster("my cluster")).toThrow("a cluster name is");
  const { secret } = newCluster("home");
  expect(purposeKey(secret, "a").equals(purposeKey(secret, "b"))).toBe(false);
  expect(purposeKey(secret, "a").length).toBe(32);
});

test("a node that is met again replaces what was known of it, and the list stays bounded", () => {
  let cluster = newCluster("home");
  for (let i = 0; i < 300; i++) {
    cluster = withKnownNode(cluster, { id: i.toString(16).padStart(64, "0"), name: "n", addresses: [] });
  }
  expect(cluster.nodes.length).toBe(256);
  const last = cluster.nodes.at(-1);
  if (last === undefined) throw new Error("no nodes");
  expect(withKnownNode(cluster, { ...last })).toBe(cluster);
  expect(withKnownNode(cluster, { ...last, name: "new" }).nodes.length).toBe(256);
});
