// Runs of nodes that are gone: what others still repeat of them must not bring them back.

import { compareRuns, type Run } from "./run.ts";
import type { NodeId } from "./types.ts";

const MOST_GRAVES = 512;

export class Graves {
  /** beat: the highest one that is known to be old; Infinity: the run said goodbye. */
  readonly #graves = new Map<NodeId, { run: Run; beat: number }>();

  dig(id: NodeId, run: Run, beat: number): void {
    const known = this.#graves.get(id);
    const order = known === undefined ? 1 : compareRuns(run, known.run);
    if (known !== undefined && (order < 0 || (order === 0 && beat <= known.beat))) return;
    // The latest one is the last to be forgotten.
    this.#graves.delete(id);
    this.#graves.set(id, { run, beat });
    if (this.#graves.size > MOST_GRAVES) {
      const oldest = this.#graves.keys().next().value;
      if (oldest !== undefined) this.#graves.delete(oldest);
    }
  }

  /** Whether a beat of a run is news. own: the node itself said it; then a run that counts lower is a node whose files were
   * restored, not an echo. */
  allows(id: NodeId, run: Run, beat: number, own: boolean): boolean {
    const grave = this.#graves.get(id);
    if (grave === undefined) return true;
    const order = compareRuns(run, grave.run);
    return order > 0 || (order === 0 ? beat > grave.beat : own);
  }
}
