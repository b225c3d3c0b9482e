// The limit on a thread's work counts its processor time, and nothing that it waits for.

import { expect, test } from "bun:test";
import { WorkLimit } from "../../src/work-limit.ts";

function work(ms: number): void {
  const limit = new WorkLimit(ms);
  while (!limit.passed);
}

test("waiting is not work", () => {
  const limit = new WorkLimit(100);
  Bun.sleepSync(300);
  expect(limit.passed).toBe(false);
  expect(limit.leftMs).toBeGreaterThan(50);
});

test("work passes the limit, however little of the machine it gets", () => {
  const limit = new WorkLimit(50);
  work(40);
  expect(limit.leftMs).toBeLessThan(10);
  work(20);
  expect(limit.passed).toBe(true);
  expect(limit.leftMs).toBeLessThan(0);
});

test("a limit of nothing is passed at once", () => {
  expect(new WorkLimit(0).passed).toBe(true);
  expect(new WorkLimit(-1).passed).toBe(true);
});
