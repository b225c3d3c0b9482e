// How members come to one secret after nodes were removed, in whatever order they hear of it.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import * as v from "valibot";
import {
  type ClusterCredentials,
  CredentialsSchema,
  MAX_PREVIOUS,
  MAX_REMOVED,
  newCluster,
  secretName,
} from "../../src/cluster/net/cluster-file.ts";
import {
  forNewNode,
  isKnown,
  isRemoved,
  merged,
  secretsOf,
  withoutNode,
} from "../../src/cluster/net/rotation.ts";

const idOf = (i: number) => i.toString(16).repeat(64).slice(0, 64);
const nodeOf = (i: number) => ({ id: idOf(i), name: `node ${i}`, addresses: [] });

/** The cluster as node i has it: it knows all others. */
function cluster(count: number): ClusterCredentials[] {
  const made = newCluster("home");
  return Array.from({ length: count }, (_, i) => ({
    ...made,
    nodes: Array.from({ length: count }, (_, j) => nodeOf(j)).filter(({ id }) => id !== idOf(i)),
  }));
}

/** What i tells of the cluster: it is among the nodes. */
function told(own: ClusterCredentials, i: number): ClusterCredentials {
  return { ...own, nodes: [...own.nodes, nodeOf(i)] };
}

describe("a removal", () => {
  test("makes a new secret that the old one does not tell, and keeps the old one for nodes that missed it", () => {
    const [own] = cluster(3);
    if (own === undefined) throw new Error("three");
    const next = withoutNode(own, nodeOf(2));
    expect(next.secret).not.toBe(own.secret);
    expect(next.generation).toBe(2);
    expect(next.previous).toEqual([own.secret]);
    expect(next.removed).toEqual([{ id: idOf(2), name: "node 2" }]);
    expect(next.nodes.map(({ id }) => id)).toEqual([idOf(1)]);
    expect(forNewNode(next).previous).toEqual([]);
    expect(secretName(next.secret)).toMatch(/^[0-9a-f]{16}$/);
  });

  test("is learnt from any member that knows of it, whoever speaks first", () => {
    const [a, b] = cluster(3);
    if (a === undefined || b === undefined) throw new Error("three");
    const next = withoutNode(a, nodeOf(2));
    const learnt = merged(idOf(1), b, told(next, 0));
    expect(learnt.secret).toBe(next.secret);
    expect(learnt.nodes.map(({ id }) => id)).toEqual([idOf(0)]);
    // The other way round nothing is new.
    expect(merged(idOf(0), next, told(b, 1))).toBe(next);
  });

  test("does not take over who was let in by the old secret meanwhile", () => {
    const [a, b] = cluster(3);
    if (a === undefined || b === undefined) throw new Error("three");
    const next = withoutNode(a, nodeOf(2));
    const deceived = { ...b, nodes: [...b.nodes, nodeOf(9)] };
    expect(merged(idOf(1), deceived, told(next, 0)).nodes.map(({ id }) => id)).toEqual([idOf(0)]);
    expect(merged(idOf(0), next, told(deceived, 1)).nodes.map(({ id }) => id)).toEqual([idOf(1)]);
  });

  test("of another cluster changes nothing", () => {
    const [a] = cluster(2);
    if (a === undefined) throw new Error("two");
    expect(merged(idOf(0), a, { ...withoutNode(a, nodeOf(1)), name: "office" })).toBe(a);
  });

  test("beyond the limit is refused in words", () => {
    const [a] = cluster(2);
    if (a === undefined) throw new Error("two");
    const full = {
      ...a,
      removed: Array.from({ length: MAX_REMOVED }, (_, i) => ({ id: `${i}`, name: "x" })),
    };
    expect(() => withoutNode(full, nodeOf(1))).toThrow("were removed from this cluster already");
  });
});

test("a file of an earlier version is read as the first generation", () => {
  const { name, secret } = newCluster("home");
  expect(v.parse(CredentialsSchema, { name, secret, nodes: [] })).toEqual({
    ...{ name, secret, generation: 1, previous: [], removed: [], nodes: [] },
  });
});

test("members that removed nodes in parts of a split network come to one secret, which no removed node has ever had", () => {
  const COUNT = 6;
  fc.assert(
    fc.property(
      // Removals (who, whom) and meetings (who, with whom) in any order; then everybody meets everybody.
      fc.array(fc.tuple(fc.boolean(), fc.nat(COUNT - 1), fc.nat(COUNT - 1)), { maxLength: 14 }),
      (steps) => {
        const own = cluster(COUNT);
        // Everything that a node has ever been told.
        const knows = own.map((each) => new Set([each.secret]));
        const at = (i: number): ClusterCredentials => {
          const found = own[i];
          if (found === undefined) throw new Error("no such node");
          return found;
        };
        const take = (i: number, next: ClusterCredentials) => {
          own[i] = next;
          for (const secret of secretsOf(next)) knows[i]?.add(secret);
        };
        const meet = (i: number, j: number) => {
          const [a, b] = [at(i), at(j)];
          if (i === j || isRemoved(a, idOf(j)) || isRemoved(b, idOf(i))) return;
          take(i, merged(idOf(i), a, told(b, j)));
          take(j, merged(idOf(j), b, told(a, i)));
        };
        let removals = 0;
        for (const [removes, i, j] of steps) {
          if (!removes) meet(i, j);
          else if (i !== j && !isRemoved(at(i), idOf(j)) && removals < MAX_PREVIOUS) {
            removals++;
            take(i, withoutNode(at(i), nodeOf(j)));
          }
        }
        for (let round = 0; round < 4; round++)
          for (let i = 0; i < COUNT; i++) for (let j = 0; j < i; j++) meet(i, j);
        // Those whom nobody has removed.
        const removed = new Set(own.flatMap((each) => each.removed.map(({ id }) => id)));
        const rest = own.filter((_, i) => !removed.has(idOf(i)));
        for (const each of rest) {
          expect(each.secret).toBe(rest[0]?.secret ?? "");
          expect(new Set(each.removed.map(({ id }) => id))).toEqual(
            new Set(rest[0]?.removed.map(({ id }) => id)),
          );
        }
        const [first] = rest;
        if (first === undefined) return;
        for (const { id } of first.removed) {
          const i = own.findIndex((_, k) => idOf(k) === id);
          expect(knows[i]?.has(first.secret)).toBe(false);
        }
      },
    ),
    { numRuns: 400 },
  );
});

test("whatever a removed node tells members that were away, the members' secret is none that it can have", () => {
  const COUNT = 5;
  const [R, SECOND] = [COUNT - 1, 77];
  const [members, away] = [
    [0, 1],
    [2, 3],
  ];
  const ids = fc.uniqueArray(fc.constantFrom(0, 1, 2, 3, R, SECOND, 80, 81), { maxLength: 6 });
  const lie = fc.record({
    kind: fc.constant("lie" as const),
    to: fc.constantFrom(...away),
    secret: fc.constantFrom("e1", "e2", "e3"),
    generation: fc.constantFrom(1, 2, 1000, 1_000_000_000),
    previous: fc.uniqueArray(fc.constantFrom("first", "e1", "e2", "e3"), { maxLength: 4 }),
    removed: ids,
    nodes: ids,
  });
  const meeting = fc.record({
    kind: fc.constant("meeting" as const),
    i: fc.constantFrom(0, 1, 2, 3),
    j: fc.constantFrom(0, 1, 2, 3),
  });
  fc.assert(
    fc.property(fc.array(fc.oneof(lie, meeting), { maxLength: 12 }), (steps) => {
      const own = cluster(COUNT);
      const at = (i: number): ClusterCredentials => {
        const found = own[i];
        if (found === undefined) throw new Error("no such node");
        return found;
      };
      const made = (called: string) =>
        called === "first" ? first : Buffer.alloc(32, called).toString("base64");
      const { secret: first } = at(0);
      const knows = new Set([first, made("e1"), made("e2"), made("e3")]);
      const derived: { from: [string, string]; secret: string }[] = [];
      // What it can compute from what it knows, and what those tell it that still take it, or its second key, for a member.
      const spy = () => {
        for (const i of away) {
          const trusts = [R, SECOND].some((k) => isKnown(at(i), idOf(k)) && !isRemoved(at(i), idOf(k)));
          if (trusts) for (const secret of secretsOf(at(i))) knows.add(secret);
        }
        for (const { from, secret } of derived) if (from.every((each) => knows.has(each))) knows.add(secret);
      };
      own[0] = withoutNode(at(0), nodeOf(R));
      own[1] = merged(idOf(1), at(1), told(at(0), 0));
      for (const step of steps) {
        if (step.kind === "lie") {
          const said: ClusterCredentials = {
            ...{ name: "home", secret: made(step.secret), generation: step.generation },
            previous: step.previous.map(made),
            removed: step.removed.map((k) => ({ id: idOf(k), name: "removed" })),
            nodes: step.nodes.map(nodeOf),
          };
          const trusts = [R, SECOND].some((k) => isKnown(at(step.to), idOf(k)));
          if (trusts && !isRemoved(said, idOf(step.to)))
            own[step.to] = merged(idOf(step.to), at(step.to), said);
        } else {
          const [a, b] = [at(step.i), at(step.j)];
          const common = secretsOf(a).some((each) => secretsOf(b).includes(each));
          if (step.i === step.j || !common || isRemoved(a, idOf(step.j)) || isRemoved(b, idOf(step.i)))
            continue;
          const [next, others] = [
            merged(idOf(step.i), a, told(b, step.j)),
            merged(idOf(step.j), b, told(a, step.i)),
          ];
          own[step.i] = next;
          own[step.j] = others;
          if (next.secret === others.secret && ![a.secret, b.secret].includes(next.secret))
            derived.push({ from: [a.secret, b.secret], secret: next.secret });
        }
        spy();
        for (const i of members) {
          expect(knows.has(at(i).secret)).toBe(false);
          expect(isKnown(at(i), idOf(SECOND))).toBe(false);
          expect(isRemoved(at(i), idOf(R))).toBe(true);
        }
      }
    }),
    { numRuns: 1500 },
  );
});

test("a count of secrets at its limit still makes a file that can be read", () => {
  const [own, other] = cluster(3);
  if (own === undefined || other === undefined) throw new Error("three");
  const most = { ...own, generation: 1_000_000_000 };
  const next = withoutNode(most, nodeOf(2));
  expect(v.parse(CredentialsSchema, next)).toEqual(next);
  expect(v.parse(CredentialsSchema, merged(idOf(1), other, told(next, 0))).secret).toBe(next.secret);
  expect(v.safeParse(CredentialsSchema, { ...own, generation: Number.MAX_SAFE_INTEGER }).success).toBe(false);
});
