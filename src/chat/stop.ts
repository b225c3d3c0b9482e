// Stop strings in a stream of text, however the text is cut into pieces: the match that ends first wins, and of those
// that end together the longest. Knuth-Morris-Pratt for each string, so every character is looked at once and exactly
// the text that may still become a stop string is held back.
import { CaravanError } from "../errors.ts";

export interface StopResult {
  /** Text that is safe to send; ends before the stop string if one was found. */
  readonly text: string;
  readonly stopped: boolean;
  /** The stop string that was found. */
  readonly matched?: string;
}

interface Pattern {
  readonly stop: string;
  /** failure[i]: length of the longest proper beginning of stop that ends stop[0 .. i]. */
  readonly failure: Int32Array;
  /** How much of the stop string the end of the text matches. */
  matched: number;
}

function failureTable(stop: string): Int32Array {
  const failure = new Int32Array(stop.length);
  let matched = 0;
  for (let i = 1; i < stop.length; i++) {
    while (matched > 0 && stop.charCodeAt(i) !== stop.charCodeAt(matched))
      matched = failure[matched - 1] ?? 0;
    if (stop.charCodeAt(i) === stop.charCodeAt(matched)) matched++;
    failure[i] = matched;
  }
  return failure;
}

export class StopMatcher {
  readonly #patterns: Pattern[];
  #held = "";
  #stopped = false;

  /** Error: invalid_argument for an empty stop string, which would match everywhere. */
  constructor(stops: readonly string[]) {
    this.#patterns = stops.map((stop) => {
      if (stop === "")
        throw new CaravanError("invalid_argument", "a stop string is empty", { param: "stop" });
      return { stop, failure: failureTable(stop), matched: 0 };
    });
  }

  /** Takes the next piece of text. After a stop was found nothing more comes out. */
  push(text: string): StopResult {
    if (this.#stopped) return { text: "", stopped: true };
    if (this.#patterns.length === 0) return { text, stopped: false };
    const whole = this.#held + text;
    for (let i = this.#held.length; i < whole.length; i++) {
      const found = this.#advance(whole.charCodeAt(i));
      if (found === null) continue;
      this.#stopped = true;
      this.#held = "";
      return { text: whole.slice(0, i + 1 - found.length), stopped: true, matched: found };
    }
    let hold = 0;
    for (const pattern of this.#patterns) hold = Math.max(hold, pattern.matched);
    this.#held = whole.slice(whole.length - hold);
    return { text: whole.slice(0, whole.length - hold), stopped: false };
  }

  /** At the end of the text: what was held back after all. */
  flush(): string {
    const text = this.#held;
    this.#held = "";
    for (const pattern of this.#patterns) pattern.matched = 0;
    return text;
  }

  /** Moves every pattern on by one UTF-16 unit; the longest stop string that is complete now, or null. */
  #advance(unit: number): string | null {
    let found: string | null = null;
    for (const pattern of this.#patterns) {
      const { stop, failure } = pattern;
      let { matched } = pattern;
      while (matched > 0 && stop.charCodeAt(matched) !== unit) matched = failure[matched - 1] ?? 0;
      if (stop.charCodeAt(matched) === unit) matched++;
      pattern.matched = matched;
      if (matched < stop.length) continue;
      pattern.matched = failure[matched - 1] ?? 0;
      if (found === null || stop.length > found.length) found = stop;
    }
    return found;
  }
}
