// One file of a download: hands out its chunks to whoever has a free connection, checks each answer, starts over where
// the server cannot be trusted, and puts the file under its hash when that is right.

import { existsSync } from "node:fs";
import { CaravanError } from "../../errors.ts";
import { blobFile, PART_SUFFIX } from "../hub-cache.ts";
import { PartFile } from "./part-file.ts";
import type { PlannedFile } from "./plan.ts";
import { PassingFault, RetryBudget, type RetryLimits } from "./retry.ts";
import { openTransfer, plainEtag, StaleLink, type Transfer, type TransferOptions } from "./transfer.ts";

export interface FileDownloadOptions extends TransferOptions {
  retry: RetryLimits;
  /** Big files are fetched in ranges of this size. */
  chunkBytes: number;
  onRetry?: (message: string) => void;
  /** Bytes that came in (negative: were thrown away). */
  onBytes: (file: PlannedFile, bytes: number) => void;
}

/** Progress on a chunk that makes earlier failures forgotten. */
const PROGRESS_BYTES = 64 * 1024;
/** Times that a whole file is begun anew because its content was not what it should be. */
const MAX_RESTARTS = 1;

/** The transfer was given up because the file begins anew. */
class Superseded extends Error {}

export class FileDownload {
  readonly file: PlannedFile;
  readonly #url: string;
  readonly #commit: string;
  readonly #blob: string;
  readonly #options: FileDownloadOptions;
  #part: PartFile | undefined;
  #opening: Promise<PartFile> | undefined;
  /** Chunks that somebody works on. */
  readonly #busy = new Set<number>();
  /** Chunks, once the part file is open; before, one stands for all. */
  #mode: "ranges" | "whole" = "ranges";
  /** Set when the file must begin anew; done when nobody works on it any more. */
  #restart = false;
  #restarts = 0;
  /** ETag that the file server gave the first time. */
  #etag: string | undefined;
  /** Where the hub sent us last: saves a round trip for every chunk, until it is stale. */
  #link: string | undefined;
  #finished = false;

  constructor(repo: string, commit: string, url: string, file: PlannedFile, options: FileDownloadOptions) {
    this.file = file;
    this.#commit = commit;
    this.#url = url;
    this.#blob = blobFile(repo, file.hash);
    this.#options = options;
  }

  static partPath(repo: string, file: PlannedFile): string {
    return blobFile(repo, file.hash) + PART_SUFFIX;
  }

  get finished(): boolean {
    return this.#finished;
  }

  /** A piece of work on this file, or undefined when there is none to give now. Run what is returned at once. */
  take(): (() => Promise<void>) | undefined {
    if (this.#finished || this.#restart) return undefined;
    if (this.#part === undefined) {
      // The first to come opens the file; others wait for it and then look for a chunk of their own.
      if (this.#opening === undefined) return () => this.#open().then(() => undefined);
      const opening = this.#opening;
      return () => opening.then(() => undefined);
    }
    const part = this.#part;
    if (this.#mode === "whole") return this.#busy.size === 0 ? () => this.#work(part, 0) : undefined;
    for (let chunk = 0; chunk < part.chunks; chunk += 1) {
      const { start, end } = part.rest(chunk);
      if (start < end && !this.#busy.has(chunk)) return () => this.#work(part, chunk);
    }
    // All bytes are there already (an earlier run ended before the hash was checked), or the file is empty.
    return this.#busy.size === 0 ? () => this.#work(part, 0) : undefined;
  }

  /** Saves the map and closes the file. For the end, good or bad. */
  async close(): Promise<void> {
    await this.#opening?.catch(() => undefined); // whoever ran it has its error
    if (!this.#finished) await this.#part?.close();
  }

  #open(): Promise<PartFile> {
    this.#opening = PartFile.open(this.#blob + PART_SUFFIX, this.file.size, this.#options.chunkBytes).then(
      (part) => {
        this.#part = part;
        return part;
      },
    );
    return this.#opening;
  }

  async #work(part: PartFile, chunk: number): Promise<void> {
    this.#busy.add(chunk);
    try {
      if (this.#mode === "whole") await this.#fetchWhole(part);
      else await this.#fetchChunk(part, chunk);
      // `busy` still holds this chunk, so only the last one to end gets here with nothing else under way.
      if (this.#busy.size === 1 && part.doneBytes === part.size && !this.#restart) await this.#finish(part);
    } catch (error) {
      if (!(error instanceof Superseded)) throw error;
    } finally {
      this.#busy.delete(chunk);
    }
    if (this.#restart && this.#busy.size === 0) await this.#beginAnew(part);
  }

  async #beginAnew(part: PartFile): Promise<void> {
    this.#options.onBytes(this.file, -part.doneBytes);
    this.#etag = undefined;
    this.#link = undefined;
    await part.reset();
    this.#restart = false;
  }

  /** Asks for a new beginning, or throws when that has been tried. */
  #distrust(reason: string): Superseded {
    if (this.#restart) return new Superseded(reason);
    this.#restarts += 1;
    if (this.#restarts > MAX_RESTARTS) {
      throw new CaravanError("download_failed", `${reason}, also after a new start`, {
        where: this.file.path,
        hint: "the file may be changing on the hub, or something on the way changes it; try again later",
      });
    }
    this.#options.onRetry?.(`${this.file.path}: ${reason}; starting this file over`);
    this.#restart = true;
    return new Superseded(reason);
  }

  async #fetchChunk(part: PartFile, chunk: number): Promise<void> {
    const budget = this.#budget();
    let unrewarded = 0;
    for (;;) {
      const range = part.rest(chunk);
      if (range.start === range.end) return;
      if (this.#restart) throw new Superseded();
      try {
        const transfer = await this.#transfer(range, part.size);
        await this.#receive(transfer, range.end - range.start, async (bytes) => {
          await part.append(chunk, bytes);
          unrewarded += bytes.byteLength;
        });
      } catch (error) {
        if (!(error instanceof PassingFault)) throw error;
        if (unrewarded >= Math.min(PROGRESS_BYTES, part.chunkBytes)) {
          budget.progressed();
          unrewarded = 0;
        }
        await budget.failed(error);
      }
    }
  }

  /** For servers without ranges: one connection from the first byte to the last, anew after every failure. */
  async #fetchWhole(part: PartFile): Promise<void> {
    const budget = this.#budget();
    for (;;) {
      try {
        const transfer = await this.#transfer(undefined, part.size);
        await this.#receive(transfer, part.size, (bytes) => this.#appendAcross(part, bytes));
        return;
      } catch (error) {
        if (!(error instanceof PassingFault)) throw error;
        this.#options.onBytes(this.file, -part.doneBytes);
        await part.reset();
        await budget.failed(error);
      }
    }
  }

  /** Appends bytes that may span chunks, in order. */
  async #appendAcross(part: PartFile, bytes: Uint8Array): Promise<void> {
    let rest = bytes;
    for (let chunk = Math.floor(part.doneBytes / part.chunkBytes); rest.byteLength > 0; chunk += 1) {
      const { start, end } = part.rest(chunk);
      await part.append(chunk, rest.subarray(0, end - start));
      rest = rest.subarray(end - start);
    }
  }

  #budget(): RetryBudget {
    const { retry, signal, onRetry } = this.#options;
    return new RetryBudget(this.file.path, retry, signal, onRetry);
  }

  /** Opens a transfer of `range` (undefined: the whole file) and checks that the answer is about just that. */
  async #transfer(range: { start: number; end: number } | undefined, size: number): Promise<Transfer> {
    // A file in one piece is asked for without a range: every server can do that.
    const asked = range !== undefined && range.end - range.start === size ? undefined : range;
    let transfer: Transfer;
    try {
      transfer = await openTransfer(this.#link ?? this.#url, asked, this.#options);
    } catch (error) {
      if (error instanceof StaleLink) this.#link = undefined;
      throw error;
    }
    try {
      this.#checkIdentity(transfer);
      this.#checkExtent(transfer, asked, size);
    } catch (error) {
      transfer.close();
      throw error;
    }
    this.#link = transfer.url;
    return transfer;
  }

  #checkIdentity({ hub, headers }: Transfer): void {
    const changed = (what: string): CaravanError =>
      new CaravanError("download_failed", `the file changed on the hub during the download: ${what}`, {
        where: this.file.path,
        hint: "run the command again to get the new revision",
      });
    if (hub.commit !== undefined && hub.commit !== this.#commit) {
      throw changed(`asked for commit ${this.#commit.slice(0, 8)}, got ${hub.commit.slice(0, 8)}`);
    }
    const linked = hub.linkedEtag;
    if (linked !== undefined && /^([0-9a-f]{40}|[0-9a-f]{64})$/.test(linked) && linked !== this.file.hash) {
      throw changed("its hash is another one");
    }
    const etag = plainEtag(headers.get("etag"));
    if (this.#etag !== undefined && etag !== this.#etag)
      throw this.#distrust("its ETag changed during the download");
    this.#etag = etag;
  }

  #checkExtent(
    { status, headers }: Transfer,
    asked: { start: number; end: number } | undefined,
    size: number,
  ): void {
    if (asked === undefined) {
      const length = headers.get("content-length");
      if (status !== 200)
        throw new PassingFault(`the server answered ${status} though no range was asked for`);
      if (length !== null && Number(length) !== size) {
        throw new PassingFault(`the server offers ${length} bytes where the list of files says ${size}`);
      }
      return;
    }
    if (status === 200) {
      this.#mode = "whole";
      this.#restart = true;
      throw new Superseded("the server does not know ranges");
    }
    const wanted = `bytes ${asked.start}-${asked.end - 1}/${size}`;
    const got = headers.get("content-range")?.trim();
    if (got !== wanted) throw new PassingFault(`the server answered range "${got}" to "${wanted}"`);
  }

  /** Reads `expected` bytes into `sink`. Throws PassingFault when fewer come; more are not taken. */
  async #receive(
    transfer: Transfer,
    expected: number,
    sink: (bytes: Uint8Array) => Promise<void>,
  ): Promise<void> {
    let received = 0;
    try {
      for await (const bytes of transfer.body) {
        if (this.#restart) throw new Superseded();
        const taken = bytes.subarray(0, expected - received);
        await sink(taken);
        received += taken.byteLength;
        this.#options.onBytes(this.file, taken.byteLength);
        if (taken.byteLength < bytes.byteLength)
          throw this.#distrust("the server sent more than was asked for");
      }
    } finally {
      transfer.close();
    }
    if (received < expected)
      throw new PassingFault(`the connection ended ${expected - received} bytes early`);
  }

  async #finish(part: PartFile): Promise<void> {
    const { kind, hash, path } = this.file;
    const got = await part.hash(kind, this.#options.signal);
    if (got !== hash) {
      const name = kind === "git" ? "git hash" : "sha256";
      throw this.#distrust(`the ${name} of ${path} is ${got.slice(0, 12)}…, not ${hash.slice(0, 12)}…`);
    }
    await part.finish(this.#blob);
    this.#finished = true;
  }
}

/** Whether the file lies in blobs/ already. */
export function hasBlob(repo: string, file: PlannedFile): boolean {
  return existsSync(blobFile(repo, file.hash));
}
