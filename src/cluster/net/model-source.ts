// What placement needs to know of the models on this node: profiles from checkpoints' headers, read once for each folder and
// only when asked for. A read takes milliseconds to a second; until it is done the answer is "pending".

import { availableParallelism } from "node:os";
import { asCaravanError } from "../../errors.ts";
import { readModelConfig } from "../../model/config.ts";
import { readHubModel } from "../../model/download/hub-headers.ts";
import { type LoadPlan, makeLoadPlan } from "../../model/load-plan.ts";
import { openCheckpoint } from "../../model/safetensors.ts";
import type { InstalledModel } from "../../model/store.ts";
import type { RunOptions } from "../../node/open-model.ts";
import type { ModelSource, ModelTerms } from "../instance-placer.ts";
import { profileModel } from "../model-profile.ts";

/** Headers from the hub are read anew after so long: a branch moves. */
const HUB_MS = 600_000;
/** Models of the hub that are kept in mind. */
const MOST_HUB = 32;
/** A refusal is looked at again: the model may have been downloaded meanwhile. */
const REFUSED_MS = 5000;

type Entry =
  | { kind: "known"; terms: ModelTerms }
  | { kind: "pending" }
  | { kind: "refused"; reason: string; atMs: number };

/** Of a model that is read from the hub. */
export interface HubTerms {
  terms: ModelTerms;
  /** org/name */
  id: string;
  readBytes: number;
  totalBytes: number;
}

export class ModelTermsCache {
  readonly #entries = new Map<string, Entry>();
  /** Of models that are nowhere in the cluster. */
  readonly #hub = new Map<string, { terms: Promise<HubTerms>; atMs: number }>();

  constructor(
    private readonly model: (name: string) => InstalledModel,
    private readonly run: RunOptions,
    /** A read is done: what was pending can be placed. */
    private readonly onChange: () => void,
  ) {}

  readonly source: ModelSource = (name) => {
    const entry = this.#entries.get(name);
    if (entry?.kind === "known") return entry;
    if (entry?.kind === "refused" && performance.now() - entry.atMs < REFUSED_MS) return entry;
    if (entry?.kind !== "pending") {
      this.#entries.set(name, { kind: "pending" });
      this.terms(name).then(
        () => this.onChange(),
        () => this.onChange(), // kept as refused, with its reason
      );
    }
    return { kind: "pending", reason: `the headers of ${name} are being read` };
  };

  /** Rejects with model_not_found or bad_file. */
  async terms(name: string): Promise<ModelTerms> {
    const known = this.#entries.get(name);
    if (known?.kind === "known") return known.terms;
    try {
      const { path } = this.model(name);
      const terms = this.#termsOf(makeLoadPlan(readModelConfig(path), await openCheckpoint(path)));
      this.#entries.set(name, { kind: "known", terms });
      return terms;
    } catch (thrown) {
      const error = asCaravanError(thrown);
      this.#entries.set(name, { kind: "refused", reason: error.message, atMs: performance.now() });
      throw error;
    }
  }
  /** For planning before a download: from the headers of the hub's files. Rejects as readHubModel does. */
  hubTerms(name: string): Promise<HubTerms> {
    const now = performance.now();
    const known = this.#hub.get(name);
    if (known !== undefined && now - known.atMs < HUB_MS) return known.terms;
    const terms = readHubModel(name).then(({ config, checkpoint, id, readBytes, totalBytes }) => ({
      ...{ id, readBytes, totalBytes },
      terms: this.#termsOf(makeLoadPlan(config, checkpoint)),
    }));
    this.#hub.delete(name);
    this.#hub.set(name, { terms, atMs: now });
    if (this.#hub.size > MOST_HUB) this.#hub.delete(this.#hub.keys().next().value ?? name);
    terms.catch(() => this.#hub.delete(name));
    return terms;
  }

  #termsOf(plan: LoadPlan): ModelTerms {
    return {
      profile: profileModel(plan),
      kvType: this.run.kvBits === 8 ? "q8" : plan.config.dtype === "bfloat16" ? "bf16" : "f16",
      threads: this.run.threads ?? availableParallelism(),
    };
  }
}
