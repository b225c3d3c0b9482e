// Whether a model's requests run one after another or together in one batch: a pure function of the model's cache kinds,
// of what the backend can compute for many sequences in one pass, and of what the operator asked for. The reason is a
// sentence for /v1/models/{id}, the page and the log.

/** How a layer keeps its keys and values. `full` and `chunked` live in page pools; the others do not exist in every build. */
export type CacheKind = "full" | "chunked" | "sliding" | "quantized";

export interface BackendCapabilities {
  /** For messages: "cpu", "metal". */
  name: string;
  /** Cache kinds for which one pass can compute rows of several sequences. */
  batchedKinds: readonly CacheKind[];
}

export type PolicyRequest = "auto" | "sequential" | "batched";

export interface Policy {
  mode: "sequential" | "batched";
  reason: string;
}

/** Never fails: what cannot be batched is computed sequentially, which is always right. */
export function choosePolicy(input: {
  cacheKinds: readonly CacheKind[];
  backend: BackendCapabilities;
  requested: PolicyRequest;
}): Policy {
  const kinds = [...new Set(input.cacheKinds)];
  const missing = kinds.filter((kind) => !input.backend.batchedKinds.includes(kind));
  if (input.requested === "sequential") {
    return { mode: "sequential", reason: "sequential, as configured" };
  }
  if (missing.length > 0) {
    const asked = input.requested === "batched" ? " although batching was asked for" : "";
    return {
      mode: "sequential",
      reason: `sequential${asked}: the ${input.backend.name} backend has no batched kernel for ${list(missing)} caches`,
    };
  }
  const what = kinds.length === 0 ? "the model keeps no cache" : `${list(kinds)} caches are paged`;
  return {
    mode: "batched",
    reason: `batched: ${what} and the ${input.backend.name} backend computes many sequences in one pass`,
  };
}

function list(words: readonly string[]): string {
  const last = words.at(-1) ?? "";
  return words.length < 2 ? last : `${words.slice(0, -1).join(", ")} and ${last}`;
}
