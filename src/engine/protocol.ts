// What a node process and a runner process say to each other: one JSON object a line, requests on the runner's stdin,
// events on its stdout. The same types are what the API sees of an engine (see Engine below), so that tests can put
// a scripted engine in the runner's place.

import type { GrammarSpec } from "../grammar/spec.ts";

/** Sampling options of one sequence, all resolved (defaults filled in). Order of application: caravan.h, cv_step_row. */
export interface Sampling {
  /** 0 = greedy. */
  temperature: number;
  /** 1 = off. */
  top_p: number;
  /** 0 = off. */
  top_k: number;
  /** 0 = off. */
  min_p: number;
  /** 1 = off. Over prompt and output. */
  repetition_penalty: number;
  /** 0 = off. Over output only. */
  presence_penalty: number;
  frequency_penalty: number;
  xtc_probability: number;
  xtc_threshold: number;
  /** Added to the logits of these tokens; -100 or less bans. */
  logit_bias: [token: number, bias: number][];
  /** Unsigned, below 2^53. The same seed gives the same tokens, alone or in a batch. */
  seed: number;
}

export const GREEDY: Sampling = {
  temperature: 0,
  top_p: 1,
  top_k: 0,
  min_p: 0,
  repetition_penalty: 1,
  presence_penalty: 0,
  frequency_penalty: 0,
  xtc_probability: 0,
  xtc_threshold: 0,
  logit_bias: [],
  seed: 0,
};

/** One sequence to generate. */
export interface GenerateRequest {
  /** Unique among the engine's live requests; chosen by the caller. */
  id: string;
  /** Prompt token ids, at least one. */
  tokens: number[];
  /** Most tokens to generate, at least one. */
  max_tokens: number;
  /** Token ids that end generation; the ending token itself is reported in its event with `end: true`. */
  stop_tokens: number[];
  /** End-of-sequence tokens are never sampled (bench). */
  ban_stop_tokens?: boolean;
  sampling: Sampling;
  /** Alternatives to report for each token, 0 to 20; undefined = no log-probabilities. */
  logprobs?: number;
  /** Log-probabilities of the prompt's tokens too (completions `echo`). */
  prompt_logprobs?: boolean;
  /** What the answer has to follow. */
  grammar?: GrammarSpec;
  /** Milliseconds from arrival at the runner after which the request ends with deadline_exceeded. */
  deadline_ms?: number;
}

/** Alternatives: most probable first. */
export type TopLogprobs = [token: number, logprob: number][];

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  /** Prompt tokens whose cache pages were already there. */
  cached_tokens: number;
}

/** Milliseconds, as the runner measured them. */
export interface Timing {
  queue_ms: number;
  /** From the start of prefill to the first token. */
  prefill_ms: number;
  decode_ms: number;
}

export interface ErrorRecord {
  code: string;
  message: string;
  where?: string;
  hint?: string;
  param?: string;
  retry_after_seconds?: number;
}

export type GenerateEvent =
  /** Prompt tokens computed so far; 0 as soon as the request is accepted. */
  | { type: "progress"; id: string; done: number; total: number }
  | { type: "token"; id: string; token: number; end?: boolean; logprob?: number; top?: TopLogprobs }
  | { type: "prompt_logprobs"; id: string; logprobs: (number | null)[]; top: (TopLogprobs | null)[] }
  | { type: "finish"; id: string; reason: "stop" | "length" | "cancelled"; usage: Usage; timing: Timing }
  | { type: "error"; id: string; error: ErrorRecord };

/** What /health, /metrics and the model page show of an engine. */
export interface EngineStatus {
  model: string;
  state: "loading" | "ready" | "failed" | "closed";
  /** 0 to 1 while loading. */
  progress: number;
  policy?: { mode: "sequential" | "batched"; reason: string };
  device?: string;
  /** Why this device, in a sentence. */
  device_reason?: string;
  /** Of each rank. */
  threads?: number;
  cpu?: string;
  /** Where the model is split: the grid of ranks and what connects them; `note` says why nothing faster does. */
  ranks?: { tensor: number; pipeline: number; transport: string; note: string };
  context?: number;
  running: number;
  waiting: number;
  pages?: { full: { total: number; free: number }; chunked: { total: number; free: number } };
  /** Sequences started and those that resumed behind a known prefix; their tokens and those not computed again. */
  prefix_cache?: { enabled: boolean; lookups: number; hits: number; tokens: number; cached_tokens: number };
  /** Rows that carried drafts, their drafted tokens, and those accepted. */
  speculation?: { enabled: boolean; rows: number; drafted: number; accepted: number };
  memory?: { weights_mapped: number; weights_copied: number; kv: number; scratch: number };
  /** Most memory that the runner's process had resident so far, mapped weights included. */
  peak_resident_bytes?: number;
  /** The same of each rank's process, rank 0 first, where the model is split; null where another machine has not said so yet. */
  rank_peak_resident_bytes?: (number | null)[];
  /** Tensors of the checkpoint that the model's kind has no use for: how many, and the first names. */
  unused_tensors?: { count: number; first: string[] };
  error?: ErrorRecord;
}

/** A loaded model that generates. Implemented by RunnerClient (a runner process) and by scripted engines in tests. */
export interface Engine {
  readonly model: string;
  status(): EngineStatus;
  /** Requests that were given and have not ended: status() learns of them later. */
  outstanding(): number;
  /** Resolves when ready; rejects with the load error. */
  ready(): Promise<void>;
  /** Streams events until finish or error (the last event). Ending the iteration early cancels the request.
   * A runner that dies ends every stream with an engine_failed error event. */
  generate(request: GenerateRequest): AsyncIterable<GenerateEvent>;
  /** Idempotent. The stream ends with finish "cancelled". */
  cancel(id: string): void;
  close(): Promise<void>;
}

/** Lines to the runner. */
export type RunnerCommand =
  | { type: "generate"; request: GenerateRequest }
  | { type: "cancel"; id: string }
  | { type: "status" }
  /** To rank 0 of an instance, once, before it loads: the addresses of all its ranks (rank-protocol.ts). */
  | { type: "connect"; addresses: string[]; timeout_ms: number }
  /** A rank of the instance is gone. */
  | { type: "lost"; error: ErrorRecord }
  | { type: "shutdown" };

/** Lines from the runner. */
export type RunnerMessage =
  | GenerateEvent
  /** Of rank 0 of an instance, base64. */
  | { type: "address"; address: string }
  | { type: "connected"; transport: string; note: string; round_trip_us: number }
  | { type: "loading"; progress: number; detail: string }
  | { type: "ready"; status: EngineStatus }
  | { type: "status"; status: EngineStatus }
  | { type: "fatal"; error: ErrorRecord };
