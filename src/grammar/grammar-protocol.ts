// What a grammar worker and the thread that uses it say to each other.

import type { TokenTable } from "../chat/token-table.ts";
import type { Grammar } from "./grammar.ts";
import type { InsideTokens } from "./inside-tokens.ts";
import type { GrammarSpec } from "./spec.ts";
import type { TokenTrie } from "./token-trie.ts";

/** In shared memory. */
export interface Vocabulary {
  readonly table: TokenTable;
  readonly trie: TokenTrie;
  /** States of the string automaton, which come first in every grammar. */
  readonly stringStates: number;
}

/** A state's tokens, found ahead of their use. */
export interface WarmState {
  readonly state: number;
  readonly tokens: InsideTokens;
}

export type ToGrammarWorker =
  /** Read the vocabulary of a model folder; `size`: the engine's. */
  | { readonly kind: "load"; readonly dir: string; readonly size: number }
  /** Take one that has been read. */
  | { readonly kind: "vocabulary"; readonly vocabulary: Vocabulary }
  /** Within `limitMs` of processor time. */
  | { readonly kind: "compile"; readonly id: number; readonly spec: GrammarSpec; readonly limitMs: number };

/** Errors travel as CaravanError's JSON; id 0 = of loading. */
export type FromGrammarWorker =
  | {
      readonly kind: "vocabulary";
      readonly vocabulary: Vocabulary;
      readonly strings: Map<number, InsideTokens>;
    }
  | { readonly kind: "ready" }
  | {
      readonly kind: "compiled";
      readonly id: number;
      readonly grammar: Grammar;
      readonly ahead: readonly WarmState[];
    }
  | ({ readonly kind: "warm"; readonly id: number } & WarmState)
  | { readonly kind: "failed"; readonly id: number; readonly error: Record<string, unknown> };
