// Adds up, for each GGUF type, what its tensors became and how exactly.

import type { Conversion } from "./convert-tensor.ts";
import type { RepackLoss } from "./repack.ts";

export interface TypeReport {
  /** GGUF's name of the type. */
  from: string;
  /** For example "5-bit, group 32, F32 scales", or the float type itself. */
  to: string;
  tensors: number;
  weights: number;
  lossless: boolean;
  /** Weights in groups that are not exact. */
  inexactWeights: number;
  /** Upper bound of the absolute error of a weight. */
  maxError: number;
  /** The same in relation to the largest weight of its tensor. */
  maxRelativeError: number;
}

export class LossReport {
  readonly #types = new Map<string, TypeReport>();

  /** `loss` is undefined for floats that were copied. */
  add({ planned, repacker }: Conversion, loss: RepackLoss | undefined): void {
    const { type, shape } = planned.source;
    const to =
      repacker === undefined ? type.name : `${repacker.bits}-bit, group 32, ${repacker.scaleType} scales`;
    const entry = this.#types.get(type.name) ?? {
      from: type.name,
      to,
      tensors: 0,
      weights: 0,
      lossless: true,
      inexactWeights: 0,
      maxError: 0,
      maxRelativeError: 0,
    };
    entry.tensors++;
    entry.weights += shape.reduce((a, b) => a * b, 1);
    if (loss !== undefined && loss.inexactWeights > 0) {
      entry.lossless = false;
      entry.inexactWeights += loss.inexactWeights;
      entry.maxError = Math.max(entry.maxError, loss.maxError);
      entry.maxRelativeError = Math.max(entry.maxRelativeError, loss.maxError / (loss.maxMagnitude || 1));
    }
    this.#types.set(type.name, entry);
  }

  get lossless(): boolean {
    return [...this.#types.values()].every((t) => t.lossless);
  }

  types(): TypeReport[] {
    return [...this.#types.values()].sort((a, b) => b.weights - a.weights);
  }

  /** One sentence for each type that was not kept exactly. */
  notes(): string[] {
    return this.types()
      .filter((t) => !t.lossless)
      .map((t) => {
        const share = ((100 * t.inexactWeights) / t.weights).toFixed(1);
        const worst = (100 * t.maxRelativeError).toPrecision(2);
        return (
          `${t.from} is not lossless: ${t.tensors} tensors became ${t.to}; ${share} % of their weights are rounded, ` +
          `by at most ${worst} % of the largest weight of the tensor`
        );
      });
  }
}
