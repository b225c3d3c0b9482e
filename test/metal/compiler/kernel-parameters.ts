// What a kernel's parameters are bound to, from their attributes: how its call is written, and which bindings a dispatch needs.

import { attributesOf, type Token } from "./tokens.ts";

/** Attributes with up to three components: field of msl_position. */
const POSITIONS: Record<string, string> = {
  thread_position_in_grid: "in_grid",
  thread_position_in_threadgroup: "in_threadgroup",
  threadgroup_position_in_grid: "threadgroup_in_grid",
  threads_per_threadgroup: "threads_per_threadgroup",
  threads_per_grid: "threads_per_grid",
  threadgroups_per_grid: "threadgroups_per_grid",
  dispatch_threads_per_threadgroup: "dispatch_threads_per_threadgroup",
};
/** Scalar attributes: expression over `p`. */
const INDICES: Record<string, string> = {
  thread_index_in_threadgroup: "p->thread_index",
  thread_index_in_simdgroup: "p->lane",
  simdgroup_index_in_threadgroup: "p->simdgroup",
  simdgroups_per_threadgroup: "p->n_simdgroups",
  threads_per_simdgroup: "32u",
};
const INDEX_TYPES = ["uint", "ushort", "uint2", "ushort2", "uint3", "ushort3"];

export interface KernelParameters {
  /** Arguments of the generated call. */
  call: string[];
  /** "b0 w1 t0": buffers read, buffers written, threadgroup lengths. */
  bindings: string;
  writtenMask: number;
}

interface Bound {
  call: string;
  /** What must not be bound twice. */
  key: string;
  binding?: string;
  /** Components of a position attribute. */
  size?: string;
}

/** Reports what is not Metal (or not allowed here) to `problem`. */
export function readParameters(
  kernel: string,
  parameters: readonly Token[][],
  problem: (at: Token, text: string) => void,
): KernelParameters {
  const call: string[] = [];
  const keys = new Set<string>();
  const bindings: string[] = [];
  const sizes = new Set<string>();
  let writtenMask = 0;
  for (const tokens of parameters) {
    const first = tokens[0];
    if (first === undefined || (tokens.length === 1 && first.text === "void")) continue;
    const bound = bind(tokens, (text) => problem(first, `kernel ${kernel}: ${text}`));
    if (bound === undefined) continue;
    if (keys.has(bound.key)) problem(first, `kernel ${kernel}: ${bound.key} used twice`);
    keys.add(bound.key);
    call.push(bound.call);
    if (bound.binding !== undefined) bindings.push(bound.binding);
    if (bound.binding?.startsWith("w")) writtenMask |= 1 << Number(bound.binding.slice(1));
    if (bound.size !== undefined) sizes.add(bound.size);
  }
  const at = parameters[0]?.[0];
  if (sizes.size > 1 && at)
    problem(at, `kernel ${kernel}: position attributes mix vector sizes ${[...sizes].sort()}`);
  return { call, bindings: bindings.join(" "), writtenMask: writtenMask >>> 0 };
}

function bind(tokens: readonly Token[], problem: (text: string) => void): Bound | undefined {
  const attributes = attributesOf(tokens).filter(
    ({ name }) => name === "buffer" || name === "threadgroup" || name in POSITIONS || name in INDICES,
  );
  const words = tokens.map((token) => token.text);
  const declaration = words.slice(0, words.includes("[") ? words.indexOf("[") : words.length);
  const attribute = attributes[0];
  if (attribute === undefined || attributes.length !== 1) {
    problem(
      `parameter '${declaration.join(" ")}' needs exactly one of [[buffer]], [[threadgroup]] or an index attribute`,
    );
    return undefined;
  }
  if (attribute.name === "buffer") return bindBuffer(declaration, attribute.argument, problem);
  if (attribute.name === "threadgroup") {
    if (!declaration.includes("threadgroup") || !declaration.includes("*"))
      problem(`[[threadgroup(${attribute.argument})]] needs a threadgroup pointer`);
    const key = `t${attribute.argument}`;
    return { call: `msl_arg_threadgroup{${attribute.argument}}`, key, binding: key };
  }
  return bindIndex(declaration, attribute.name, problem);
}

function bindBuffer(declaration: readonly string[], index: string, problem: (text: string) => void): Bound {
  const pointer = declaration.includes("*");
  if (!pointer && !declaration.includes("&"))
    problem(`[[buffer(${index})]] parameter must be a pointer or reference`);
  if (!declaration.includes("device") && !declaration.includes("constant"))
    problem(`[[buffer(${index})]] needs device or constant`);
  const valid = /^\d+$/.test(index) && Number(index) <= 30;
  if (!valid) problem(`buffer index ${index} not in 0..30`);
  const number = valid ? index : "0";
  const target = declaration.slice(0, declaration.indexOf(pointer ? "*" : "&"));
  const written = declaration.includes("device") && !target.includes("const");
  const kind = `${pointer ? "pointer" : "reference"}_${written ? "write" : "read"}`;
  return {
    call: `msl_arg_${kind}{${number}}`,
    key: `buffer ${number}`,
    binding: `${written ? "w" : "b"}${number}`,
  };
}

function bindIndex(declaration: readonly string[], name: string, problem: (text: string) => void): Bound {
  const type = declaration.find((word) => INDEX_TYPES.includes(word));
  const position = POSITIONS[name];
  if (type === undefined)
    problem(`[[${name}]] must be uint or ushort${position === undefined ? "" : " (2, 3)"}`);
  const components = /[23]$/.exec(type ?? "")?.[0] ?? "1";
  if (position === undefined) {
    if (components !== "1") problem(`[[${name}]] is a scalar`);
    return { call: `msl_arg_index1{${INDICES[name] ?? "0"}}`, key: name };
  }
  return { call: `msl_arg_index3{p->${position}}`, key: name, size: components };
}
