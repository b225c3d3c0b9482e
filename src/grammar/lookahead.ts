// Look-ahead at the beginning of a pattern, as of passwords (^(?=.*[A-Z])(?=.*\d).{8,}$): such a pattern says the same as
// several without, all of which are to be found, or not to be found.

export interface Lookaheads {
  /** Patterns that are found in the string. */
  readonly found: readonly string[];
  /** Patterns that are not. */
  readonly unmatched: readonly string[];
}

/** The patterns that say together what `pattern` says; itself where it has no look-ahead right behind its `^`, or is made of
 * several alternatives. */
export function splitLookahead(pattern: string): Lookaheads {
  const whole: Lookaheads = { found: [pattern], unmatched: [] };
  if (!/^\^\(\?[=!]/.test(pattern) || hasAlternatives(pattern)) return whole;
  const found: string[] = [];
  const unmatched: string[] = [];
  let at = 1;
  while (/^\(\?[=!]/.test(pattern.slice(at))) {
    const end = closing(pattern, at);
    if (end < 0) return whole;
    (pattern[at + 2] === "=" ? found : unmatched).push(`^(?:${pattern.slice(at + 3, end)})`);
    at = end + 1;
  }
  // What was looked for as a group cannot be referred to elsewhere; the reader of patterns refuses that anyway.
  return { found: [...found, `^${pattern.slice(at)}`], unmatched };
}

/** Steps over the pattern's characters outside of escapes and sets. */
function* marks(pattern: string, from: number): Generator<[mark: string, at: number]> {
  let inSet = false;
  for (let at = from; at < pattern.length; at++) {
    const mark = pattern[at] ?? "";
    if (mark === "\\") at++;
    else if (inSet) inSet = mark !== "]";
    else if (mark === "[") inSet = true;
    else yield [mark, at];
  }
}

/** Where the group that begins at `open` ends, -1 = nowhere. */
function closing(pattern: string, open: number): number {
  let depth = 0;
  for (const [mark, at] of marks(pattern, open)) {
    if (mark === "(") depth++;
    if (mark === ")" && --depth === 0) return at;
  }
  return -1;
}

/** Whether there is a | outside of all groups. */
function hasAlternatives(pattern: string): boolean {
  let depth = 0;
  for (const [mark] of marks(pattern, 0)) {
    if (mark === "(") depth++;
    if (mark === ")") depth--;
    if (mark === "|" && depth === 0) return true;
  }
  return false;
}
