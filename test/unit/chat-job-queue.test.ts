import { describe, expect, test } from "bun:test";
import { JobQueue } from "../../src/chat/job-queue.ts";

describe("the text worker's queue", () => {
  test("takes new jobs before started ones, and small new ones first", () => {
    const queue = new JobQueue<string>();
    queue.add("old", 5, 0);
    expect(queue.next(0)).toBe("old");
    queue.putBack("old", 1);
    queue.add("large", 1000, 1);
    queue.add("small", 10, 1);
    expect([queue.next(2), queue.next(3), queue.next(4), queue.next(5)]).toEqual([
      "small",
      "large",
      "old",
      undefined,
    ]);
  });
  test("gives started jobs turns in a circle", () => {
    const queue = new JobQueue<string>();
    queue.putBack("a", 1);
    queue.putBack("b", 2);
    const turns: (string | undefined)[] = [];
    for (let now = 10; now < 14; now++) {
      const job = queue.next(now);
      turns.push(job);
      if (job !== undefined) queue.putBack(job, now);
    }
    expect(turns).toEqual(["a", "b", "a", "b"]);
  });
  test("lets neither a started nor a large job starve under a flood of small ones", () => {
    const queue = new JobQueue<string>();
    queue.add("large", 1e9, 0);
    queue.putBack("started", 0.5);
    const slices = new Map<string, number>();
    for (let now = 1; now < 400; now++) {
      queue.add("small", 1, now);
      const job = queue.next(now) ?? "none";
      slices.set(job, (slices.get(job) ?? 0) + 1);
      if (job !== "small") queue.putBack(job, now);
    }
    expect(slices.get("large")).toBeGreaterThan(5);
    expect(slices.get("started")).toBeGreaterThan(5);
    expect(slices.get("small")).toBeGreaterThan(300);
  });
  test("forgets removed jobs", () => {
    const queue = new JobQueue<string>();
    queue.add("a", 1, 0);
    queue.add("b", 1, 0);
    queue.remove((job) => job === "a");
    expect([queue.next(1), queue.next(2)]).toEqual(["b", undefined]);
  });
});
