// The scheduler's StepEngine on the native one: steps and results in their typed form.

import type { CaravanError } from "../errors.ts";
import type { Step, StepEngine, StepResult } from "../scheduler/step.ts";
import type { GroupPointer, NativeStats } from "./binding.ts";
import { NativeEngine } from "./native-engine.ts";
import { decodeResult } from "./result-decoder.ts";
import { StepEncoder } from "./step-encoder.ts";

export class NativeStepEngine implements StepEngine {
  readonly #engine: NativeEngine;
  readonly #encoder = new StepEncoder();
  readonly #decode: (result: Uint8Array) => StepResult;
  readonly #tickets = new WeakMap<Step, number>();

  /** Opens an engine from a load plan's bytes, in a thread of the library. group: as NativeEngine.load has it. */
  static async load(
    plan: Uint8Array,
    vocab: number,
    onBytes?: (done: number) => void,
    group: GroupPointer | null = null,
  ): Promise<NativeStepEngine> {
    return new NativeStepEngine(await NativeEngine.load(plan, onBytes, undefined, group), vocab);
  }

  private constructor(engine: NativeEngine, vocab: number) {
    this.#engine = engine;
    this.#decode = (result) => decodeResult(result, vocab);
  }

  get failed(): CaravanError | undefined {
    return this.#engine.failed;
  }

  submit(step: Step): Promise<StepResult> {
    return this.#engine.submit(this.#encoder.encode(step), this.#decode, (ticket) =>
      this.#tickets.set(step, ticket),
    );
  }

  giveMasks(step: Step, row: number, masks: Uint32Array | undefined): void {
    const ticket = this.#tickets.get(step);
    if (ticket !== undefined) this.#engine.giveMasks(ticket, row, masks);
  }

  stats(): NativeStats {
    return this.#engine.stats();
  }

  /** Ends running and queued steps with an error; `why` is what later steps are told. */
  abort(why?: CaravanError): void {
    this.#engine.abort(why);
  }

  close(): Promise<void> {
    return this.#engine.close();
  }
}
