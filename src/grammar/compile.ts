// From a specification to a grammar: what the grammar worker does for a request. Pure; bounded by limits.ts.

import { CaravanError } from "../errors.ts";
import type { WorkLimit } from "../work-limit.ts";
import { BuildBudget, combine, type Dfa, Nfa } from "./automaton.ts";
import { ANY_CHARACTER, addRawCharacters, characterSet, inverse } from "./characters.ts";
import { type Grammar, GrammarBuilder, type Part, writeSpace } from "./grammar.ts";
import { SchemaError, TooLarge } from "./limits.ts";
import { colon } from "./object-writer.ts";
import { SchemaGrammar } from "./schema-grammar.ts";
import type { GrammarSpec } from "./spec.ts";

/** Throws unsupported_parameter, its `param` the specification's and its message with the path in the schema. */
export function compileGrammar(spec: GrammarSpec, time?: WorkLimit): Grammar {
  const budget = new BuildBudget(time);
  const builder = new GrammarBuilder(budget);
  try {
    return builder.finish(rootOf(spec, builder, budget));
  } catch (thrown) {
    throw named(thrown, spec.type === "tool_calls" ? (spec.tools[0]?.param ?? "tools") : spec.param);
  }
}

function rootOf(spec: GrammarSpec, builder: GrammarBuilder, budget: BuildBudget): number {
  if (spec.type === "tool_calls") return toolCalls(spec, builder, budget);
  return new SchemaGrammar(
    builder,
    budget,
    spec.type === "json_object" ? { type: "object" } : spec.schema,
  ).root();
}

/** One to `most` calls, one behind the other. */
function toolCalls(
  { tools, most, orText, orForm }: Extract<GrammarSpec, { type: "tool_calls" }>,
  builder: GrammarBuilder,
  budget: BuildBudget,
): number {
  const rules = tools.map(({ parameters, param }) => {
    try {
      const schema = parameters ?? { type: "object", properties: {} };
      return new SchemaGrammar(builder, budget, schema).root({ type: "object" });
    } catch (thrown) {
      throw named(thrown, param);
    }
  });
  let last = builder.node(true);
  for (let call = 1; call < most; call++) {
    const before = builder.node(true);
    addCalls(["", "\n", "; "], before, last);
    last = before;
  }
  const start = builder.node();
  // A value of the form that begins as a call is one.
  addCalls([""], start, last, orForm !== undefined);
  if (orForm !== undefined) {
    try {
      builder.call(start, rootOf(orForm, builder, budget), builder.node(true));
    } catch (thrown) {
      throw named(thrown, orForm.param);
    }
  }
  if (orText === true) {
    const text = plainText(budget);
    const write = (nfa: Nfa, from: number): number => {
      const end = nfa.state();
      nfa.insert(from, text, [end]);
      return end;
    };
    builder.term(start, [{ key: "text", write, target: builder.node(true) }], "#");
  }
  return start;

  function addCalls(separators: readonly string[], from: number, end: number, decides = false): void {
    const close = builder.node();
    builder.term(close, [{ lead: "", text: "}", target: end }], "#");
    const parts = tools.map(({ name }, i): Part => {
      const before = builder.node();
      builder.call(before, rules[i] ?? before, close);
      return {
        key: `${separators.length} call ${name}`,
        write: (nfa, at) => writeCall(nfa, at, separators, name),
        target: before,
      };
    });
    builder.term(from, parts, "#", decides);
  }
}

/** Marks that begin a call anywhere in an answer, and characters that do at its start (see chat/tool-calls.ts). */
const CALL_MARKS = ["<function=", "<tool_call>"];
const CALL_STARTS = characterSet(
  ["{", "[", "<", " ", "\n", "\t", "\r"].map((c) => [c.charCodeAt(0), c.charCodeAt(0)]),
);

/** UTF-8 text that no parser of calls would take for one. */
function plainText(budget: BuildBudget): Dfa {
  const nfa = new Nfa(budget);
  const start = nfa.state();
  const end = nfa.state();
  addRawCharacters(nfa, start, end, inverse(CALL_STARTS));
  addRawCharacters(nfa, end, end, ANY_CHARACTER);
  const marked = new Nfa(budget);
  const anywhere = marked.state();
  const found = marked.state();
  addRawCharacters(marked, anywhere, anywhere, ANY_CHARACTER);
  addRawCharacters(marked, found, found, ANY_CHARACTER);
  for (const mark of CALL_MARKS) marked.epsilon(marked.text(anywhere, mark), found);
  const text = nfa.determinise(start, new Map([[end, 0]]));
  const calls = marked.determinise(anywhere, new Map([[found, 0]]));
  const plain =
    text === undefined || calls === undefined ? undefined : combine(text, calls, "not second", budget);
  if (plain === undefined) throw new TooLarge("no text is left");
  return plain;
}

/** `{"name": "…", "parameters": ` */
function writeCall(nfa: Nfa, from: number, separators: readonly string[], name: string): number {
  const begin = nfa.state();
  for (const separator of separators) nfa.epsilon(nfa.text(from, separator), begin);
  const named = nfa.text(
    colon(nfa, nfa.text(writeSpace(nfa, nfa.text(begin, "{")), '"name"')),
    JSON.stringify(name),
  );
  return colon(nfa, nfa.text(writeSpace(nfa, nfa.text(named, ",")), '"parameters"'));
}

function named(thrown: unknown, param: string): unknown {
  if (thrown instanceof SchemaError)
    return new CaravanError("unsupported_parameter", `${param}: ${thrown.message}`, {
      param,
      hint: thrown.hint ?? "docs/structured-output.md lists what is enforced.",
    });
  if (thrown instanceof TooLarge)
    return new CaravanError("unsupported_parameter", `${param}: the schema is too large: ${thrown.message}`, {
      param,
    });
  return thrown;
}
