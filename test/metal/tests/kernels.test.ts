// The project's kernels: every file passes the strict check; head.metal, which the backend does not use yet, gives the right
// numbers; and faults that are put into the kernels are caught by the tools that should catch them.

import { afterAll, expect, test } from "bun:test";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { findClang, NO_CLANG } from "../compiler/clang.ts";
import { build, check } from "../compiler/compile.ts";
import { KernelLibrary } from "../executor/kernel-library.ts";

const ready = findClang() !== undefined;
if (!ready) console.log(NO_CLANG);
const withClang = test.skipIf(!ready);
const ROOT = join(import.meta.dir, "../../..");
const KERNELS = join(ROOT, "native/backend/metal/kernels");
const PRELUDE = join(KERNELS, "prelude.metal");
const dir = mkdtempSync(join(tmpdir(), "caravan-kernels-"));
afterAll(() => {
  rmSync(dir, { recursive: true });
});

const families = readdirSync(KERNELS).filter((name) => name.endsWith(".metal") && name !== "prelude.metal");

withClang("there are kernels to check", () => {
  expect(families.length).toBeGreaterThan(4);
});
for (const family of families)
  withClang(`${family} is strict Metal`, () => {
    const { problems, kernels } = check({ path: join(KERNELS, family), prelude: PRELUDE }, dir);
    expect(problems).toEqual([]);
    expect(kernels.length).toBeGreaterThan(0);
  });

function library(family: string, name: string, checked = true): KernelLibrary {
  const out = join(dir, `${name}.so`);
  expect(build({ path: join(KERNELS, family), prelude: PRELUDE }, out, { checked })).toEqual([]);
  return new KernelLibrary(out);
}

/** Numbers in (-1, 1) that are the same on every machine. */
function numbers(n: number, seed: number): Float32Array {
  let state = seed;
  return Float32Array.from({ length: n }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state / 2 ** 31 - 1) * 8;
  });
}

withClang("head kernels find the largest logits, the first of equals, and log Σ exp", () => {
  const head = library("head.metal", "head");
  for (const [rows, vocab, top] of [
    [1, 7, 3],
    [2, 1000, 64],
    [3, 4099, 5],
  ] as const) {
    const logits = numbers(rows * vocab, vocab);
    logits[vocab - 2] = logits[3] = 9; // a tie at the top
    const params = new Uint32Array([vocab, top]);
    const [largest, lse] = [new Uint32Array(rows), new Float32Array(rows)];
    const [indices, values] = [new Uint32Array(rows * top), new Float32Array(rows * top)];
    const threads = [256, 1, 1] as const;
    const groups = [rows, 1, 1] as const;
    const how = { groups, threads, check: true, shuffle: vocab };
    const reduced = head.run("head_reduce", { ...how, buffers: [logits, largest, lse, params] });
    const topped = head.run("head_top", { ...how, buffers: [logits, indices, values, params] });
    expect([...reduced.lines, ...topped.lines]).toEqual([]);
    for (let row = 0; row < rows; row++) {
      const x = Array.from(logits.subarray(row * vocab, (row + 1) * vocab));
      const order = x.map((_, i) => i).sort((a, b) => (x[b] ?? 0) - (x[a] ?? 0) || a - b);
      expect(largest[row]).toBe(order[0]);
      expect(Array.from(indices.subarray(row * top, (row + 1) * top))).toEqual(order.slice(0, top));
      const most = Math.max(...x);
      const sum = x.reduce((total, v) => total + Math.exp(v - most), 0);
      expect(lse[row]).toBeCloseTo(most + Math.log(sum), 4);
    }
  }
});

/** A copy of the kernels with one text replaced; the text must be there. */
function withFault(
  name: string,
  family: string,
  from: string,
  to: string,
): { path: string; prelude: string } {
  const folder = join(dir, name);
  mkdirSync(folder);
  let changed = 0;
  for (const file of [family, "prelude.metal", "params.h"]) {
    const text = readFileSync(join(KERNELS, file), "utf8");
    changed += text.includes(from) ? 1 : 0;
    writeFileSync(join(folder, file), text.replace(from, to));
  }
  expect(changed).toBe(1);
  return { path: join(folder, family), prelude: join(folder, "prelude.metal") };
}

withClang("a wrong address space in a kernel is refused", () => {
  const source = withFault(
    "space",
    "attention.metal",
    "threadgroup float* my_scores",
    "device float* my_scores",
  );
  expect(check(source, dir).problems.join("\n")).toMatch(/cannot initialize|address space/);
});

withClang("a pointer without an address space in a kernel is refused", () => {
  const source = withFault(
    "none",
    "rows.metal",
    "threadgroup float* parts, uint simdgroup",
    "float* parts, uint simdgroup",
  );
  expect(check(source, dir).problems.join("\n")).toMatch(/address space|no matching function/);
});

/** Runs rms_norm of two rows of 96 columns; returns what the checks say and the largest error. */
function runNorm(
  source: { path: string; prelude: string },
  name: string,
): { lines: string[]; error: number } {
  const out = join(dir, `${name}.so`);
  expect(build(source, out, { checked: true })).toEqual([]);
  const [h, norm, result] = [numbers(192, 5), numbers(96, 6), new Float32Array(192)];
  const params = new Uint32Array(4);
  new DataView(params.buffer).setFloat32(12, 1e-5, true);
  params.set([2, 96, 0]);
  const { lines } = new KernelLibrary(out).run("rms_norm_f32", {
    buffers: [h, norm, result, new Uint32Array(2), params],
    groups: [2, 1, 1],
    threads: [256, 1, 1],
    check: true,
    shuffle: 3,
  });
  let error = 0;
  for (let row = 0; row < 2; row++) {
    const x = h.subarray(row * 96, row * 96 + 96);
    const rms = Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / 96 + 1e-5);
    x.forEach((v, i) => {
      error = Math.max(error, Math.abs((result[row * 96 + i] ?? 0) - (v / rms) * (norm[i] ?? 0)));
    });
  }
  return { lines, error };
}

withClang("without faults the same run is silent and right", () => {
  const { lines, error } = runNorm({ path: join(KERNELS, "rows.metal"), prelude: PRELUDE }, "norm");
  expect(lines).toEqual([]);
  expect(error).toBeLessThan(1e-5);
});

withClang("a missing barrier in a kernel is reported", () => {
  const source = withFault("barrier", "rows.metal", "threadgroup_barrier(mem_flags::mem_threadgroup);", "");
  expect(runNorm(source, "barrier").lines.join("\n")).toMatch(/RACE|UNINITIALISED/);
});

withClang("a bound that is off by one in a kernel is reported", () => {
  const source = withFault(
    "bound",
    "rows.metal",
    "i < p.hidden; i += threads) squares",
    "i <= p.hidden; i += threads) squares",
  );
  // The row's next element is another row's: only the last row reads outside.
  expect(runNorm(source, "bound").lines.join("\n")).toMatch(/OUT OF BOUNDS: read/);
});

/** Faults in kernels of the backend, one text of a family replaced, that its operations' tests must catch when they run checked. */
const PROGRAMS = join(ROOT, "build/metal");
const BACKEND_FAULTS: [what: string, program: string, from: string, to: string, message: RegExp][] = [
  [
    "a missing barrier in decode attention",
    "attention_test",
    "threadgroup_barrier(mem_flags::mem_threadgroup);\n  for (uint i = thread_index; i < heads * D",
    "for (uint i = thread_index; i < heads * D",
    /RACE|UNINITIALISED/,
  ],
  [
    "a bound of decode attention that is off by one",
    "attention_test",
    "const uint to = min(from + size, keys);",
    "const uint to = min(from + size, keys + 1);",
    /should be|OUT OF BOUNDS/,
  ],
  [
    "a wrong stride of an 8-bit cache",
    "attention_test",
    "ulong(last % p.page_tokens) * cache_token(d)",
    "ulong(last % p.page_tokens) * d",
    /should be|differ|RACE/,
  ],
  [
    "a missing barrier in the matrix product",
    "products_test",
    "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint kk",
    "for (uint kk",
    /RACE|UNINITIALISED/,
  ],
  [
    "a bound of the embedding that is off by one",
    "products_test",
    "at.x >= p.a.cols / 16",
    "at.x > p.a.cols / 16",
    /OUT OF BOUNDS|RACE/,
  ],
];
const backendReady =
  ready && (process.env.CARAVAN_METAL_LIBRARY ?? "") !== "" && existsSync(join(PROGRAMS, "products_test"));
if (!backendReady)
  console.log("skipped: faults in the backend's kernels need the fake runtime: bash test/metal/run.sh");
const withBackend = test.skipIf(!backendReady);
for (const [what, program, from, to, message] of BACKEND_FAULTS)
  withBackend(
    `${what} fails the backend's tests`,
    async () => {
      const run = Bun.spawn([join(PROGRAMS, program), "1", "short"], {
        ...{ stdout: "pipe", stderr: "pipe" },
        env: { ...process.env, FAKEMETAL_CHECKED: "1", FAKEMETAL_EDIT: `${from}=>${to}` },
      });
      const [out, code] = await Promise.all([run.stdout.text(), run.exited]);
      expect(code).not.toBe(0);
      expect(out).toMatch(message);
    },
    180_000,
  );

withClang("a wrong stride in a kernel is reported or gives wrong numbers", () => {
  const source = withFault("stride", "rows.metal", ": row) * p.hidden;", ": row) * (p.hidden - 1);");
  const { lines, error } = runNorm(source, "stride");
  expect(lines.length > 0 || error > 1e-3).toBe(true);
});
