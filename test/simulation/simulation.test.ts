// A few seeds of the simulation in every test run, and that a seed is a run. `make verify` runs 500, `make soak` 10,000.

import { expect, test } from "bun:test";
import { runSeed } from "./world.ts";

test("nodes under faults keep every promise: seeds 1 to 8", () => {
  const failed = Array.from({ length: 8 }, (_, i) => runSeed(i + 1)).filter(
    ({ violation }) => violation !== undefined,
  );
  expect(
    failed.map(({ seed, violation }) => `bun test/simulation/run.ts --seed ${seed}: ${violation}`),
  ).toEqual([]);
}, 60_000);

test("a seed is the same run every time", () => {
  const [once, again] = [runSeed(4, true), runSeed(4, true)];
  expect(once.story.length).toBeGreaterThan(20);
  expect(again).toEqual(once);
}, 60_000);

test("faults do happen in it, and requests are answered, refused and lost", () => {
  const runs = [2, 5, 8].map((seed) => runSeed(seed));
  const sum = (of: (run: (typeof runs)[number]) => number) => runs.reduce((total, run) => total + of(run), 0);
  expect(sum(({ faults }) => faults)).toBeGreaterThan(10);
  expect(sum(({ requests }) => requests.answer)).toBeGreaterThan(100);
  expect(sum(({ requests }) => requests.error)).toBeGreaterThan(10);
}, 60_000);
