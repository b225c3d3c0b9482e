// Runs a chat template from a downloaded model with limits on steps, time and sizes. A template is a program by a
// stranger: it has no access to anything but its variables, and it must not hang the server or fill its memory.
import { Environment, Interpreter, parse, tokenize } from "@huggingface/jinja";
import { CaravanError } from "../errors.ts";
import { WorkLimit } from "../work-limit.ts";
import {
  elementsOf,
  GROWING,
  growthOf,
  isComposite,
  type TemplateValue,
  textLengthOf,
} from "./template-growth.ts";

type Program = ReturnType<typeof parse>;
type Value = ReturnType<Interpreter["evaluate"]>;

export interface SandboxLimits {
  /** Syntax nodes evaluated: a message costs some tens of them. */
  readonly maxSteps: number;
  /** Processor time. */
  readonly maxTimeMs: number;
  /** Length of any string, besides `inputLength` times a few. */
  readonly maxText: number;
  /** Elements of any list. */
  readonly maxItems: number;
}

export const DEFAULT_LIMITS: SandboxLimits = {
  maxSteps: 5_000_000,
  maxTimeMs: 5000,
  maxText: 1 << 22,
  maxItems: 1 << 20,
};

const MAX_SOURCE = 1 << 20;
const MONTHS = "January February March April May June July August September October November December".split(
  " ",
);
const DAYS = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split(" ");

/** A limit was passed. Not an error of the request: the model's template is at fault. */
class LimitError extends Error {}

/** It took too long. */
export class TimeLimitError extends LimitError {}

/** A template said no, by its raise_exception. */
class Refusal extends Error {}

/** Most spaces of one indentation. */
const MAX_INDENT = 256;
/** Filters that make as many spaces as they are told to, at once: their result cannot be looked at in time. */
const INDENTING = new Set<unknown>(["indent", "tojson"]);

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null;

/** The expressions that are the arguments of an indenting filter, when `node` applies one. */
function indentArguments(node: unknown): unknown[] {
  if (!isObject(node) || (node.type !== "FilterExpression" && node.type !== "FilterStatement")) return [];
  const { filter } = node;
  if (!isObject(filter) || !isObject(filter.callee) || !INDENTING.has(filter.callee.value)) return [];
  // A keyword's expression is its value; that of an unpacked list its argument.
  return Array.isArray(filter.args)
    ? filter.args.flatMap((each: unknown) => (isObject(each) ? [each, each.value, each.argument] : []))
    : [];
}

/** An operation that may multiply what goes in, and what of that has been evaluated. */
interface Pending {
  readonly operation: string;
  readonly operand: unknown;
  readonly args: readonly unknown[];
  /** Those of the arguments that are unpacked lists or mappings. */
  readonly unpacked: ReadonlySet<unknown>;
  readonly known: Map<unknown, TemplateValue>;
}

/** The operation that `node` is, if it is one that multiplies: `x|join(y)`, `x.replace(y, z)`, `list ~ text`. */
function growingOperation(node: unknown): Pending | undefined {
  if (!isObject(node)) return undefined;
  if (node.type === "FilterExpression" && isObject(node.filter)) {
    const { filter } = node;
    const name = isObject(filter.callee) ? filter.callee.value : filter.value;
    return pending(name, node.operand, filter.args);
  }
  if (node.type === "CallExpression" && isObject(node.callee) && node.callee.type === "MemberExpression") {
    const { object, property } = node.callee;
    return pending(isObject(property) ? property.value : undefined, object, node.args);
  }
  if (node.type === "BinaryExpression" && isObject(node.operator)) {
    const { value } = node.operator;
    if (value === "~" || value === "+")
      return { ...concatenation, args: [node.left, node.right], known: new Map() };
  }
  return undefined;
}

const concatenation = { operation: "concatenate", operand: undefined, unpacked: new Set() };

function pending(operation: unknown, operand: unknown, args: unknown): Pending | undefined {
  if (typeof operation !== "string" || !GROWING.has(operation)) return undefined;
  const given: unknown[] = Array.isArray(args) ? args : [];
  const unpacked = new Set<unknown>();
  const expressions = given.map((each) => {
    if (!isObject(each)) return each;
    if (each.type === "KeywordArgumentExpression") return each.value;
    if (each.type !== "SpreadExpression" && each.type !== "KeywordSpreadExpression") return each;
    unpacked.add(each.argument);
    return each.argument;
  });
  return { operation, operand, args: expressions, unpacked, known: new Map() };
}

/** The name of a filter that multiplies and is applied to a whole block, `{% filter replace(…) %}`: what the block gives
 * cannot be looked at before. No known model's template does that. */
function growingBlock(node: unknown, seen = new Set<unknown>()): string | undefined {
  if (!isObject(node) || seen.has(node)) return undefined;
  seen.add(node);
  if (node.type === "FilterStatement" && isObject(node.filter)) {
    const name = isObject(node.filter.callee) ? node.filter.callee.value : node.filter.value;
    if (typeof name === "string" && GROWING.has(name)) return name;
  }
  for (const child of Object.values(node).flat()) {
    const found = growingBlock(child, seen);
    if (found !== undefined) return found;
  }
  return undefined;
}

/** The expressions whose values the program prints: those that stand among statements. */
function printedExpressions(program: unknown): Set<unknown> {
  const printed = new Set<unknown>();
  const seen = new Set<unknown>();
  const visit = (node: unknown): void => {
    if (!isObject(node) || seen.has(node)) return;
    seen.add(node);
    for (const [name, child] of Object.entries(node)) {
      if (!Array.isArray(child)) {
        visit(child);
        continue;
      }
      const block = name === "body" || name === "alternate" || name === "defaultBlock";
      for (const each of child) {
        if (block) printed.add(each);
        visit(each);
      }
    }
  };
  visit(program);
  return printed;
}

/** The largest number in a value of the interpreter: itself, or an element. */
function largestNumber(value: unknown): number {
  if (typeof value === "number") return value;
  if (!Array.isArray(value)) return 0;
  return value.reduce<number>((most, each: unknown) => {
    const number = isObject(each) && typeof each.value === "number" ? each.value : 0;
    return Math.max(most, number);
  }, 0);
}

/** What a rendering turned out to do. */
export interface Observed {
  /** It took a text apart at positions of its characters. */
  cutsText: boolean;
}

/** The expression out of which `node` takes an element or a slice, if it does that. */
function cutExpression(node: unknown): unknown {
  if (!isObject(node) || node.type !== "MemberExpression") return undefined;
  const { computed, property, object } = node;
  if (isObject(property) && property.type === "IntegerLiteral") return object;
  // A name that stands there is that of a member.
  return computed === true && !(isObject(property) && property.type === "StringLiteral") ? object : undefined;
}

/** Taking a longer text apart takes time enough to look at the clock. */
const CHECKED_TEXT = 4096;
/** Lists that are made of texts have an object for each piece: fewer of them fit. */
const ELEMENTS_SHARE = 8;
/** All that filters and calls make together may be so many times the longest text. */
const MADE_TIMES = 16;

class LimitedInterpreter extends Interpreter {
  readonly #limits: SandboxLimits;
  readonly #time: WorkLimit;
  /** Expressions that say how far something is indented. */
  readonly #indents = new Set<unknown>();
  /** Operations that are being evaluated, innermost last. */
  readonly #pending: Pending[] = [];
  readonly #printed: ReadonlySet<unknown>;
  /** Expressions out of which an element or a slice is taken. */
  readonly #cut = new Set<unknown>();
  readonly #observed: Observed;
  #steps = 0;
  /** Characters that filters and calls have made. */
  #made = 0;

  constructor(
    environment: Environment,
    limits: SandboxLimits,
    printed: ReadonlySet<unknown>,
    observed: Observed,
  ) {
    super(environment);
    this.#observed = observed;
    this.#limits = limits;
    this.#printed = printed;
    this.#time = new WorkLimit(limits.maxTimeMs);
  }

  override evaluate(...args: Parameters<Interpreter["evaluate"]>): Value {
    const limits = this.#limits;
    if (++this.#steps > limits.maxSteps) throw new LimitError(`more than ${limits.maxSteps} steps`);
    if ((this.#steps & 0xff) === 0 && this.#time.passed) throw new TimeLimitError("it took too long");
    const [node] = args;
    for (const expression of indentArguments(node)) if (isObject(expression)) this.#indents.add(expression);
    const cut = cutExpression(node);
    if (cut !== undefined) this.#cut.add(cut);
    const operation = growingOperation(node);
    if (operation !== undefined) this.#pending.push(operation);
    const result = super.evaluate(...args);
    if (operation !== undefined) this.#pending.pop();
    this.#checkGrowth(node, result);
    const { value } = result;
    if (typeof value === "string" && this.#cut.has(node)) this.#countCut(value.length);
    if (this.#indents.has(node) && largestNumber(value) > MAX_INDENT) {
      throw new LimitError(`an indentation of ${largestNumber(value)} spaces`);
    }
    if (typeof value === "string" && value.length > limits.maxText) {
      throw new LimitError(`a text of ${value.length} characters`);
    }
    if (Array.isArray(value) && value.length > limits.maxItems) {
      throw new LimitError(`a list of ${value.length} elements`);
    }
    return result;
  }

  /** `node` has its value: refuses what is now about to be made of it, or what has been made in all. */
  #checkGrowth(node: unknown, result: TemplateValue): void {
    const { maxText, maxItems } = this.#limits;
    const operation = this.#pending.at(-1);
    if (operation !== undefined && (node === operation.operand || operation.args.includes(node))) {
      operation.known.set(node, result);
      const operand = operation.known.get(operation.operand);
      const known = operation.args.flatMap((arg) => {
        const value = operation.known.get(arg);
        if (value === undefined) return [];
        return operation.unpacked.has(arg) ? elementsOf(value) : [value];
      });
      if (operation.operation === "concatenate") {
        // A list and a text: the list becomes text.
        const lists = known.filter(isComposite);
        if (lists.length === 1) for (const list of lists) this.#checkText(textLengthOf(list, maxText));
      } else if (operand !== undefined) {
        const { characters, elements } = growthOf(operation.operation, operand, known, maxText);
        this.#checkText(characters);
        if (elements > maxItems / ELEMENTS_SHARE) throw new LimitError(`a list of ${elements} elements`);
      }
    }
    if (isComposite(result) && this.#printed.has(node)) this.#checkText(textLengthOf(result, maxText));
    if (typeof result.value !== "string" || !isObject(node)) return;
    if (node.type !== "FilterExpression" && node.type !== "CallExpression") return;
    this.#countMade(result.value.length);
  }

  /** A text of so many characters is taken apart: all of them are looked at, and what is cut out may be kept. */
  #countCut(characters: number): void {
    this.#observed.cutsText = true;
    this.#countMade(characters);
    if (characters > CHECKED_TEXT && this.#time.passed) throw new TimeLimitError("it took too long");
  }

  #countMade(characters: number): void {
    this.#made += characters;
    if (this.#made > MADE_TIMES * this.#limits.maxText)
      throw new LimitError(`${this.#made} characters in all`);
  }

  #checkText(characters: number): void {
    if (characters > this.#limits.maxText) throw new LimitError(`a text of ${characters} characters`);
  }
}

/** Python's range, bounded before anything is allocated. */
function boundedRange(maxItems: number): (start: number, stop?: number, step?: number) => number[] {
  return (first, second, step = 1) => {
    const [start, stop] = second === undefined ? [0, first] : [first, second];
    const count = Math.max(0, Math.ceil((stop - start) / step));
    if (!Number.isFinite(count)) throw new Error("range() arguments are not valid");
    if (count > maxItems) throw new LimitError(`range() of ${count} elements`);
    return Array.from({ length: count }, (_, i) => start + i * step);
  };
}

/** Python's strftime in the C locale, local time, for the codes that templates use. */
export function formatTime(format: string, date: Date): string {
  const two = (value: number): string => String(value).padStart(2, "0");
  return format.replace(/%([a-zA-Z%])/g, (whole, code: string) => {
    const month = MONTHS[date.getMonth()] ?? "";
    const day = DAYS[date.getDay()] ?? "";
    switch (code) {
      case "Y":
        return String(date.getFullYear());
      case "y":
        return two(date.getFullYear() % 100);
      case "m":
        return two(date.getMonth() + 1);
      case "d":
        return two(date.getDate());
      case "B":
        return month;
      case "b":
        return month.slice(0, 3);
      case "A":
        return day;
      case "a":
        return day.slice(0, 3);
      case "H":
        return two(date.getHours());
      case "M":
        return two(date.getMinutes());
      case "S":
        return two(date.getSeconds());
      case "%":
        return "%";
      default:
        return whole;
    }
  });
}

export class SandboxedTemplate {
  readonly #program: Program;
  readonly #printed: ReadonlySet<unknown>;
  readonly #where: string;

  /** Error: bad_file when the template cannot be parsed. */
  constructor(source: string, where: string) {
    this.#where = where;
    if (source.length > MAX_SOURCE) {
      throw new CaravanError("bad_file", `the chat template has ${source.length} characters`, { where });
    }
    try {
      this.#program = parse(tokenize(source, { lstrip_blocks: true, trim_blocks: true }));
    } catch (cause) {
      throw new CaravanError("bad_file", `the chat template cannot be parsed: ${messageOf(cause)}`, {
        where,
        cause,
      });
    }
    this.#printed = printedExpressions(this.#program);
    const block = growingBlock(this.#program);
    if (block !== undefined) {
      throw new CaravanError(
        "bad_file",
        `the chat template applies ${block} to a block, which is not supported`,
        {
          where,
        },
      );
    }
  }

  /** Its syntax, to be looked at. */
  get program(): unknown {
    return this.#program;
  }

  /**
   * @param variables JSON values by name. Names that the sandbox defines (range, raise_exception …) are refused.
   * @param inputLength characters that the variables hold: a text may be a few times that, and `maxText` more.
   * @param observed is told what the template does.
   * Errors: invalid_argument when the template refuses these messages, bad_file when it fails or passes a limit.
   */
  render(
    variables: Record<string, unknown>,
    inputLength: number,
    limits: SandboxLimits = DEFAULT_LIMITS,
    observed: Observed = { cutsText: false },
  ): string {
    const environment = new Environment();
    const globals: Record<string, unknown> = {
      true: true,
      false: false,
      none: null,
      True: true,
      False: false,
      None: null,
      range: boundedRange(limits.maxItems),
      raise_exception: (message: unknown) => {
        throw new Refusal(String(message));
      },
      strftime_now: (format: unknown) => formatTime(String(format), new Date()),
    };
    for (const [name, value] of Object.entries(globals)) environment.set(name, value);
    for (const [name, value] of Object.entries(variables)) {
      if (Object.hasOwn(globals, name)) {
        throw new CaravanError("invalid_argument", `a template variable may not be called ${name}`, {
          param: name,
        });
      }
      environment.set(name, value);
    }
    const bounded = { ...limits, maxText: limits.maxText + 4 * inputLength };
    try {
      const { value } = new LimitedInterpreter(environment, bounded, this.#printed, observed).run(
        this.#program,
      );
      if (typeof value === "string") return value;
      throw new Error("it gave no text");
    } catch (cause) {
      if (cause instanceof CaravanError) throw cause;
      if (cause instanceof Refusal) {
        throw new CaravanError("invalid_argument", `the model's chat template refused: ${cause.message}`, {
          param: "messages",
          cause,
        });
      }
      throw new CaravanError("bad_file", `the chat template failed: ${messageOf(cause)}`, {
        where: this.#where,
        hint: "The template of this model does not accept these messages, or it is broken.",
        cause,
      });
    }
  }
}

function messageOf(cause: unknown): string {
  return cause instanceof Error ? cause.message : String(cause);
}
