// Progress on the terminal: one line that redraws itself. Where stderr is not a terminal nothing is drawn, so that
// pipes and logs stay clean.

const REDRAW_EVERY_MS = 100;

export class ProgressLine {
  #last = 0;
  #drawn = false;
  readonly #on: boolean;

  constructor(private readonly stream: NodeJS.WriteStream = process.stderr) {
    this.#on = stream.isTTY === true;
  }

  /** fraction 0 to 1; redraws at most ten times a second. */
  show(label: string, fraction: number, detail = ""): void {
    if (!this.#on) return;
    const now = performance.now();
    if (this.#drawn && now - this.#last < REDRAW_EVERY_MS && fraction < 1) return;
    this.#last = now;
    this.#drawn = true;
    const columns = this.stream.columns ?? 80;
    const share = Math.max(0, Math.min(1, fraction));
    const right = ` ${String(Math.floor(share * 100)).padStart(3)}%${detail === "" ? "" : ` ${detail}`}`;
    const width = Math.max(4, Math.min(30, columns - label.length - right.length - 4));
    const full = Math.round(share * width);
    const line = `${label} [${"#".repeat(full)}${"-".repeat(width - full)}]${right}`;
    this.stream.write(`\r\x1b[2K${line.slice(0, columns - 1)}`);
  }

  /** Removes the line. */
  clear(): void {
    if (!this.#drawn) return;
    this.stream.write("\r\x1b[2K");
    this.#drawn = false;
  }
}

/** 98.3 MB, 61.1 GB. */
export function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytes;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(value < 10 ? 2 : 1)} ${units[unit]}`;
}
