// What every model of the cluster needs of a node's memory: of this node's own models from their headers, of others as a node that has
// them says. Asked for once, when somebody wants to see it; until the answer is here the model is left out.

import * as v from "valibot";
import { asCaravanError } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import type { ModelSource, ModelTerms } from "../instance-placer.ts";
import { type ModelNeed, modelNeed } from "../model-need.ts";
import type { ModelPresence, NodeId } from "../types.ts";

/** Models that ledgers tell of. */
const MOST_MODELS = 32;
/** A node that did not answer is asked again after this. */
const AGAIN_MS = 3000;

const METHOD = "model.need";
const count = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const bytes = v.pipe(v.number(), v.finite(), v.minValue(0));
const AskSchema = v.object({ model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)) });
const NeedSchema = v.object({
  fixed: bytes,
  defaultContext: count,
  longestContext: count,
  pageTokens: v.pipe(count, v.minValue(1)),
  fullPageBytes: bytes,
  chunkedPageBytes: bytes,
  mostChunkedPages: count,
});

export interface ModelNeedsOptions {
  /** Of this node. */
  own: () => ModelPresence[];
  /** Of other nodes that can be talked to. */
  others: () => ModelPresence[];
  /** Terms of a model of this node. */
  source: ModelSource;
  /** Nodes that have all of a model, the nearest first. */
  holders: (model: string) => NodeId[];
  ask: (node: NodeId, method: string, params: object) => Promise<unknown>;
  /** There is more to tell. */
  onChange: () => void;
  log: Logger;
}

interface Told {
  /** Bytes of the model's files: others are another checkpoint of that name. */
  total: number;
  /** undefined: asked, or not answered. */
  need: ModelNeed | undefined;
  /** Monotonic; when it may be asked again. */
  againAt: number;
}

export class ModelNeeds {
  readonly #options: ModelNeedsOptions;
  /** Of models that only other nodes have, by name. */
  readonly #told = new Map<string, Told>();
  /** Adding up a model's tensors takes a millisecond, and states are asked for often. */
  readonly #added = new WeakMap<ModelTerms, ModelNeed>();

  constructor(options: ModelNeedsOptions) {
    this.#options = options;
  }

  /** By model; those of this node first. */
  all(): Map<string, ModelNeed> {
    const { own, others, source } = this.#options;
    const needs = new Map<string, ModelNeed>();
    const mine = own().slice(0, MOST_MODELS);
    for (const { model } of mine) {
      const found = source(model);
      if (found.kind === "known") needs.set(model, this.#of(found.terms));
    }
    const here = new Set(mine.map(({ model }) => model));
    const theirs = new Map(others().map((each) => [each.model, each]));
    for (const model of here) theirs.delete(model);
    for (const model of this.#told.keys()) if (!theirs.has(model)) this.#told.delete(model);
    for (const { model, total } of [...theirs.values()].slice(0, MOST_MODELS - mine.length)) {
      const need = this.#tell(model, total);
      if (need !== undefined) needs.set(model, need);
    }
    return needs;
  }

  /** Another node asks. undefined: not a question of this kind. */
  onCall(method: string, params: unknown): Promise<unknown> | undefined {
    if (method !== METHOD) return undefined;
    const { model } = v.parse(AskSchema, params);
    const { own, source } = this.#options;
    const found = own().some((each) => each.model === model) ? source(model) : undefined;
    return Promise.resolve(found?.kind === "known" ? this.#of(found.terms) : null);
  }

  #tell(model: string, total: number): ModelNeed | undefined {
    const known = this.#told.get(model);
    if (known?.total === total && (known.need !== undefined || performance.now() < known.againAt))
      return known.need;
    const told: Told = { total, need: undefined, againAt: performance.now() + AGAIN_MS };
    this.#told.set(model, told);
    void this.#ask(model, told);
    return undefined;
  }

  async #ask(model: string, told: Told): Promise<void> {
    const { holders, ask, onChange, log } = this.#options;
    const [holder] = holders(model);
    if (holder === undefined) {
      told.againAt = 0; // nobody was asked
      return;
    }
    try {
      // null: it is reading the headers itself.
      const need = v.parse(v.nullable(NeedSchema), await ask(holder, METHOD, { model }));
      if (need === null) told.againAt = performance.now() + AGAIN_MS / 3;
      else told.need = need;
      if (need !== null) onChange();
    } catch (thrown) {
      log.debug("a node did not say what a model needs", { model, ...asCaravanError(thrown).toJSON() });
    }
  }

  #of(terms: ModelTerms): ModelNeed {
    const known = this.#added.get(terms) ?? modelNeed(terms);
    this.#added.set(terms, known);
    return known;
  }
}
