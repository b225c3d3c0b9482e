// Frames over one TLS connection: a length, a kind, and a JSON value or bytes. Sizes are bounded before anything is
// kept, what waits to be read is bounded, every wait has a deadline, and the first malformed byte ends the connection.

import type { TLSSocket } from "node:tls";
import { CaravanError } from "../../errors.ts";

/** 4 bytes of length (big-endian, of what follows the kind), 1 byte of kind. */
const HEADER_BYTES = 5;
const JSON_KIND = 1;
const BYTES_KIND = 2;

/** Largest JSON frame between members. */
export const MAX_JSON_BYTES = 1024 * 1024;
/** Largest JSON frame of somebody who has proved nothing yet. */
export const MAX_STRANGER_JSON_BYTES = 4 * 1024;
/** Largest frame of bytes; longer data is cut into several. */
export const MAX_BYTES_FRAME = 256 * 1024;
/** Frames that wait for a reader; above it the socket is not read. */
const MAX_WAITING_BYTES = 4 * MAX_BYTES_FRAME;

export type Frame = { kind: "json"; value: unknown } | { kind: "bytes"; bytes: Uint8Array };

export interface ChannelOptions {
  /** Called once when the other side broke the rules of this file. */
  onMalformed?: (reason: string) => void;
}

/** Time in which bytes that have come already are read before a wait for them ends. */
const READ_FIRST_MS = 20;

export class Channel {
  readonly socket: TLSSocket;
  /** Resolves when the connection is over, with why; never rejects. */
  readonly closed: Promise<CaravanError>;
  #maxJson = MAX_STRANGER_JSON_BYTES;
  #bytesAllowed = false;
  #received: Buffer[] = [];
  #receivedBytes = 0;
  readonly #frames: { frame: Frame; size: number }[] = [];
  #waitingBytes = 0;
  #reader: { resolve: (frame: Frame | undefined) => void; reject: (error: unknown) => void } | undefined;
  #end: CaravanError | undefined;
  /** The other side ended its half in order. */
  #finished = false;
  #settleClosed: (why: CaravanError) => void;
  readonly #drained = new Set<() => void>();
  readonly #onMalformed: ((reason: string) => void) | undefined;
  #paused = false;

  constructor(socket: TLSSocket, options: ChannelOptions = {}) {
    this.socket = socket;
    this.#onMalformed = options.onMalformed;
    const { promise, resolve } = Promise.withResolvers<CaravanError>();
    this.closed = promise;
    this.#settleClosed = resolve;
    socket.setNoDelay(true);
    socket.on("data", (chunk: Buffer) => this.#receive(chunk));
    socket.on("drain", () => this.#wakeWriters());
    socket.on("end", () => {
      this.#finished = true;
      this.#over(lost("the other side closed the connection"));
    });
    socket.on("error", (error) => this.#over(lost(error.message)));
    socket.on("close", () => this.#over(lost("the connection was closed")));
  }

  /** The other side has proved that it is a member: larger frames, and bytes. */
  trust(): void {
    this.#maxJson = MAX_JSON_BYTES;
    this.#bytesAllowed = true;
  }

  get open(): boolean {
    return this.#end === undefined;
  }

  /** Bytes that the system has not taken yet. */
  get unsentBytes(): number {
    return this.socket.writableLength;
  }

  /** Queues a JSON frame; nothing happens on a connection that is over (`closed` tells). Throws invalid_argument when it is too large. */
  send(value: unknown): void {
    const payload = Buffer.from(JSON.stringify(value));
    if (payload.length > MAX_JSON_BYTES)
      throw new CaravanError("internal_error", `a message of ${payload.length} bytes is too large to send`);
    this.#write(JSON_KIND, payload);
  }

  /** Sends bytes of any length; resolves when there is room for more, rejects when the connection is over. */
  async sendBytes(bytes: Uint8Array): Promise<void> {
    for (let start = 0; start < bytes.length; start += MAX_BYTES_FRAME) {
      const full = !this.#write(BYTES_KIND, bytes.subarray(start, start + MAX_BYTES_FRAME));
      if (full) await this.#room();
      if (this.#end !== undefined) throw this.#end;
    }
  }

  /**
   * The next frame; undefined when the other side ended the connection in order and everything is read. Rejects with
   * deadline_exceeded after `limitMs` (the connection is then closed), and with why the connection broke. One reader at a time.
   */
  read(limitMs?: number): Promise<Frame | undefined> {
    const next = this.#frames.shift();
    if (next !== undefined) {
      this.#waitingBytes -= next.size;
      this.#resumeIfRoom();
      return Promise.resolve(next.frame);
    }
    if (this.#end !== undefined)
      return this.#finished ? Promise.resolve(undefined) : Promise.reject(this.#end);
    if (this.#reader !== undefined)
      return Promise.reject(new CaravanError("internal_error", "a connection has one reader"));
    return new Promise((resolve, reject) => {
      let timer: ReturnType<typeof setTimeout> | undefined;
      this.#reader = {
        resolve: (frame) => {
          clearTimeout(timer);
          resolve(frame);
        },
        reject: (error) => {
          clearTimeout(timer);
          reject(error);
        },
      };
      if (limitMs === undefined) return;
      const late = () =>
        this.close(
          new CaravanError("deadline_exceeded", `the other node answered nothing for ${limitMs} ms`),
        );
      // What came while this process stood still is read first.
      timer = setTimeout(() => {
        timer = setTimeout(late, READ_FIRST_MS);
      }, limitMs);
    });
  }

  /** The next frame, which has to be JSON. */
  async readJson(limitMs?: number): Promise<unknown> {
    const frame = await this.read(limitMs);
    if (frame?.kind === "json") return frame.value;
    throw this.#end ?? lost(frame === undefined ? "the other side closed the connection" : "bytes came");
  }

  /** Lets what was sent leave, then closes. */
  finish(): void {
    if (this.#end !== undefined) return;
    this.socket.end();
    this.#over(lost("this side closed the connection"));
  }

  /** Closes at once. */
  close(why: CaravanError = lost("this side closed the connection")): void {
    this.#over(why);
    this.socket.destroy();
  }

  #write(kind: number, payload: Uint8Array): boolean {
    if (this.#end !== undefined) return true;
    const frame = Buffer.allocUnsafe(HEADER_BYTES + payload.length);
    frame.writeUInt32BE(payload.length, 0);
    frame[4] = kind;
    frame.set(payload, HEADER_BYTES);
    return this.socket.write(frame);
  }

  #room(): Promise<void> {
    return new Promise((resolve) => this.#drained.add(resolve));
  }

  #wakeWriters(): void {
    for (const wake of this.#drained) wake();
    this.#drained.clear();
  }

  #receive(chunk: Buffer): void {
    if (this.#end !== undefined) return;
    this.#received.push(chunk);
    this.#receivedBytes += chunk.length;
    while (this.#end === undefined && this.#receivedBytes >= HEADER_BYTES) {
      const head = this.#peek(HEADER_BYTES);
      const size = head.readUInt32BE(0);
      const kind = head[4];
      const most =
        kind === JSON_KIND ? this.#maxJson : kind === BYTES_KIND && this.#bytesAllowed ? MAX_BYTES_FRAME : -1;
      if (size > most) {
        this.#malformed(most < 0 ? `a frame of unknown kind ${kind}` : `a frame of ${size} bytes`);
        return;
      }
      if (this.#receivedBytes < HEADER_BYTES + size) return;
      const payload = this.#take(HEADER_BYTES + size).subarray(HEADER_BYTES);
      this.#deliver(kind === JSON_KIND ? this.#parse(payload) : { kind: "bytes", bytes: payload }, size);
    }
  }

  #parse(payload: Buffer): Frame | undefined {
    try {
      return { kind: "json", value: JSON.parse(payload.toString("utf8")) };
    } catch {
      this.#malformed("a message that is not JSON");
      return undefined;
    }
  }

  #deliver(frame: Frame | undefined, size: number): void {
    if (frame === undefined) return;
    const reader = this.#reader;
    if (reader !== undefined) {
      this.#reader = undefined;
      reader.resolve(frame);
      return;
    }
    this.#frames.push({ frame, size: size + HEADER_BYTES });
    this.#waitingBytes += size + HEADER_BYTES;
    if (this.#waitingBytes > MAX_WAITING_BYTES && !this.#paused) {
      this.#paused = true;
      this.socket.pause();
    }
  }

  #resumeIfRoom(): void {
    if (!this.#paused || this.#waitingBytes > MAX_WAITING_BYTES / 2) return;
    this.#paused = false;
    this.socket.resume();
  }

  /** The first `count` received bytes, which stay; joins as few chunks as needed. */
  #peek(count: number): Buffer {
    const first = this.#received[0];
    if (first !== undefined && first.length >= count) return first;
    const all = Buffer.concat(this.#received);
    this.#received = [all];
    return all;
  }

  #take(count: number): Buffer {
    const all = this.#peek(count);
    const rest = all.subarray(count);
    if (rest.length === 0) this.#received.shift();
    else this.#received[0] = rest;
    this.#receivedBytes -= count;
    return all.subarray(0, count);
  }

  #malformed(reason: string): void {
    this.#onMalformed?.(reason);
    this.close(lost(`the other side sent ${reason}`));
  }

  #over(why: CaravanError): void {
    if (this.#end !== undefined) return;
    this.#end = why;
    this.#received = [];
    this.#receivedBytes = 0;
    this.#wakeWriters();
    this.#settleClosed(why);
    const reader = this.#reader;
    this.#reader = undefined;
    if (this.#finished) reader?.resolve(undefined);
    else reader?.reject(why);
    // A half-open connection has no use here.
    if (this.#finished) this.socket.end();
  }
}

function lost(reason: string): CaravanError {
  return new CaravanError("cluster_degraded", `the connection to another node is over: ${reason}`, {
    retryAfterSeconds: 1,
  });
}
