// Turns preprocessed Metal source into C++ that clang compiles with the shim, and refuses tokens that are not Metal.
//
//   function constants     a static variable and its registration
//   threadgroup variables  static, in the section that the executor fills with poison for each threadgroup
//   host_name              the kernel's instantiation, registered under that name
//   kernels                a call for each, with arguments that the executor binds
// Lines stay where they are, so that reports name lines of the kernel file.

import { readParameters } from "./kernel-parameters.ts";
import { attributesOf, splitAtCommas, type Token, TokenList, tokenize } from "./tokens.ts";

export interface Rewritten {
  source: string;
  /** Names under which kernels can be found. */
  kernels: string[];
  problems: string[];
}

const BANNED: Record<string, string> = {
  double: "no double in Metal",
  goto: "goto",
  virtual: "virtual functions",
  dynamic_cast: "dynamic_cast",
  typeid: "typeid",
  new: "operator new",
  delete: "operator delete",
  throw: "exceptions",
  try: "exceptions",
  catch: "exceptions",
  noexcept: "noexcept",
  thread_local: "thread_local",
  asm: "inline assembly",
  std: "the C++ standard library",
  printf: "printf",
  co_await: "coroutines",
};
const VECTORS = new Set(
  [
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "half",
    "float",
    "bfloat",
  ].flatMap((type) => [`${type}2`, `${type}3`, `${type}4`]),
);
const STATEMENT_START = new Set([";", "{", "}", ")", ":"]);

interface Kernel {
  name: string;
  template: boolean;
  call: string[];
  bindings: string;
  writtenMask: number;
}

/** A template kernel under a name: function is the instantiation, such as `f<float>`. */
interface Instance {
  hostName: string;
  base: string;
  function: string;
  at: Token;
}

class Rewriter {
  readonly #list: TokenList;
  readonly #edits: { start: number; end: number; text: string }[] = [];
  readonly #tail: string[] = [];
  readonly #kernels = new Map<string, Kernel>();
  readonly #instances: Instance[] = [];
  readonly #names: string[] = [];
  readonly problems: string[] = [];
  readonly #source: string;

  constructor(source: string) {
    this.#source = source;
    this.#list = new TokenList(tokenize(source));
  }

  run(): Rewritten {
    for (let i = 0; i < this.#list.length; i++) {
      this.#refuse(i);
      this.#functionConstant(i);
      this.#threadgroupVariable(i);
      this.#threadgroupAttribute(i);
      this.#vecConstruction(i);
      this.#instance(i);
      this.#kernel(i);
    }
    const body = this.#apply();
    const calls = this.#calls();
    const source = `${body}\n# 1 "<calls>"\n${[...this.#tail, ...calls].join("\n")}\n`;
    return { source, kernels: this.#names.sort(), problems: this.problems };
  }

  #problem(at: Token, text: string): void {
    this.problems.push(`${at.file}:${at.line}: error: ${text}`);
  }

  #replace(start: number, end: number, text: string): void {
    this.#edits.push({ start, end, text });
  }

  #startsAttribute(i: number, name: string): boolean {
    const list = this.#list;
    return list.text(i) === "[" && list.text(i + 1) === "[" && list.text(i + 2) === name;
  }

  #refuse(i: number): void {
    const list = this.#list;
    const text = list.text(i);
    const banned = Object.hasOwn(BANNED, text) ? BANNED[text] : undefined;
    if (banned !== undefined && !(text === "delete" && list.text(i - 1) === "="))
      this.#problem(list.at(i), `not Metal: ${banned}`);
    if (text === "long" && list.text(i + 1) === "long") this.#problem(list.at(i), "not Metal: long long");
    const cast = text === "(" && VECTORS.has(list.text(i + 1)) && list.text(i + 2) === ")";
    if (
      cast &&
      !["decltype", "sizeof", "alignof"].includes(list.text(i - 1)) &&
      ![";", "{", ",", ")", "const"].includes(list.text(i + 3))
    )
      this.#problem(
        list.at(i),
        `C-style cast to ${list.text(i + 1)}: use ${list.text(i + 1)}(...) (the shim would reinterpret bits)`,
      );
  }

  // constant T name [[function_constant(n)]];
  #functionConstant(i: number): void {
    const list = this.#list;
    if (!this.#startsAttribute(i, "function_constant")) return;
    const end = list.closing(i);
    if (list.text(end + 1) !== ";") return;
    let first = i;
    while (first > 0 && ![";", "}", "{"].includes(list.text(first - 1))) first--;
    const index = list.text(i + 4);
    const name = list.text(i - 1);
    const type = list
      .slice(first, i - 1)
      .map((token) => token.text)
      .filter((word) => word !== "constant" && word !== "const")
      .join(" ");
    this.#replace(list.at(first).start, list.at(end).end, `static ${type} ${name}`);
    this.#tail.push(
      `static msl_constant_entry msl_constant_${index}_${name}(${index}, "${name}", (void*)&${name}, sizeof(${name}));`,
    );
  }

  #threadgroupVariable(i: number): void {
    const list = this.#list;
    if (list.text(i) !== "threadgroup" || !(i === 0 || STATEMENT_START.has(list.text(i - 1)))) return;
    let at = i;
    while (at < list.length && ![";", "=", "{", "[", ","].includes(list.text(at))) {
      if (list.text(at) === "<") at = list.closingAngle(at);
      else if (["*", "&", "("].includes(list.text(at))) return; // a pointer, or a function
      at++;
    }
    if (list.text(at) === "=") this.#problem(list.at(i), "threadgroup variable with an initializer");
    else this.#replace(list.at(i).start, list.at(i).start, 'static __attribute__((section("msl_tg"))) ');
  }

  // [[threadgroup(n)]] names an address space, which is a macro of the shim: the attribute must go.
  #threadgroupAttribute(i: number): void {
    const list = this.#list;
    if (this.#startsAttribute(i, "threadgroup"))
      this.#replace(list.at(i).start, list.at(list.closing(i)).end, "");
  }

  // vec<T, N>(...)
  #vecConstruction(i: number): void {
    const list = this.#list;
    if (list.text(i) !== "vec" || list.text(i + 1) !== "<") return;
    const end = list.closingAngle(i + 1);
    if (list.text(end + 1) !== "(" || list.text(i - 1) === "operator") return;
    this.#replace(list.at(i).start, list.at(i).end, "msl_construct<vec");
    this.#replace(list.at(end).end, list.at(end).end, ">");
  }

  // template [[host_name("n")]] [[kernel]] decltype(f<T>) f<T>;
  #instance(i: number): void {
    const list = this.#list;
    if (list.text(i) !== "template" || list.text(i + 1) !== "[") return;
    const end = list.closing(i + 1);
    const host = attributesOf(list.slice(i + 1, end + 1)).find(({ name }) => name === "host_name");
    if (host === undefined) return;
    let last = end;
    while (last < list.length && list.text(last) !== ";") last++;
    const body = list.slice(end + 1, last);
    const type = body.findIndex((token) => token.text === "decltype");
    if (type < 0) {
      this.#problem(list.at(i), `host_name ${host.argument}: write it as [[kernel]] decltype(f<T>) f<T>`);
      return;
    }
    const close = new TokenList(body).closing(type + 1);
    const words = body.slice(type + 2, close).map((token) => token.text);
    this.#instances.push({
      hostName: host.argument.replaceAll('"', ""),
      base: words[0] ?? "",
      function: words.join(" "),
      at: list.at(i),
    });
    this.#replace(list.at(i).start, list.at(last).end, "");
  }

  #kernel(i: number): void {
    const list = this.#list;
    if (list.text(i) !== "kernel" || list.text(i - 1) === "[" || list.text(i - 1) === ",") return;
    const at = list.at(i);
    if (list.text(i + 1) !== "void") this.#problem(at, "kernel must return void");
    let open = i + 1;
    while (open < list.length && list.text(open) !== "(") open++;
    const name = list.text(open - 1);
    const close = list.closing(open);
    if (list.text(close + 1) !== "{") return;
    const parameters = readParameters(name, splitAtCommas(list.slice(open + 1, close)), (token, text) =>
      this.#problem(token, text),
    );
    this.#kernels.set(name, { name, template: [">", ">>"].includes(list.text(i - 1)), ...parameters });
  }

  #apply(): string {
    let text = this.#source;
    for (const edit of this.#edits.sort((a, b) => b.start - a.start || b.end - a.end)) {
      const lines = text.slice(edit.start, edit.end).split("\n").length - 1;
      text = text.slice(0, edit.start) + edit.text + "\n".repeat(lines) + text.slice(edit.end);
    }
    return text;
  }

  #calls(): string[] {
    const lines: string[] = [];
    const entry = (hostName: string, kernel: Kernel, fn: string) => {
      if (this.#names.includes(hostName)) this.problems.push(`error: duplicate kernel name ${hostName}`);
      const index = this.#names.push(hostName);
      lines.push(
        `static void msl_call_${index}(const msl_position* p) { (void)p; ${fn}(${kernel.call.join(", ")}); }`,
      );
      lines.push(
        `static msl_kernel_entry msl_kernel_${index}("${hostName}", "${kernel.bindings}", msl_call_${index}, ${kernel.writtenMask}u);`,
      );
    };
    for (const kernel of this.#kernels.values())
      if (!kernel.template) entry(kernel.name, kernel, kernel.name);
    for (const instance of this.#instances) {
      const kernel = this.#kernels.get(instance.base);
      if (kernel === undefined)
        this.#problem(instance.at, `host_name ${instance.hostName}: no kernel ${instance.base}`);
      else entry(instance.hostName, kernel, instance.function);
    }
    return lines;
  }
}

/** `source` is preprocessed. */
export function rewrite(source: string): Rewritten {
  return new Rewriter(source).run();
}
