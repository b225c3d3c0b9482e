// Checks and compiles Metal kernel files on Linux: clang (Zig's) with the shim, and the executor linked in.

import { existsSync, mkdirSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { findClang } from "./clang.ts";
import { type AstNode, lint } from "./lint.ts";
import { rewrite } from "./rewrite.ts";
import { SourceError } from "./tokens.ts";

const ROOT = join(import.meta.dir, "..");
const SHIM = join(ROOT, "shim");
const EXECUTOR = join(ROOT, "executor");
/** Compiled executor, shared by all kernel libraries. */
const BUILD = join(ROOT, "../../build/metal");

/** What Metal's compiler gives a threadgroup. */
const THREADGROUP_BYTES = 32 * 1024;

const LANGUAGE = [
  "-x",
  "c++",
  "-std=c++14",
  "-nostdinc",
  "-fno-exceptions",
  "-fno-rtti",
  "-fno-threadsafe-statics",
  "-Xclang",
  "-cl-single-precision-constant",
];
const INCLUDE_SHIM = [`-I${SHIM}`, "-include", join(SHIM, "metal_shim.h")];
const WARNINGS = [
  "-Wall",
  "-Wextra",
  ..."unused unused-parameter unknown-attributes ignored-attributes user-defined-literals duplicate-decl-specifier sign-compare missing-field-initializers unknown-pragmas vla-cxx-extension pass-failed"
    .split(" ")
    .map((name) => `-Wno-${name}`),
  ..."c++17-extensions c++20-extensions uninitialized sometimes-uninitialized return-type vla array-bounds shift-count-overflow division-by-zero null-dereference"
    .split(" ")
    .map((name) => `-Werror=${name}`),
];
const CHECKS = [
  "-fsanitize=thread",
  "-fsanitize=shift,integer-divide-by-zero,array-bounds,float-cast-overflow,return,signed-integer-overflow,alignment",
  "-Xclang",
  "-fsanitize-minimal-runtime",
];

/** A file, and a file that is read before it (kernels' prelude). */
export interface KernelSource {
  path: string;
  prelude?: string;
  defines?: readonly string[];
}

export interface Checked {
  problems: string[];
  kernels: string[];
}

/** The clang driver, as words. Throws where there is none. */
function clang(): string[] {
  const found = findClang();
  if (found === undefined) throw new Error("MSL_CLANG must name clang: `…/ziglang/zig clang`");
  return found;
}

function run(command: readonly string[]): { code: number; out: string; err: string } {
  const child = Bun.spawnSync([...command], { stdout: "pipe", stderr: "pipe" });
  return { code: child.exitCode ?? -1, out: child.stdout.toString(), err: child.stderr.toString() };
}

function preprocessed(source: KernelSource): { text?: string; problems: string[] } {
  const prelude = source.prelude === undefined ? [] : ["-include", source.prelude];
  const defines = (source.defines ?? []).map((define) => `-D${define}`);
  const metal = ["-D__METAL__=1", "-D__METAL_VERSION__=320", "-D__HAVE_BFLOAT__=1"];
  const { code, out, err } = run([
    ...clang(),
    ...LANGUAGE,
    "-E",
    `-I${SHIM}/include`,
    ...metal,
    ...defines,
    ...prelude,
    source.path,
  ]);
  return code === 0 ? { text: out, problems: [] } : { problems: [err] };
}

/** Type check with the shim, with clang's warnings and the project's rules. */
export function check(source: KernelSource, scratch: string): Checked {
  const { text, problems } = preprocessed(source);
  if (text === undefined) return { problems, kernels: [] };
  try {
    const rewritten = rewrite(text);
    mkdirSync(scratch, { recursive: true });
    const file = join(scratch, `${basename(source.path)}.${process.pid}.check.cpp`);
    writeFileSync(file, rewritten.source);
    const checked = run([
      ...clang(),
      ...LANGUAGE,
      ...WARNINGS,
      "-fsyntax-only",
      "-ferror-limit=40",
      ...INCLUDE_SHIM,
      file,
      "-Xclang",
      "-ast-dump=json",
    ]);
    rmSync(file, { force: true });
    const lines = checked.err.split("\n").filter((line) => /: (error|fatal error|warning):/.test(line));
    const found = [...rewritten.problems, ...lines];
    if (checked.code !== 0 && lines.length === 0) found.push(checked.err.slice(-2000));
    if (checked.out !== "") found.push(...lint(JSON.parse(checked.out) as AstNode, file, rewritten.source));
    return { problems: found, kernels: rewritten.kernels };
  } catch (thrown) {
    if (thrown instanceof SourceError) return { problems: [thrown.message], kernels: [] };
    throw thrown;
  }
}

/** Bytes of static threadgroup memory by function, from the object's symbols. */
function threadgroupBytes(object: string): Map<string, number> {
  const bytes = new Map<string, number>();
  const { out } = run(["nm", "-S", "-C", "--defined-only", object]);
  for (const line of out.split("\n")) {
    const found = /^[0-9a-f]+ ([0-9a-f]+) [bBdDuVvW] (.*)::(\w+)$/.exec(line);
    if (!found?.[1] || !found[2]?.includes("(")) continue;
    bytes.set(found[2], (bytes.get(found[2]) ?? 0) + Number.parseInt(found[1], 16));
  }
  return bytes;
}

function newerThan(path: string, sources: readonly string[]): boolean {
  if (!existsSync(path)) return false;
  const built = statSync(path).mtimeMs;
  return sources.every((source) => statSync(source).mtimeMs <= built);
}

/** Compiles executor and checks; returns the objects. Safe against a second process doing the same. */
function executorObjects(): { objects?: string[]; problems: string[] } {
  mkdirSync(BUILD, { recursive: true });
  const headers = ["executor.h", "state.h", "fiber.h"].map((name) => join(EXECUTOR, name));
  const objects: string[] = [];
  for (const name of ["executor", "checks", "lines"]) {
    const source = join(EXECUTOR, `${name}.cpp`);
    const object = join(BUILD, `${name}.o`);
    objects.push(object);
    if (newerThan(object, [source, ...headers])) continue;
    const temporary = `${object}.${process.pid}`;
    const compiler = clang().map((word) => (word === "clang" ? "c++" : word));
    const flags = [
      "-O2",
      "-fPIC",
      "-std=c++17",
      "-fno-exceptions",
      "-fno-rtti",
      "-fno-sanitize=all",
      "-fno-stack-protector",
    ];
    const { code, err } = run([...compiler, ...flags, "-c", source, "-o", temporary]);
    if (code !== 0) return { problems: [err] };
    renameSync(temporary, object);
  }
  return { objects, problems: [] };
}

export interface BuildOptions {
  /** Race, bounds, uninitialised and arithmetic checks. */
  checked?: boolean;
  /** What fast math may do to the kernels' arithmetic. */
  fastMath?: boolean;
}

/** Compiles to a library that executor.h describes. Returns problems; empty when `out` has been written. */
export function build(source: KernelSource, out: string, options: BuildOptions = {}): string[] {
  const { text, problems } = preprocessed(source);
  if (text === undefined) return problems;
  const rewritten = rewrite(text);
  mkdirSync(dirname(out), { recursive: true });
  const base = `${out}.${process.pid}`;
  const file = `${base}.cpp`;
  const object = `${base}.o`;
  writeFileSync(file, rewritten.source);
  try {
    const executor = executorObjects();
    if (executor.objects === undefined) return executor.problems;
    const machine =
      process.arch === "arm64"
        ? ["--target=aarch64-linux-gnu"]
        : [
            "--target=x86_64-linux-gnu",
            "-march=x86-64-v3",
            "-Xclang",
            "-ffloat16-excess-precision=none",
            "-Xclang",
            "-fbfloat16-excess-precision=none",
          ];
    const flags = [
      "-fPIC",
      "-O2",
      "-g1",
      "-fvisibility=hidden",
      "-ffp-contract=on",
      "-w",
      ...(options.checked ? CHECKS : []),
      ...(options.fastMath ? ["-ffast-math"] : []),
    ];
    const compiled = run([
      ...clang(),
      ...machine,
      ...LANGUAGE,
      ...flags,
      ...INCLUDE_SHIM,
      "-c",
      file,
      "-o",
      object,
    ]);
    if (compiled.code !== 0) return [compiled.err];
    const large = [...threadgroupBytes(object)].filter(([, bytes]) => bytes > THREADGROUP_BYTES);
    if (large.length > 0)
      return large.map(
        ([name, bytes]) => `error: ${name}: ${bytes} bytes of threadgroup memory, limit ${THREADGROUP_BYTES}`,
      );
    const linked = run(["gcc", "-shared", "-o", `${base}.so`, object, ...executor.objects, "-lm"]);
    if (linked.code !== 0) return [linked.err];
    renameSync(`${base}.so`, out);
    return [];
  } finally {
    for (const path of [file, object]) rmSync(path, { force: true });
  }
}
