// One request while it lives: its tokens, how far they are computed, and the pages and slot that it holds.
//
// Tokens are counted in two ways. `known` are the prompt and the sampled tokens that have been read back; `total` adds
// the one that a step in flight is sampling. `computed` counts positions whose keys and values a submitted step writes,
// `settled` those of steps that have ended.

import type { GenerateRequest } from "../engine/protocol.ts";
import type { GrammarMatcher } from "../grammar/matcher.ts";
import { type PagePools, SequencePages } from "./pages.ts";
import type { PrefixNode } from "./prefix-tree.ts";
import { PromptLogprobs } from "./prompt-logprobs.ts";
import { TokenHistory } from "./token-history.ts";

const NO_TRIPLES = new Uint32Array(0);

export class Sequence {
  readonly request: GenerateRequest;
  /** Counts up with arrival; the age that decides who gives way. */
  readonly order: number;
  readonly arrivedMs: number;
  /** Absolute, on the scheduler's clock; Infinity = none. */
  readonly deadlineMs: number;
  readonly promptTokens: number;
  readonly pages: SequencePages;
  readonly stopTokens: ReadonlySet<number>;
  readonly bias: readonly (readonly [number, number])[];
  readonly xtcKeep: Uint32Array;
  readonly promptLogprobs: PromptLogprobs | undefined;
  /** What the answer has to follow; it has taken every token that is known. */
  readonly grammar: GrammarMatcher | undefined;
  /** The next step's row needs the value of the last token (penalties), so it cannot be queued before that is known. */
  readonly needsLastToken: boolean;

  state: "waiting" | "running" | "done" = "waiting";
  slot = -1;
  computed = 0;
  settled = 0;
  /** Of the computed positions, those of drafts in flight, which may be dropped. */
  drafting = 0;
  /** Positions that the prefix tree has been offered, and the node there. */
  published = 0;
  node: PrefixNode | undefined;
  /** Counts up whenever the pages are given back: a row of an earlier time says nothing about the pages of now. */
  epoch = 0;
  /** Prompt tokens that need not be computed, when it first started. */
  cachedTokens = 0;
  /** An older sequence that is computing the same beginning; this one waits and takes over its pages. */
  leader: { sequence: Sequence; epoch: number; until: number } | undefined;
  /** Sampled tokens in flight, 0 or 1. */
  pending = 0;
  /** Prompt tokens reported as done, so that a recompute reports nothing twice. */
  reported = 0;
  promptLogprobsSent = false;
  startedMs = Number.NaN;
  firstTokenMs = Number.NaN;
  lastTokenMs = Number.NaN;

  #tokens: Uint32Array;
  #known: number;
  readonly #history: TokenHistory | undefined;
  readonly #historyOfPrompt: boolean;

  /** `vocab`: stop tokens outside it are never sampled and are left out. */
  constructor(
    request: GenerateRequest,
    order: number,
    nowMs: number,
    pools: PagePools,
    vocab: number,
    grammar?: GrammarMatcher,
  ) {
    const { sampling } = request;
    const stops = request.stop_tokens.filter((token) => token < vocab);
    this.request = request;
    this.order = order;
    this.arrivedMs = nowMs;
    this.deadlineMs =
      request.deadline_ms === undefined ? Number.POSITIVE_INFINITY : nowMs + request.deadline_ms;
    this.promptTokens = request.tokens.length;
    this.pages = new SequencePages(pools);
    this.#tokens = new Uint32Array(this.promptTokens + Math.min(request.max_tokens, 256));
    this.#tokens.set(request.tokens);
    this.#known = this.promptTokens;
    this.stopTokens = new Set(request.ban_stop_tokens === true ? [] : stops);
    this.xtcKeep = sampling.xtc_probability > 0 ? Uint32Array.from(stops) : NO_TRIPLES;
    this.bias = biases(request, stops);
    this.promptLogprobs =
      request.prompt_logprobs === true
        ? new PromptLogprobs(this.promptTokens, request.logprobs ?? 0)
        : undefined;
    const penalised =
      sampling.repetition_penalty !== 1 ||
      sampling.presence_penalty !== 0 ||
      sampling.frequency_penalty !== 0;
    this.grammar = grammar;
    this.needsLastToken = penalised;
    this.#historyOfPrompt = sampling.repetition_penalty !== 1;
    this.#history = penalised ? new TokenHistory() : undefined;
    if (this.#historyOfPrompt) for (const token of request.tokens) this.#history?.add(token, false);
  }

  get id(): string {
    return this.request.id;
  }

  get known(): number {
    return this.#known;
  }

  get total(): number {
    return this.#known + this.pending;
  }

  /** Sampled tokens that have been read back. */
  get generated(): number {
    return this.#known - this.promptTokens;
  }

  /** Positions left to compute before the next token can be sampled; 1 = a decode row. */
  get remaining(): number {
    return this.total - this.computed;
  }

  /** Everything below `position` is there; `node` ends the last page of it that the tree has, at `published`. */
  resume(position: number, node: PrefixNode | undefined, published = position): void {
    this.computed = position;
    this.settled = position;
    this.drafting = 0;
    this.published = published;
    this.node = node;
    this.epoch++;
  }

  /** Tokens [from, to) that are known; a view that `append` may invalidate. */
  tokens(from: number, to: number): Uint32Array {
    return this.#tokens.subarray(from, to);
  }

  history(): Uint32Array {
    return this.#history === undefined ? NO_TRIPLES : this.#history.view();
  }

  append(token: number): void {
    if (this.#known === this.#tokens.length) {
      const larger = new Uint32Array(this.#tokens.length * 2);
      larger.set(this.#tokens);
      this.#tokens = larger;
    }
    this.#tokens[this.#known] = token;
    this.#known++;
    this.#history?.add(token, true);
  }
}

/** Biases as the sampler takes them: -100 or less bans. */
function biases(request: GenerateRequest, stops: readonly number[]): readonly (readonly [number, number])[] {
  const asked = request.sampling.logit_bias.map(
    ([token, bias]) => [token, bias <= -100 ? Number.NEGATIVE_INFINITY : bias] as const,
  );
  const banned =
    request.ban_stop_tokens === true ? stops.map((token) => [token, Number.NEGATIVE_INFINITY] as const) : [];
  return [...asked, ...banned];
}
