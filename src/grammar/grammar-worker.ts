// Entry of the grammar worker: the thread that compiles grammars, and that reads the vocabulary which masks are made of.
// It may be killed at any time: the one who uses it (grammar-service.ts) holds everything that lasts.
//
// Like the text worker's, this file is an entry point of its own in the executable (text-service.ts says how it is found).

import { makeTable } from "../chat/tokenizer.ts";
import { readTokenizerFiles } from "../chat/tokenizer-files.ts";
import { asCaravanError } from "../errors.ts";
import { WorkLimit } from "../work-limit.ts";
import { compileGrammar } from "./compile.ts";
import { EDGE_CALL, EDGE_SIZE, type Grammar } from "./grammar.ts";
import type { FromGrammarWorker, ToGrammarWorker, Vocabulary, WarmState } from "./grammar-protocol.ts";
import { Automata, type InsideTokens, stringStates } from "./inside-tokens.ts";
import { buildTokenTrie } from "./token-trie.ts";

declare const self: Worker;

/** Time spent on a grammar's states before it is handed out, behind that ahead of their use, and between two looks at the
 * messages. */
const WARM_FIRST_MS = 20;
const WARM_MS = 150;
const WARM_SLICE_MS = 20;

let vocabulary: Vocabulary | undefined;

function send(message: FromGrammarWorker): void {
  self.postMessage(message);
}

async function load(dir: string, size: number): Promise<void> {
  const table = makeTable(await readTokenizerFiles(dir));
  const trie = buildTokenTrie(table, size);
  vocabulary = { table, trie, stringStates: stringStates() };
  // Strings are in almost every grammar, and their states the most work.
  const any = compileGrammar({ type: "json_object", param: "" });
  const strings = new Map<number, InsideTokens>();
  const automata = new Automata(any, trie, strings, vocabulary.stringStates);
  for (let state = 0; state < vocabulary.stringStates; state++) automata.inside(state);
  send({ kind: "vocabulary", vocabulary, strings });
  // The parsed tokenizer.json (100 MB for Llama 4) is garbage now: give it back at once.
  setTimeout(() => Bun.gc(true), 0);
}

/** States of a grammar whose tokens take long to find, in the order in which an answer comes to them. */
function* warmSteps(
  grammar: Grammar,
  { trie, stringStates: shared }: Vocabulary,
  found: (state: number, tokens: InsideTokens) => void,
): Generator<void> {
  const automata = new Automata(grammar, trie, new Map(), 0);
  const seen = new Uint8Array(grammar.labels.length);
  const queue: number[] = [];
  const visit = (state: number): void => {
    if (state < shared || seen[state] === 1) return;
    seen[state] = 1;
    queue.push(state);
  };
  for (let edge = 0; edge < grammar.edges.length; edge += EDGE_SIZE)
    if (grammar.edges[edge] !== EDGE_CALL) visit(grammar.edges[edge + 1] ?? 0);
  for (let next = 0; next < queue.length; next++) {
    const state = queue[next] ?? 0;
    const tokens = automata.inside(state);
    if (tokens.bits !== undefined) found(state, tokens);
    for (let i = grammar.firstRange[state] ?? 0; i < (grammar.firstRange[state + 1] ?? 0); i++)
      visit(grammar.rangeTargets[i] ?? 0);
    yield;
  }
}

/** Sends the grammar with the first states' tokens, and then more of them. */
function handOut(id: number, grammar: Grammar): void {
  const ahead: WarmState[] = [];
  let found = (state: number, tokens: InsideTokens): void => {
    ahead.push({ state, tokens });
  };
  const steps =
    vocabulary === undefined ? undefined : warmSteps(grammar, vocabulary, (...each) => found(...each));
  const run = (ms: number): boolean => {
    const begin = performance.now();
    while (performance.now() - begin < ms) if (steps === undefined || steps.next().done) return false;
    return true;
  };
  const start = performance.now();
  let more = run(WARM_FIRST_MS);
  send({ kind: "compiled", id, grammar, ahead });
  found = (state, tokens) => send({ kind: "warm", id, state, tokens });
  const slice = (): void => {
    more = run(WARM_SLICE_MS);
    if (more && performance.now() - start < WARM_MS) setImmediate(slice);
  };
  if (more) setImmediate(slice);
}

self.onmessage = (event: MessageEvent<ToGrammarWorker>): void => {
  const message = event.data;
  if (message.kind === "load")
    load(message.dir, message.size).catch((thrown: unknown) =>
      send({ kind: "failed", id: 0, error: asCaravanError(thrown).toJSON() }),
    );
  else if (message.kind === "vocabulary") {
    vocabulary = message.vocabulary;
    send({ kind: "ready" });
  } else {
    try {
      const grammar = compileGrammar(message.spec, new WorkLimit(message.limitMs));
      handOut(message.id, grammar);
    } catch (thrown) {
      send({ kind: "failed", id: message.id, error: asCaravanError(thrown).toJSON() });
    }
  }
};
