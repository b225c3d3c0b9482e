// Turns bytes that come in into progress events: not more than ten a second, with the speed of the last few seconds.

import type { PlannedFile } from "./plan.ts";

export interface PullProgress {
  /** The file that bytes came for last. */
  file: string;
  fileBytes: number;
  fileDoneBytes: number;
  /** Over all files of the download; what was on disk before counts as done. */
  doneBytes: number;
  totalBytes: number;
  /** Over the last five seconds, of what came over the network. */
  bytesPerSecond: number;
}

const EVERY_MS = 100;
const WINDOW_MS = 5_000;

export class ProgressMeter {
  readonly #listener: (progress: PullProgress) => void;
  readonly #totalBytes: number;
  readonly #now: () => number;
  readonly #files = new Map<string, number>();
  #doneBytes: number;
  #emittedAt = Number.NEGATIVE_INFINITY;
  #samples: { time: number; bytes: number }[];
  /** Bytes received, without what was thrown away: the speed of the network. */
  received = 0;

  constructor(
    totalBytes: number,
    doneBytes: number,
    listener: (progress: PullProgress) => void,
    now: () => number = () => performance.now(),
  ) {
    this.#totalBytes = totalBytes;
    this.#doneBytes = doneBytes;
    this.#listener = listener;
    this.#now = now;
    this.#samples = [{ time: now(), bytes: 0 }];
  }

  /** Bytes of a file that were there before the download. */
  had(file: PlannedFile, bytes: number): void {
    this.#files.set(file.path, bytes);
  }

  /** Bytes that came in, or (negative) were thrown away. */
  add(file: PlannedFile, bytes: number): void {
    this.#files.set(file.path, (this.#files.get(file.path) ?? 0) + bytes);
    this.#doneBytes += bytes;
    if (bytes > 0) this.received += bytes;
    if (this.#now() - this.#emittedAt >= EVERY_MS) this.emit(file);
  }

  emit(file: PlannedFile): void {
    const time = this.#now();
    this.#emittedAt = time;
    this.#samples.push({ time, bytes: this.received });
    while (this.#samples.length > 2 && time - (this.#samples[0]?.time ?? time) > WINDOW_MS)
      this.#samples.shift();
    const first = this.#samples[0] ?? { time, bytes: this.received };
    const seconds = (time - first.time) / 1000;
    this.#listener({
      file: file.path,
      fileBytes: file.size,
      fileDoneBytes: this.#files.get(file.path) ?? 0,
      doneBytes: this.#doneBytes,
      totalBytes: this.#totalBytes,
      bytesPerSecond: seconds > 0 ? (this.received - first.bytes) / seconds : 0,
    });
  }
}
