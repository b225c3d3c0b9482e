// What the text worker and the thread that uses it say to each other.
import type { ChatInput, GuardedText, TemplateFiles } from "./prompt-renderer.ts";
import type { TokenTable } from "./token-table.ts";

/** Facts about a model's text that need no round trip. */
export interface TextInfo {
  readonly table: TokenTable;
  readonly vocabSize: number;
  readonly bosId: number | null;
  readonly eosIds: readonly number[];
  /** Ids that go before a raw text (BOS for Llama 4). */
  readonly beginIds: readonly number[];
  readonly hasChatTemplate: boolean;
}

export type Job =
  | { readonly op: "render"; readonly input: ChatInput }
  /** A prompt that another thread has rendered (slow-renderer.ts). */
  | { readonly op: "encode-prompt"; readonly prompt: GuardedText }
  | { readonly op: "encode"; readonly text: string; readonly specials: boolean }
  | { readonly op: "decode"; readonly ids: Uint32Array };

/** Result of a job: a prompt or ids have `ids`, a prompt or a decoded text have `text`. */
export interface JobResult {
  readonly text: string;
  readonly ids: Uint32Array;
}

export type ToWorker =
  | { readonly kind: "load"; readonly dir: string; readonly shared: Int32Array }
  /** Instead of "load": this thread is for slow renderings alone. */
  | { readonly kind: "render"; readonly id: number; readonly files: TemplateFiles; readonly input: ChatInput }
  | { readonly kind: "job"; readonly id: number; readonly job: Job }
  | { readonly kind: "cancel"; readonly id: number };

/** Errors travel as CaravanError's JSON. */
export type FromWorker =
  | { readonly kind: "loaded"; readonly info: TextInfo }
  | { readonly kind: "refused"; readonly error: Record<string, unknown> }
  | { readonly kind: "done"; readonly id: number; readonly result: JobResult }
  /** The template needs longer than others can wait: a thread of its own has to render it. */
  | { readonly kind: "slow"; readonly id: number; readonly files: TemplateFiles }
  | { readonly kind: "rendered"; readonly id: number; readonly prompt: GuardedText }
  | { readonly kind: "failed"; readonly id: number; readonly error: Record<string, unknown> };

/** Index in the shared array: counts slices of work, so that a stuck worker can be told from a busy one. */
export const BEAT = 0;
/** Index in the shared array: id of the job at work, 0 when idle: the one to blame when the worker dies. */
export const RUNNING = 1;
export const SHARED_LENGTH = 2;
