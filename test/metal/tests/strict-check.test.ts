// The strict check refuses what Metal's compiler refuses (or the project forbids), and accepts valid kernels.

import { afterAll, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { findClang, NO_CLANG } from "../compiler/clang.ts";
import { check } from "../compiler/compile.ts";

const ready = findClang() !== undefined;
if (!ready) console.log(NO_CLANG);
const withClang = test.skipIf(!ready);
const dir = mkdtempSync(join(tmpdir(), "caravan-msl-"));
afterAll(() => {
  rmSync(dir, { recursive: true });
});

const HEAD = "#include <metal_stdlib>\nusing namespace metal;\n";

/** A kernel with this body, behind these definitions. */
function kernel(body: string, before = ""): string {
  const parameters = [
    "device float* a [[buffer(0)]]",
    "device const float* b [[buffer(1)]]",
    "constant uint& n [[buffer(2)]]",
    "threadgroup float* s [[threadgroup(0)]]",
    "uint i [[thread_position_in_grid]]",
    "uint l [[thread_index_in_simdgroup]]",
  ];
  return `${HEAD}${before}kernel void k(${parameters.join(", ")}) {\n${body}\n}\n`;
}

function problems(source: string): string {
  const path = join(dir, "snippet.metal");
  writeFileSync(path, source);
  return check({ path }, dir).problems.join("\n");
}

const READ = (space: string) => `float f(${space} const float* p) { return p[0]; }\n`;

const REFUSED: [what: string, source: string, message: RegExp][] = [
  [
    "a device pointer for a threadgroup parameter",
    kernel("a[i] = f(b);", READ("threadgroup")),
    /no matching function/,
  ],
  [
    "a threadgroup pointer for a device parameter",
    kernel("a[i] = f(s);", READ("device")),
    /no matching function/,
  ],
  ["a device pointer for a thread parameter", kernel("a[i] = f(b);", READ("thread")), /no matching function/],
  [
    "a local array for a device parameter",
    kernel("float t[4]; t[0] = 1; a[i] = f(t);", READ("device")),
    /no matching function/,
  ],
  [
    "constant memory for a device reference",
    kernel("f(n, a);", "void f(device uint& p, device float* q) { q[0] = p; }\n"),
    /no matching function/,
  ],
  [
    "a pointer parameter without an address space",
    kernel("float t = b[i]; f(&t); a[i] = t;", "void f(float* p) { p[0] = 1; }\n"),
    /explicit address space/,
  ],
  [
    "a reference parameter without one",
    kernel("float t = b[i]; f(t); a[i] = t;", "void f(float& p) { p = 1; }\n"),
    /explicit address space/,
  ],
  [
    "a local pointer without one",
    kernel("float t[2] = {0, 0}; float* q = t; a[i] = q[0];"),
    /explicit address space/,
  ],
  [
    "a pointer cast without one",
    kernel("float t[2] = {0, 0}; a[i] = ((uint*)t)[0];"),
    /explicit address space/,
  ],
  [
    "a cast from device to threadgroup",
    kernel("threadgroup float* q = (threadgroup float*)a; a[i] = q[0];"),
    /address space/,
  ],
  [
    "a reinterpret_cast across spaces",
    kernel("threadgroup float* q = reinterpret_cast<threadgroup float*>(a); a[i] = q[0];"),
    /address space|not allowed|casts away/,
  ],
  ["a write through a const pointer", kernel("((device const float*)b)[i] = 1;"), /read-only|const/],
  ["a write to constant memory", kernel("n = 3;"), /read-only|const/],
  ["double", kernel("double d = b[i]; a[i] = d;"), /double/],
  [
    "recursion",
    kernel("a[i] = f(int(n));", "float f(int x) { return x <= 0 ? 1.0f : f(x - 1) * 2.0f; }\n"),
    /recursion/,
  ],
  [
    "recursion through two functions",
    kernel(
      "a[i] = f(int(n));",
      "float g(int);\nfloat f(int x) { return x <= 0 ? 1.0f : g(x - 1); }\nfloat g(int x) { return f(x - 1); }\n",
    ),
    /recursion/,
  ],
  ["virtual functions", kernel("a[i] = 0;", "struct S { virtual float f() { return 1; } };\n"), /virtual/],
  ["derived classes", kernel("a[i] = 0;", "struct A { float x; }; struct B : A { float y; };\n"), /derived/],
  ["lambdas", kernel("auto f = [&](float x) { return x + 1; }; a[i] = f(b[i]);"), /lambda/],
  ["goto", kernel("if (i) goto e; a[i] = 0; e: return;"), /goto/],
  ["new", kernel("thread float* p = new float[4]; a[i] = p[0];"), /new/],
  ["static locals", kernel("static int c = 0; a[i] = c++;"), /static local/],
  ["std::", kernel("a[i] = std::max(1, 2);"), /std/],
  [
    "simd_sum of bfloat",
    kernel("bfloat t = bfloat(b[i]); a[i] = float(simd_sum(t));"),
    /no matching function/,
  ],
  ["exp of bfloat", kernel("bfloat t = bfloat(b[i]); a[i] = float(exp(t));"), /no matching function/],
  ["max of float and int", kernel("a[i] = max(b[i], 0);"), /no matching function/],
  ["max of half and float", kernel("half h = half(b[i]); a[i] = max(h, 0.5f);"), /no matching function/],
  [
    "half4 as float4",
    kernel("half4 h = half4(half(b[i])); float4 f = h; a[i] = f.x;"),
    /cannot initialize|cannot convert/,
  ],
  [
    "a vector of three components for four",
    kernel("float4 f = float4(b[i], 1, 2); a[i] = f.x;"),
    /wrong number/,
  ],
  [
    "a C-style cast to a vector",
    kernel("float4 f = float4(b[i]); int4 q = (int4)f; a[i] = q.x;"),
    /C-style cast|reinterprets/,
  ],
  [
    "simd_shuffle of 64 bits",
    kernel("ulong t = i; a[i] = float(simd_shuffle(t, 3));"),
    /no matching function/,
  ],
  [
    "an atomic order other than relaxed",
    kernel("atomic_fetch_add_explicit((device atomic_uint*)a, 1u, memory_order_acq_rel);"),
    /undeclared/,
  ],
  [
    "a kernel parameter without an attribute",
    `${HEAD}kernel void k(device float* a [[buffer(0)]], uint i) { a[i] = 0; }\n`,
    /needs exactly one/,
  ],
  [
    "a buffer index that is used twice",
    `${HEAD}kernel void k(device float* a [[buffer(0)]], device float* b [[buffer(0)]], uint i [[thread_position_in_grid]]) { a[i] = b[i]; }\n`,
    /used twice/,
  ],
  [
    "buffer index 31",
    `${HEAD}kernel void k(device float* a [[buffer(31)]], uint i [[thread_position_in_grid]]) { a[i] = 0; }\n`,
    /0\.\.30/,
  ],
  [
    "positions of different sizes",
    `${HEAD}kernel void k(device float* a [[buffer(0)]], uint2 i [[thread_position_in_grid]], uint3 g [[threadgroup_position_in_grid]]) { a[i.x] = g.x; }\n`,
    /mix vector sizes/,
  ],
  [
    "an int position",
    `${HEAD}kernel void k(device float* a [[buffer(0)]], int i [[thread_position_in_grid]]) { a[i] = 0; }\n`,
    /must be uint/,
  ],
  [
    "a host_name of no kernel",
    `${HEAD}template <typename T> kernel void k(device T* a [[buffer(0)]], uint i [[thread_position_in_grid]]) { a[i] = 0; }\ntemplate [[host_name("x")]] [[kernel]] decltype(kk<float>) kk<float>;\n`,
    /no kernel kk/,
  ],
  ["an initializer of a threadgroup variable", kernel("threadgroup float t = 0; a[i] = t;"), /initializer/],
  [
    "a threadgroup array for a device parameter",
    kernel("threadgroup float t[4]; a[i] = f(t);", READ("device")),
    /no matching function/,
  ],
  [
    "max of half and 0.0, which is a float",
    `${HEAD}kernel void k(device half* a [[buffer(0)]], uint i [[thread_position_in_grid]]) { a[i] = max(a[i], 0.0); }\n`,
    /no matching function/,
  ],
  [
    "matrices of different types",
    `${HEAD}kernel void k(device half* a [[buffer(0)]]) { simdgroup_half8x8 x; simdgroup_float8x8 y, z(0); simdgroup_load(x, a, 8); simdgroup_load(y, a, 8); simdgroup_multiply_accumulate(z, x, y, z); }\n`,
    /no matching|operand types/,
  ],
  ["float as bfloat", kernel("bfloat t = b[i]; a[i] = float(t);"), /implicit conversion to bfloat/],
  ["if constexpr, which is C++17", kernel("if constexpr (sizeof(float) == 4) a[i] = 1;"), /C\+\+17/],
  ["an unknown name", kernel("a[i] = foo;"), /undeclared/],
];

const ACCEPTED: [what: string, source: string][] = [
  [
    "half literals, and 1.0 as a float",
    kernel("half h = 1.0h * half(b[i]); float f = max(b[i], 0.0); a[i] = f + float(h);"),
  ],
  ["overloads on the address space", kernel("a[i] = f(b) + f(s);", READ("device") + READ("threadgroup"))],
  [
    "structs, swizzles, select, as_type",
    kernel(
      "S q; q.v = float4(b[i]); q.v.xy = q.v.zw; float4 m = select(q.v, float4(0), q.v < float4(1)); a[i] = dot(m, q.v) + as_type<float>(as_type<uint>(b[i]));",
      "struct S { float4 v; };\n",
    ),
  ],
  ["thread references", kernel("float t = b[i]; f(t); a[i] = t;", "void f(thread float& p) { p += 1; }\n")],
  ["atomics", kernel("atomic_fetch_add_explicit((device atomic_uint*)a, 1u, memory_order_relaxed);")],
  [
    "pointers into threadgroup arrays",
    kernel(
      "threadgroup float t[32]; threadgroup float* q = t + l; *q = b[i]; threadgroup_barrier(mem_flags::mem_threadgroup); a[i] = t[31 - l];",
    ),
  ],
];

for (const [what, source, message] of REFUSED)
  withClang(`refuses ${what}`, () => {
    expect(problems(source)).toMatch(message);
  });
for (const [what, source] of ACCEPTED)
  withClang(`accepts ${what}`, () => {
    expect(problems(source)).toBe("");
  });
