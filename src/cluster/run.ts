// One run of a node, from start to end, and which of two is newer.

export interface Run {
  /** Counts up at every start. */
  incarnation: number;
  /** Random: tells runs with the same count apart. */
  boot: string;
}

export function runOf({ incarnation, boot }: Run): Run {
  return { incarnation, boot };
}

/** Above 0 where a is newer. The same order on every node. */
export function compareRuns(a: Run, b: Run): number {
  return a.incarnation - b.incarnation || (a.boot < b.boot ? -1 : a.boot > b.boot ? 1 : 0);
}
