// The last hour of this node in pieces of ten seconds, for the page's plots: a browser that comes later, or comes back, sees
// what was. Fed where the metrics are; no timer runs.

const PIECE_SECONDS = 10;
const PIECES = 360;

/** What happened in one piece of time. */
interface Piece {
  /** Which piece of time, counted from 1970. */
  index: number;
  tokens: number;
  /** Between tokens, and to first tokens: sums in milliseconds and how many. */
  betweenMs: number;
  between: number;
  firstMs: number;
  first: number;
  promptTokens: number;
  requests: number;
  failures: number;
  /** Most generation requests at one time. */
  running: number;
}

const nothing = (index: number, running: number): Piece => ({
  ...{ index, running, tokens: 0, betweenMs: 0, between: 0, firstMs: 0, first: 0 },
  ...{ promptTokens: 0, requests: 0, failures: 0 },
});

export class History {
  readonly #pieces: Piece[] = [];
  #running = 0;

  constructor(private readonly nowMs: () => number = Date.now) {}

  begun(): void {
    this.#running += 1;
    const piece = this.#now();
    piece.running = Math.max(piece.running, this.#running);
  }

  firstToken(ms: number): void {
    const piece = this.#now();
    piece.tokens += 1;
    piece.first += 1;
    piece.firstMs += ms;
  }

  nextToken(ms: number): void {
    const piece = this.#now();
    piece.tokens += 1;
    piece.between += 1;
    piece.betweenMs += ms;
  }

  ended(promptTokens: number, failed: boolean): void {
    const piece = this.#now();
    this.#running -= 1;
    piece.requests += 1;
    piece.promptTokens += promptTokens;
    if (failed) piece.failures += 1;
  }

  #now(): Piece {
    const index = Math.floor(this.nowMs() / 1000 / PIECE_SECONDS);
    const last = this.#pieces.at(-1);
    // A clock that was put back goes on in the newest piece.
    if (last !== undefined && index <= last.index) return last;
    const piece = nothing(index, this.#running);
    this.#pieces.push(piece);
    if (this.#pieces.length > PIECES) this.#pieces.shift();
    return piece;
  }

  /** The pieces of the last hour in which something happened, oldest first, and the one that is going on. */
  toJSON(): object {
    const newest = this.#now().index;
    return {
      object: "history",
      piece_seconds: PIECE_SECONDS,
      pieces: PIECES,
      data: this.#pieces
        .filter(({ index }) => index > newest - PIECES)
        .map(
          ({
            index,
            tokens,
            betweenMs,
            between,
            firstMs,
            first,
            promptTokens,
            requests,
            failures,
            running,
          }) => ({
            at: index * PIECE_SECONDS,
            tokens,
            prompt_tokens: promptTokens,
            inter_token_ms: between === 0 ? null : rounded(betweenMs / between),
            first_token_ms: first === 0 ? null : rounded(firstMs / first),
            requests,
            failures,
            running,
          }),
        ),
    };
  }
}

function rounded(ms: number): number {
  return Math.round(ms * 100) / 100;
}
