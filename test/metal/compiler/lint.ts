// Rules of Metal that clang does not know, checked on its syntax tree: every pointer names an address space, no cast changes
// one, no recursion, lambdas, inheritance, static locals or double, and conversions to bfloat are written out.

/** A place in clang's JSON dump: "file" is printed only when it changes. */
interface Location {
  offset?: number;
  tokLen?: number;
  file?: string;
  spellingLoc?: Location;
  expansionLoc?: Location;
}

export interface AstNode {
  id: string;
  kind?: string;
  name?: string;
  loc?: Location;
  range?: { begin?: Location; end?: Location };
  type?: { qualType?: string; desugaredQualType?: string };
  castKind?: string;
  isPartOfExplicitCast?: boolean;
  isImplicit?: boolean;
  storageClass?: string;
  previousDecl?: string;
  bases?: unknown[];
  referencedDecl?: { id: string; kind?: string };
  referencedMemberDecl?: string;
  inner?: AstNode[];
}

const SPACES = /\b(device|threadgroup|constant|thread)\b/;
const FUNCTIONS = new Set(["FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl"]);
const CASTS = new Set([
  "CStyleCastExpr",
  "CXXReinterpretCastExpr",
  "CXXStaticCastExpr",
  "CXXFunctionalCastExpr",
]);
const REFUSED = new Set(["CXXThrowExpr", "CXXTryStmt", "GotoStmt", "CXXNewExpr", "CXXDeleteExpr"]);

/** `file` is the rewritten file that was compiled, `source` its text. Returns the problems found in it. */
export function lint(tree: AstNode, file: string, source: string): string[] {
  const linter = new Linter(file, source);
  linter.visit(tree, undefined);
  return [...linter.problems, ...linter.recursion()];
}

class Linter {
  readonly problems = new Set<string>();
  readonly #file: string;
  readonly #source: string;
  readonly #places: { offset: number; file: string; line: number }[] = [];
  readonly #calls = new Map<string, Set<string>>();
  readonly #names = new Map<string, string>();
  readonly #firstDeclaration = new Map<string, string>();
  #currentFile = "";

  constructor(file: string, source: string) {
    this.#file = file;
    this.#source = source;
    let name = "?";
    let line = 0;
    let offset = 0;
    for (const text of source.split("\n")) {
      const marker = /^# (\d+) "(.*?)"/.exec(text);
      if (marker) {
        name = marker[2] ?? "?";
        line = Number(marker[1]) - 1;
      }
      this.#places.push({ offset, file: name, line });
      line++;
      offset += text.length + 1;
    }
  }

  visit(node: AstNode, inFunction: string | undefined): void {
    if (node.kind === undefined) return;
    this.#resolve(node.loc);
    const begin = this.#resolve(node.range?.begin);
    const end = this.#resolve(node.range?.end);
    let fn = inFunction;
    if (FUNCTIONS.has(node.kind)) {
      fn = this.#canonical(node.previousDecl ?? node.id);
      this.#firstDeclaration.set(node.id, fn);
      this.#names.set(fn, node.name ?? "?");
      if (!this.#calls.has(fn)) this.#calls.set(fn, new Set());
    }
    if (
      begin.file === this.#file &&
      end.file === this.#file &&
      begin.offset !== undefined &&
      end.offset !== undefined &&
      !node.isImplicit
    )
      this.#check(node, fn, begin.offset, end.offset + (end.tokLen ?? 0));
    if (fn !== undefined) {
      const target =
        node.referencedMemberDecl ??
        (FUNCTIONS.has(node.referencedDecl?.kind ?? "") ? node.referencedDecl?.id : undefined);
      if (target !== undefined) this.#calls.get(fn)?.add(target);
    }
    for (const child of node.inner ?? []) this.visit(child, fn);
  }

  /** Functions that reach themselves: Metal has no recursion. */
  recursion(): string[] {
    const found: string[] = [];
    const state = new Map<string, "open" | "done">();
    const walk = (from: string) => {
      state.set(from, "open");
      for (const target of this.#calls.get(from) ?? []) {
        const to = this.#canonical(target);
        if (state.get(to) === "open") found.push(`error: recursion through ${this.#names.get(to) ?? "?"}`);
        else if (!state.has(to) && this.#calls.has(to)) walk(to);
      }
      state.set(from, "done");
    };
    for (const fn of this.#calls.keys()) if (!state.has(fn)) walk(fn);
    return found;
  }

  #canonical(id: string): string {
    return this.#firstDeclaration.get(id) ?? id;
  }

  #resolve(location: Location | undefined): {
    file: string;
    offset: number | undefined;
    tokLen: number | undefined;
  } {
    if (location?.spellingLoc || location?.expansionLoc) {
      this.#resolve(location.spellingLoc);
      return this.#resolve(location.expansionLoc);
    }
    if (location?.file !== undefined) this.#currentFile = location.file;
    return { file: this.#currentFile, offset: location?.offset, tokLen: location?.tokLen };
  }

  #problem(offset: number, text: string): void {
    let low = 0;
    let high = this.#places.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if ((this.#places[middle]?.offset ?? 0) <= offset) low = middle;
      else high = middle;
    }
    const place = this.#places[low];
    if (place?.file !== "<calls>") this.problems.add(`${place?.file}:${place?.line}: error: ${text}`);
  }

  #check(node: AstNode, fn: string | undefined, start: number, end: number): void {
    const type = node.type?.qualType ?? "";
    const desugared = node.type?.desugaredQualType ?? type;
    const kind = node.kind ?? "";
    this.#checkPointers(node, kind, type, start, end);
    if (CASTS.has(kind)) {
      if (node.castKind === "AddressSpaceConversion")
        this.#problem(start, `cast changes the address space to '${type}'`);
      if (node.castKind === "BitCast" && desugared.includes("ext_vector_type"))
        this.#problem(
          start,
          `cast to vector type '${type}' reinterprets bits in the shim but converts in Metal; use the constructor or as_type`,
        );
    }
    if (
      kind === "ImplicitCastExpr" &&
      node.castKind === "FloatingCast" &&
      !node.isPartOfExplicitCast &&
      desugared === "__bf16"
    )
      this.#problem(start, "implicit conversion to bfloat: write bfloat(x)");
    if (kind === "LambdaExpr") this.#problem(start, "lambda expression");
    if (kind === "CXXRecordDecl" && node.bases) this.#problem(start, `derived class ${node.name}`);
    if (kind === "VarDecl" && node.storageClass === "static" && fn !== undefined && !type.includes("__local"))
      this.#problem(start, `static local variable ${node.name}`);
    if ((type === "double" || type === "long double") && kind !== "FloatingLiteral")
      this.#problem(start, "expression of type double");
    if (REFUSED.has(kind)) this.#problem(start, kind);
  }

  #checkPointers(node: AstNode, kind: string, type: string, start: number, end: number): void {
    const refuse = (head: string, what: string) => {
      if (/[*&]/.test(head) && !SPACES.test(head))
        this.#problem(start, `pointer type must have explicit address space qualifier: ${what}`);
    };
    if (kind === "CStyleCastExpr") {
      const text = this.#source.slice(start, end);
      const head = text.startsWith("(") ? text.slice(1, text.indexOf(")")) : "";
      refuse(head, `cast to '(${head})'`);
      return;
    }
    // The declaration begins after the last separator: a range may begin behind the qualifier.
    let from = start;
    while (from > 0 && !"(,;{}<>\n".includes(this.#source.charAt(from - 1))) from--;
    const text = this.#source.slice(from, end);
    if (["ParmVarDecl", "VarDecl", "FieldDecl"].includes(kind) && /[*&]/.test(type)) {
      const head = text.split("=")[0] ?? "";
      if (!/\bauto\b/.test(head)) refuse(head, `'${head.trim().slice(0, 60)}'`);
    }
    if (
      (kind === "FunctionDecl" || kind === "CXXMethodDecl") &&
      node.name &&
      /[*&]/.test(type.split("(")[0] ?? "")
    ) {
      const head = text.split(node.name)[0] ?? "";
      refuse(head, `'${head.trim().slice(0, 60)} ${node.name}'`);
    }
  }
}
