// What a plan says in sentences: why its first placement is the first, where splitting loses, what does not fit and by how much, what its
// figures rest on. Pure.

import { CaravanError } from "../errors.ts";
import type { NodeBytes, Placement, PlacementNode, RefusedShape } from "./placement.ts";
import type { LinkTable } from "./predict.ts";
import type { NodeId } from "./types.ts";

export class PlacementWords {
  /** usable: bytes that may be planned on all nodes together. where: the model's configuration. */
  constructor(
    private readonly nodes: readonly PlacementNode[],
    private readonly usable: number,
    private readonly links: LinkTable,
    private readonly where: string,
  ) {}

  /** Why `best` is the recommended one. worthwhile: factor that more nodes must bring. */
  reason(best: Placement, found: readonly Placement[], worthwhile: number): string {
    const speed = best.predicted.decodeAll;
    if (speed === null) {
      return `${this.#name(best)} is the one with the fewest nodes; without the nodes' bandwidth no speed can be predicted`;
    }
    const single = found.find(({ ranks }) => ranks.length === 1);
    if (best.ranks.length === 1) {
      return found.length === 1
        ? `${this.#name(best)} is the only possible placement: ${rate(speed)}`
        : `${this.#name(best)} gives ${rate(speed)}; no placement on more nodes is more than ${Math.round((worthwhile - 1) * 100)} % faster`;
    }
    if (single === undefined) {
      return `no node alone has room for the model; ${this.#name(best)} is the fastest that fits: ${rate(speed)}`;
    }
    return `${this.#name(best)} gives ${rate(speed)}, ${(speed / speedOf(single)).toFixed(2)} times ${this.#name(single)} (${rate(speedOf(single))})`;
  }

  warnings(placement: Placement, all: readonly Placement[]): string[] {
    const out: string[] = [];
    const speed = placement.predicted.decodeAll;
    const fewer = all
      .filter(({ ranks }) => ranks.length < placement.ranks.length)
      .sort((a, b) => speedOf(b) - speedOf(a))[0];
    if (speed !== null && fewer !== undefined && speedOf(fewer) >= speed) {
      const exchange = placement.predicted.exchangeMs;
      const part = `${exchange.toFixed(1)} ms of each token go into the exchange between nodes`;
      out.push(
        `splitting loses: ${rate(speed)} on ${placement.ranks.length} nodes, ${rate(speedOf(fewer))} with ${this.#name(fewer)}${exchange > 1 ? `; ${part}` : ""}`,
      );
    }
    if (placement.pipeline > 1 && placement.streams < placement.pipeline)
      out.push(
        `${placement.streams === 1 ? "one stream keeps" : `${placement.streams} streams keep`} only ${placement.streams} of ${placement.pipeline} stages busy: a pipeline brings memory here, not speed`,
      );
    const idle = placement.bytes.filter(({ rank }) => placement.ranks[rank]?.weight === 0);
    if (idle.length > 0)
      out.push(`${idle.map(({ node }) => this.#nameOf(node)).join(", ")} would compute nothing of its stage`);
    return out;
  }

  /** Where nothing was measured. */
  assumptions(found: readonly Placement[]): string[] {
    const out: string[] = [];
    const names = (nodes: readonly PlacementNode[]) => nodes.map(({ name }) => name).join(", ");
    const unmeasured = this.nodes.filter(({ speed }) => speed === null);
    const without = this.nodes.filter(({ bandwidth }) => bandwidth <= 0);
    if (without.length > 0) out.push(`memory bandwidth of ${names(without)} is unknown`);
    if (unmeasured.length > 0)
      out.push(
        `time of a layer beside reading was not measured on ${names(unmeasured)}: typical figures are used`,
      );
    const metal = unmeasured.filter(({ device }) => device === "metal");
    if (metal.length > 0 && found.some(({ ranks }) => ranks.length > 1))
      out.push(
        `hand-over between GPU and network was not measured on ${names(metal)}: 180 µs is assumed, that of an ordinary event`,
      );
    const pairs = this.nodes.flatMap((a, i) =>
      this.nodes.slice(i + 1).filter((b) => this.links.measured(a.id, b.id) === undefined),
    );
    if (pairs.length > 0)
      out.push(
        `${pairs.length} ${pairs.length === 1 ? "link was" : "links were"} not measured: gigabit Ethernet is assumed`,
      );
    return out;
  }

  /** On which nodes, and how much. */
  missing(bytes: readonly NodeBytes[]): string {
    return bytes
      .filter(({ total, usable }) => total > usable)
      .map(
        ({ node, total, usable }) =>
          `${this.#nameOf(node)} needs ${gigabytes(total)} and has ${gigabytes(usable)}: ${gigabytes(total - usable)} missing`,
      )
      .join("; ");
  }

  /** No shape fits. */
  tooLarge(refused: readonly RefusedShape[]): CaravanError {
    const miss = (shape: RefusedShape) =>
      shape.bytes.reduce((sum, { total, usable }) => sum + Math.max(0, total - usable), 0);
    const closest = refused.toSorted((a, b) => miss(a) - miss(b) || a.bytes.length - b.bytes.length)[0];
    if (closest === undefined)
      return new CaravanError(
        "invalid_argument",
        "no group of these nodes has the shape that was asked for",
        { hint: "Ask for tensor × pipeline = the number of nodes, or leave both out." },
      );
    const needed = closest.bytes.reduce((sum, { total }) => sum + total, 0);
    const weights = closest.bytes.reduce((sum, each) => sum + each.weights + each.scratch, 0);
    const where = this.nodes.length === 1 ? "the node" : `all ${this.nodes.length} nodes together`;
    return new CaravanError(
      "out_of_memory",
      `the model does not fit: ${this.#name(closest)} comes closest with ${gigabytes(needed)} in all, ${gigabytes(this.usable)} can be used on ${where}; ${closest.reason}`,
      {
        where: this.where,
        hint:
          weights <= this.usable
            ? "Ask for a shorter context with --context, or fewer --streams."
            : "Add a node, or use a more strongly quantized model.",
      },
    );
  }

  #nameOf(id: NodeId): string {
    return this.nodes.find((node) => node.id === id)?.name ?? id;
  }

  #name({ tensor, pipeline, bytes }: Pick<Placement, "tensor" | "pipeline" | "bytes">): string {
    const only = bytes[0];
    if (bytes.length === 1 && only !== undefined) return `${this.#nameOf(only.node)} alone`;
    return shapeName(tensor, pipeline);
  }
}

/** "tensor 2 × pipeline 2" */
export function shapeName(tensor: number, pipeline: number): string {
  if (tensor === 1 && pipeline === 1) return "one node";
  if (pipeline === 1) return `tensor ${tensor}`;
  return tensor === 1 ? `pipeline ${pipeline}` : `tensor ${tensor} × pipeline ${pipeline}`;
}

/** Tokens/s of all streams; 0 where it cannot be predicted. */
export function speedOf({ predicted }: Placement): number {
  return predicted.decodeAll ?? 0;
}

export function gigabytes(bytes: number): string {
  return `${(bytes / 1e9).toFixed(bytes < 1e9 ? 3 : 1)} GB`;
}

function rate(speed: number): string {
  return `${speed.toFixed(speed < 10 ? 2 : 1)} tokens/s`;
}
