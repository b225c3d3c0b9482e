// Holds a runner's requests back while the grammars that their answers have to follow are compiled.

import { asCaravanError } from "../errors.ts";
import { GrammarService, type GrammarServiceOptions } from "../grammar/grammar-service.ts";
import type { GrammarMatcher } from "../grammar/matcher.ts";
import { errorRecord } from "./error-record.ts";
import type { GenerateEvent, GenerateRequest } from "./protocol.ts";

export interface GrammarGateOptions extends GrammarServiceOptions {
  /** A request whose grammar is ready. */
  pass: (request: GenerateRequest, grammar: GrammarMatcher) => void;
  /** What became of a request that does not get so far. */
  emit: (event: GenerateEvent) => void;
  /** Called behind everything that one turn has done. */
  onTurn: () => void;
}

export class GrammarGate {
  readonly #options: GrammarGateOptions;
  readonly #grammars: GrammarService;
  readonly #held = new Map<string, GenerateRequest>();

  constructor(options: GrammarGateOptions) {
    this.#options = options;
    this.#grammars = new GrammarService(options);
  }

  /** Does ahead what the first request would wait for. */
  prepare(): void {
    // A failure belongs to the requests that need a grammar: they meet it again.
    this.#grammars.prepare().catch(() => undefined);
  }

  /** Takes a request with a grammar. */
  add(request: GenerateRequest): void {
    const { grammar } = request;
    if (grammar === undefined) return;
    this.#held.set(request.id, request);
    const since = performance.now();
    const { pass, emit, onTurn } = this.#options;
    this.#grammars
      .matcher(grammar)
      .then(
        (matcher) => {
          if (this.#held.get(request.id) !== request) return;
          this.#held.delete(request.id);
          const { deadline_ms } = request;
          const left =
            deadline_ms === undefined ? {} : { deadline_ms: deadline_ms - (performance.now() - since) };
          pass({ ...request, ...left }, matcher);
        },
        (thrown: unknown) => {
          if (this.#held.get(request.id) !== request) return;
          this.#held.delete(request.id);
          emit({ type: "error", id: request.id, error: errorRecord(asCaravanError(thrown)) });
        },
      )
      .finally(onTurn);
  }

  /** Ends a request that is held; false when it is not. */
  cancel(id: string): boolean {
    const request = this.#held.get(id);
    if (request === undefined) return false;
    this.#held.delete(id);
    this.#options.emit({
      type: "finish",
      id,
      reason: "cancelled",
      usage: { prompt_tokens: request.tokens.length, completion_tokens: 0, cached_tokens: 0 },
      timing: { queue_ms: 0, prefill_ms: 0, decode_ms: 0 },
    });
    this.#options.onTurn();
    return true;
  }

  close(): void {
    this.#grammars.close();
  }
}
