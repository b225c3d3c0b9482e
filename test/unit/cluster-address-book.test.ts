// When which address is tried: bounded pauses, one try a node at a time, and nothing forgotten that a person asked for.

import { expect, test } from "bun:test";
import { AddressBook } from "../../src/cluster/net/address-book.ts";

const A = "a".repeat(64);
const B = "b".repeat(64);
const nobody = () => false;

test("an address is tried at once, then with pauses that double up to ten seconds", () => {
  const book = new AddressBook();
  book.learn("h:1", undefined, true, 0);
  const pauses: number[] = [];
  let now = 0;
  for (let i = 0; i < 8; i++) {
    const [candidate] = book.due(now, nobody);
    if (candidate === undefined) throw new Error(`nothing is due at ${now}`);
    candidate.dialling = true;
    expect(book.due(now, nobody)).toEqual([]);
    book.failed(candidate, "no answer", now);
    pauses.push(candidate.nextTryMs - now);
    expect(book.due(candidate.nextTryMs - 1, nobody)).toEqual([]);
    now = candidate.nextTryMs;
  }
  expect(pauses).toEqual([500, 1000, 2000, 4000, 8000, 10_000, 10_000, 10_000]);
  expect(book.problems()).toEqual([{ address: "h:1", problem: "no answer" }]);
});

test("of a node with several addresses one is tried at a time, and none while it is linked", () => {
  const book = new AddressBook();
  book.learn("h:1", A, false, 0);
  book.learn("i:1", A, false, 0);
  book.learn("j:1", B, false, 0);
  expect(book.due(0, (id) => id === A).map(({ address }) => address)).toEqual(["j:1"]);
  const due = book.due(0, nobody);
  expect(due.map(({ address }) => address)).toEqual(["h:1", "j:1"]);
  const [first] = due;
  if (first === undefined) throw new Error("none");
  first.dialling = true;
  expect(book.due(0, nobody).map(({ address }) => address)).toEqual(["j:1"]);
  book.failed(first, "x", 0);
  expect(book.addressesOf(A)).toEqual(["i:1", "h:1"]);
});

test("a link-local address is tried where a better one does not answer", () => {
  const book = new AddressBook();
  book.learn("[fe80::1%eth0]:1", A, false, 0);
  book.learn("10.0.0.1:1", A, false, 5);
  const [first] = book.due(5, nobody);
  expect(first?.address).toBe("10.0.0.1:1");
  expect(book.addressesOf(A)).toEqual(["10.0.0.1:1", "[fe80::1%eth0]:1"]);
  if (first !== undefined) book.failed(first, "x", 5);
  expect(book.due(5, nobody).map(({ address }) => address)).toEqual(["[fe80::1%eth0]:1"]);
});

test("an address that beacons no longer name is forgotten, one that a person named is not", () => {
  const book = new AddressBook();
  book.learn("h:1", A, false, 0);
  book.learn("i:1", undefined, true, 0);
  expect(book.due(31_000, nobody).map(({ address }) => address)).toEqual(["i:1"]);
  expect(book.addressesOf(A)).toEqual([]);
});

test("an address that another node has taken over is tried anew for that one", () => {
  const book = new AddressBook();
  book.learn("h:1", A, false, 0);
  const [candidate] = book.due(0, nobody);
  if (candidate === undefined) throw new Error("none");
  book.failed(candidate, "x", 0);
  book.learn("h:1", B, false, 10);
  expect(book.due(10, nobody).map(({ id }) => id)).toEqual([B]);
});

test("hostile beacons cannot make the book grow or push out what a person named", () => {
  const book = new AddressBook();
  book.learn("mine:1", undefined, true, 0);
  for (let i = 0; i < 2000; i++) book.learn(`10.0.0.1:${i + 1}`, i.toString(16).padStart(64, "0"), false, i);
  const due = book.due(2000, nobody);
  expect(due.length).toBe(512);
  expect(due.some(({ address }) => address === "mine:1")).toBe(true);
});

test("a hint adds an address, and takes none from another node nor the room of those that are known", () => {
  const book = new AddressBook();
  book.learn("h:1", A, false, 0);
  book.hint("h:1", B, 0);
  book.hint("i:1", B, 0);
  expect(book.addressesOf(A)).toEqual(["h:1"]);
  expect(book.addressesOf(B)).toEqual(["i:1"]);
  for (let i = 0; i < 2000; i++) book.hint(`10.0.0.1:${i + 1}`, B, 1);
  expect(book.addressesOf(B).length).toBe(255);
  expect(book.addressesOf(A)).toEqual(["h:1"]);
  // What a member says of itself counts more.
  book.learn("i:1", A, false, 2);
  expect(book.addressesOf(A).sort()).toEqual(["h:1", "i:1"]);
});
