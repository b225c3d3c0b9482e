// Faults that a GPU would hide must be reported by a checked library; the correct forms beside them must not be.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { findClang, NO_CLANG } from "../compiler/clang.ts";
import { build } from "../compiler/compile.ts";
import { KernelLibrary } from "../executor/kernel-library.ts";

const ready = findClang() !== undefined;
if (!ready) console.log(NO_CLANG);
const withClang = test.skipIf(!ready);
const dir = mkdtempSync(join(tmpdir(), "caravan-msl-"));
afterAll(() => {
  rmSync(dir, { recursive: true });
});

const PARAMETERS = [
  "device float* a [[buffer(0)]]",
  "device const float* b [[buffer(1)]]",
  "constant uint2& n [[buffer(2)]]",
  "device atomic_uint* c [[buffer(3)]]",
  "threadgroup float* s [[threadgroup(0)]]",
  "uint i [[thread_position_in_grid]]",
  "uint t [[thread_index_in_threadgroup]]",
  "uint l [[thread_index_in_simdgroup]]",
  "uint g [[simdgroup_index_in_threadgroup]]",
].join(", ");
const BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);";

/** Two threadgroups of 64 threads; a and b have 128 floats, s has 64. No message: must be silent. */
const CASES: [what: string, body: string, message?: RegExp][] = [
  ["a read past the end", "a[i] = b[i + 1];", /OUT OF BOUNDS: read.*past the end of buffer 1/],
  ["a write past the end", "a[i * 2] = b[i];", /OUT OF BOUNDS: write/],
  ["a wild read", "a[i] = b[i + 100000000];", /OUT OF BOUNDS: read/],
  ["an index below zero", "a[i] = b[i - 1];", /OUT OF BOUNDS/],
  ["a write past threadgroup memory", "s[t + 1] = b[i]; a[i] = 0;", /OUT OF BOUNDS: write/],
  ["a missing barrier", "s[t] = b[i]; a[i] = s[t ^ 1];", /RACE|UNINIT/],
  ["(fine) the barrier", `s[t] = b[i]; ${BARRIER} a[i] = s[63 - t];`],
  [
    "a barrier of device memory alone",
    "s[t] = b[i]; threadgroup_barrier(mem_flags::mem_device); a[i] = s[63 - t];",
    /RACE/,
  ],
  [
    "a barrier of no memory",
    "s[t] = b[i]; threadgroup_barrier(mem_flags::mem_none); a[i] = s[63 - t];",
    /RACE/,
  ],
  [
    "a simdgroup barrier between simdgroups",
    "s[t] = b[i]; simdgroup_barrier(mem_flags::mem_threadgroup); a[i] = s[63 - t];",
    /RACE|UNINIT/,
  ],
  [
    "(fine) a simdgroup barrier within one",
    "s[t] = b[i]; simdgroup_barrier(mem_flags::mem_threadgroup); a[i] = s[t ^ 1];",
  ],
  [
    "simd_sum in the place of a barrier",
    "s[t] = b[i]; float z = simd_sum(b[i]); a[i] = s[t ^ 1] + z;",
    /RACE/,
  ],
  ["a word that all threads write", "s[0] = b[i]; a[i] = 0;", /RACE: write/],
  ["(fine) one that one thread writes", `if (t == 0) s[0] = b[i]; ${BARRIER} a[i] = s[0];`],
  ["threadgroups that write the same place", "a[t] = b[i];", /RACE: write/],
  ["(fine) atomics", "atomic_fetch_add_explicit(c, 1u, memory_order_relaxed); a[i] = 0;"],
  ["another threadgroup's output", "a[i] = b[i]; if (i > 64) a[i] = a[i - 64];", /RACE/],
  [
    "lanes in different simdgroup operations",
    "if (l < 16) a[i] = simd_sum(b[i]); else a[i] = simd_max(b[i]);",
    /DIVERGENCE/,
  ],
  [
    "a simdgroup operation against a barrier",
    `if (l == 0) { ${BARRIER} a[i] = 0; } else a[i] = simd_sum(b[i]);`,
    /DIVERGENCE/,
  ],
  ["a return before a barrier", `if (t == 5) return; ${BARRIER} a[i] = 0;`, /DIVERGENCE/],
  ["(fine) a return before simd_sum", "if (l > 20) return; a[i] = simd_sum(1.0f);"],
  [
    "simdgroups at different barriers",
    `if (g == 0) { ${BARRIER} } else { ${BARRIER} } a[i] = 0;`,
    /DIVERGENCE/,
  ],
  [
    "a matrix product with inactive lanes",
    "if (l == 3) return; simdgroup_float8x8 x(1), y(2), z(0); simdgroup_multiply_accumulate(z, x, y, z); simdgroup_store(z, s, 8); a[i] = 0;",
    /inactive/,
  ],
  [
    "a matrix load from different places",
    "simdgroup_float8x8 x; simdgroup_load(x, b + l, 8); simdgroup_store(x, s, 8); a[i] = 0;",
    /differ/,
  ],
  ["threadgroup memory that nobody wrote", "a[i] = s[t];", /UNINITIALISED/],
  ["a shift by 32 or more", "a[i] = float(1u << (n.x + l));", /UNDEFINED: shift/],
  [
    "an index outside a local array",
    "float q[4] = {0, 0, 0, 0}; q[n.x + l] = 1; a[i] = q[0];",
    /UNDEFINED: out_of_bounds/,
  ],
  ["division by zero", "a[i] = float(64u / (l - n.y));", /UNDEFINED: divrem/],
  [
    "a misaligned load",
    "a[i] = ((device const float*)((device const char*)b + n.x))[0];",
    /UNDEFINED: type_mismatch/,
  ],
  [
    "waiting for a word that nobody writes",
    "if (i == 0) { while (atomic_load_explicit(c, memory_order_relaxed) < 5u) {} } a[i] = 0;",
    /SPIN/,
  ],
];

const kernels = CASES.map(([, body], i) => `kernel void k${i}(${PARAMETERS}) {\n${body}\n}\n`);
let library: KernelLibrary;
beforeAll(() => {
  if (!ready) return;
  const path = join(dir, "faults.metal");
  writeFileSync(path, `#include <metal_stdlib>\nusing namespace metal;\n${kernels.join("")}`);
  expect(build({ path }, join(dir, "faults.so"), { checked: true })).toEqual([]);
  library = new KernelLibrary(join(dir, "faults.so"));
}, 60_000);

CASES.forEach(([what, , message], i) => {
  withClang(`${message === undefined ? "passes" : "reports"} ${what.replace("(fine) ", "")}`, () => {
    const { lines } = library.run(`k${i}`, {
      buffers: [
        new Float32Array(128),
        new Float32Array(128).fill(1),
        new Uint32Array([3, 0]),
        new Uint32Array(1),
      ],
      groups: [2, 1, 1],
      threads: [64, 1, 1],
      threadgroupLengths: [256],
      check: true,
    });
    if (message === undefined) expect(lines).toEqual([]);
    else expect(lines.join("\n")).toMatch(message);
  });
});

const FIRST_WAITS = "if (i == 64) atomic_store_explicit(c, 9u, memory_order_relaxed);";
const LAST_WAITS = "if (i == 0) atomic_store_explicit(c, 9u, memory_order_relaxed);";
const WAIT = "while (atomic_load_explicit(c, memory_order_relaxed) != 9u) {}";
withClang("a kernel that waits for another threadgroup is reported, whichever waits for which", () => {
  const path = join(dir, "wait.metal");
  const kernel = (name: string, body: string) =>
    `kernel void ${name}(${PARAMETERS}) {\n${body}\na[i] = 0;\n}\n`;
  writeFileSync(
    path,
    `#include <metal_stdlib>\nusing namespace metal;\n${kernel("first", `${FIRST_WAITS} if (i == 0) ${WAIT}`)}${kernel("last", `${LAST_WAITS} if (i == 64) ${WAIT}`)}`,
  );
  expect(build({ path }, join(dir, "wait.so"), { checked: true })).toEqual([]);
  const waiting = new KernelLibrary(join(dir, "wait.so"));
  const lines = (name: string, shuffle: number) =>
    waiting
      .run(name, {
        buffers: [new Float32Array(128), new Float32Array(128), new Uint32Array(2), new Uint32Array(1)],
        ...{ groups: [2, 1, 1], threads: [64, 1, 1], threadgroupLengths: [256], check: true, shuffle },
      })
      .lines.join("\n");
  expect(lines("first", 2)).toMatch(/SPIN.*another threadgroup/);
  expect(lines("last", 3)).toMatch(/SPIN.*another threadgroup/);
  expect([lines("first", 3), lines("last", 2)]).toEqual(["", ""]); // hence both orders
});

withClang("a shuffled order shows a missing barrier in the result, without checks", () => {
  const path = join(dir, "order.metal");
  writeFileSync(
    path,
    `#include <metal_stdlib>\nusing namespace metal;\nkernel void k(device float* a [[buffer(0)]], threadgroup float* s [[threadgroup(0)]], uint t [[thread_index_in_threadgroup]]) { s[t] = float(t); a[t] = s[63 - t]; }\n`,
  );
  expect(build({ path }, join(dir, "order.so"))).toEqual([]);
  const plain = new KernelLibrary(join(dir, "order.so"));
  const results = [1, 2, 3].map((shuffle) => {
    const a = new Float32Array(64);
    plain.run("k", {
      buffers: [a],
      groups: [1, 1, 1],
      threads: [64, 1, 1],
      threadgroupLengths: [256],
      shuffle,
    });
    return a.join();
  });
  expect(new Set(results).size).toBeGreaterThan(1);
});

withClang("bytes that a kernel loads are counted by buffer", () => {
  const path = join(dir, "count.metal");
  writeFileSync(
    path,
    `#include <metal_stdlib>\nusing namespace metal;\nkernel void k(device float* a [[buffer(0)]], device const float* b [[buffer(1)]], uint i [[thread_position_in_grid]]) { a[i] = b[i] + b[0]; }\n`,
  );
  expect(build({ path }, join(dir, "count.so"), { checked: true })).toEqual([]);
  const { lines, bytesRead } = new KernelLibrary(join(dir, "count.so")).run("k", {
    buffers: [new Float32Array(64), new Float32Array(64)],
    groups: [1, 1, 1],
    threads: [64, 1, 1],
    check: true,
  });
  expect({ lines, read: bytesRead[1] }).toEqual({ lines: [], read: 64 * 8 });
});
