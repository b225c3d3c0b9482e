import { afterAll, beforeEach, expect, test } from "bun:test";
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ChatHistory, MOST_LINES } from "../../src/cli/chat-history.ts";

const folder = mkdtempSync(join(tmpdir(), "caravan-history-"));
const path = join(folder, "deep", "chat-history");
beforeEach(() => rmSync(join(folder, "deep"), { recursive: true, force: true }));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

test("lines are there again in the next chat, newest first and each once, for this user only", () => {
  const first = new ChatHistory(path);
  expect(first.read()).toEqual([]);
  for (const line of ["one", "two", "é 😀", "", "one", "  "]) first.add(line);
  expect(first.failure).toBeUndefined();
  expect(statSync(path).mode & 0o777).toBe(0o600);
  expect(new ChatHistory(path).read()).toEqual(["one", "é 😀", "two"]);
});

test("two chats at the same time keep each other's lines", () => {
  const [a, b] = [new ChatHistory(path), new ChatHistory(path)];
  a.add("a1");
  b.add("b1");
  a.add("a2");
  expect(new ChatHistory(path).read()).toEqual(["a2", "b1", "a1"]);
});

test("the file does not grow without end, and holds nothing that a terminal would obey", () => {
  const history = new ChatHistory(path);
  for (let i = 0; i < MOST_LINES + 200; i++) history.add(`line ${i}`);
  history.add("x".repeat(5000));
  history.add("\x1b[2Jgone");
  const lines = new ChatHistory(path).read();
  expect(lines).toHaveLength(MOST_LINES);
  expect(lines[0]).toBe(`line ${MOST_LINES + 199}`);
  expect(readFileSync(path, "utf8").split("\n")).toHaveLength(MOST_LINES + 1);
});

test("a file that others could read is closed to them, and one that is none is no reason to fail", () => {
  mkdirSync(join(folder, "deep"));
  writeFileSync(path, "typed before\n\x1b]0;title\x07\n");
  chmodSync(path, 0o644);
  expect(new ChatHistory(path).read()).toEqual(["typed before"]);
  expect(statSync(path).mode & 0o777).toBe(0o600);
  rmSync(path);
  mkdirSync(path);
  const broken = new ChatHistory(path);
  expect(broken.read()).toEqual([]);
  broken.add("x");
  expect(broken.failure?.message).toContain("cannot be written");
});
