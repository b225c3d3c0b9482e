// The engine of a rank > 0: it computes what rank 0's steps say, in a native loop, until rank 0 closes its engine or the
// group fails. Nothing is asked of it but how it ended.

import { CaravanError } from "../errors.ts";
import { EngineHandle, type GroupPointer, type NativeStats } from "./binding.ts";

export class Follower {
  readonly #handle: EngineHandle;
  /** Resolves when rank 0 has closed its engine, with the reason when following ended otherwise. Never rejects. */
  readonly ended: Promise<CaravanError | undefined>;
  readonly #cancel: () => Promise<void>;
  #closed = false;

  private constructor(handle: EngineHandle) {
    this.#handle = handle;
    const events = Bun.file(handle.eventDescriptor()).stream().getReader();
    this.#cancel = () => events.cancel();
    this.ended = events.read().then(
      () => this.#outcome(),
      (cause) => new CaravanError("engine_failed", "the engine's event pipe cannot be read", { cause }),
    );
  }

  /** Opens the rank's engine, which follows at once. Throws what cv_open said. */
  static async load(
    plan: Uint8Array,
    group: GroupPointer,
    onBytes?: (done: number) => void,
  ): Promise<Follower> {
    return new Follower(await EngineHandle.load(plan, onBytes, undefined, group));
  }

  stats(): NativeStats {
    return this.#handle.stats();
  }

  /** Aborts the group unless following has ended, waits for the compute thread, frees everything. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#handle.abort();
    await this.#cancel();
    await this.ended;
    this.#handle.close();
  }

  #outcome(): CaravanError | undefined {
    if (this.#closed) return undefined;
    const state = this.#handle.followState();
    if (state === undefined)
      return new CaravanError("engine_failed", "the engine said that it had stopped following, and has not");
    return state === "closed" ? undefined : state;
  }
}
