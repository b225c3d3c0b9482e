// What the API needs of the models on this node, as structural types: the node process fills them in with a runner
// client and the chat layer's classes, tests with scripted ones. Nothing here is code that runs.

import type { Engine, EngineStatus } from "../engine/protocol.ts";

type MaybePromise<T> = T | Promise<T>;

/** A call that the model made in an earlier turn. */
export interface ChatToolCall {
  id: string;
  type: "function";
  /** `arguments`: JSON text, as the client sent it. */
  function: { name: string; arguments: string };
}

/** One turn of a chat after the API has normalised it: text only, `developer` already turned into `system`. */
export interface ChatMessage {
  role: "system" | "user" | "assistant" | "tool";
  content: string;
  /** Only in turns of the assistant; at least one. */
  tool_calls?: ChatToolCall[];
  /** Only in turns of a tool: the call that this is the result of. */
  tool_call_id?: string;
  /** Only in turns of a tool: the function's name. */
  name?: string;
}

/** A function that the model may call, in the form that chat templates take. */
export interface ChatTool {
  type: "function";
  function: { name: string; description?: string; parameters?: Record<string, unknown> };
}

export interface RenderInput {
  messages: ChatMessage[];
  /** End with the header that makes the model answer. */
  addGenerationPrompt: boolean;
  /** At least one; a template without a place for tools rejects with unsupported_parameter. */
  tools?: ChatTool[];
}

export interface RenderedPrompt {
  text: string;
  ids: number[];
}

export interface TextOptions {
  /** Gives the work up; the promise then rejects with `cancelled`. */
  signal?: AbortSignal;
}

export interface TextService {
  /** Applies the model's chat template. User text never becomes control tokens. */
  renderChat(input: RenderInput, options?: TextOptions): MaybePromise<RenderedPrompt>;
  /** `specials`: whether the names of control tokens in `text` become those tokens. Adds no begin-of-text token. */
  encode(text: string, options: TextOptions & { specials: boolean }): MaybePromise<number[]>;
  /** Text of the ids, control tokens included by name. */
  decode(ids: number[]): string;
  /** The bytes that a token stands for; a control token's name for one of those. They need not be whole UTF-8. */
  tokenBytes(id: number): Uint8Array;
}

/** Turns a stream of ids into text, holding back bytes that do not yet make a character. One a sequence. */
export interface Detokenizer {
  push(id: number): string;
  /** What was held back, as replacement characters where it is not UTF-8. */
  flush(): string;
}

export interface DetokenizerOptions {
  /** Control tokens give no text; otherwise they appear by name. */
  skipSpecials: boolean;
  /** Control tokens that appear by name although skipSpecials is set. */
  keep?: readonly string[];
  /** The text goes on where the prompt ended, so a space at its beginning belongs to it. */
  continues?: boolean;
}

/** Finds stop strings in text that comes in pieces; holds back what may be the start of one. One a sequence. */
export interface StopMatcher {
  /** `text` may be passed on; `stopped` means that a stop string followed it, and nothing may be pushed any more. */
  push(text: string): StopResult;
  flush(): string;
}

export interface StopResult {
  text: string;
  stopped: boolean;
  /** Which string it was. */
  matched?: string;
}

/** Sampling values that a model brings along; what is absent is left to the next source (sampling-defaults.ts). */
export interface SamplingDefaults {
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  xtc_probability?: number;
  xtc_threshold?: number;
  max_tokens?: number;
}

export type ModelState = "available" | "loading" | "ready" | "failed";

/** A line of `GET /v1/models`. */
export interface ModelInfo {
  id: string;
  /** Other names that find() accepts. */
  aliases?: string[];
  /** Seconds since 1970. */
  created: number;
  ownedBy: string;
  /** Prompt and answer together, in tokens; absent when it is not known before loading. */
  contextLength?: number;
  /** "available": the files are here and a request loads them. */
  state: ModelState;
  /** 0 to 1 while loading. */
  progress?: number;
  /** How requests are scheduled and why, in words. */
  policy?: { mode: "sequential" | "batched"; reason: string };
  /** Why it failed, for state "failed". */
  error?: string;
}

export interface LoadedModel {
  readonly id: string;
  readonly created: number;
  readonly ownedBy: string;
  readonly contextLength: number;
  readonly vocabSize: number;
  /** Changes when weights, quantization or arithmetic change; shown as `system_fingerprint`. */
  readonly fingerprint: string;
  readonly engine: Engine;
  readonly text: TextService;
  /** Put before a raw completion prompt that does not begin with them: begin-of-text, or nothing. */
  readonly beginIds: readonly number[];
  /** Tokens that end an answer. */
  readonly eosIds: readonly number[];
  readonly defaults: { generationConfig: SamplingDefaults; card: SamplingDefaults };
  readonly policy?: { mode: "sequential" | "batched"; reason: string };
  newDetokenizer(options: DetokenizerOptions): Detokenizer;
  newStopMatcher(stops: readonly string[]): StopMatcher;
}

export interface FindOptions {
  /** Ends the wait for a model that loads; the promise then rejects with its reason. */
  signal?: AbortSignal;
}

export interface ModelDirectory {
  list(): ModelInfo[];
  /** Of every loaded model's engine; `model` is the model's id. */
  statuses(): EngineStatus[];
  /** Loads the model on demand. Rejects with model_not_found, model_loading (with progress), or why it cannot load. */
  find(name: string, options?: FindOptions): Promise<LoadedModel>;
  /** Takes the model out of memory once its requests are over; false when it was not loaded. Rejects with
   * model_not_found. */
  unload(name: string): Promise<boolean>;
}
