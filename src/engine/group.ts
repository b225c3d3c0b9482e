// The ranks that compute one model together (cv_group of caravan.h): this rank's end of them. Opening listens and gives an
// address; connecting needs the addresses of all ranks and happens on all of them at the same time. The first failure on
// any rank is the end of the group on every rank.

import { CaravanError } from "../errors.ts";
import { type GroupPointer, groupFunctions, nativeError, text } from "./binding.ts";
import { ABI_VERSION, GROUP_OPTIONS, GROUP_STATS } from "./layout.ts";
import type { Connection, GroupOptions, LinkMeasure } from "./rank-protocol.ts";

const ADDRESS_BYTES = 4096;
const TEXT_BYTES = 1024;
const TRANSPORTS = { auto: 0, shm: 1, rdma: 2, tcp: 3 } as const;
/** CV_RDMA_*. */
const RDMA_FLAGS = { uc: 1, rc: 2, "uc-apple-rules": 5 } as const;
const CV_E_AGAIN = -6;
const POLL_MS = 2;

export interface GroupStats {
  failed: boolean;
  /** All-reduces so far, their time in nanoseconds, and the bytes of this rank's vectors. */
  reduces: number;
  reduceNs: number;
  reduceBytes: number;
  messages: number;
  messageBytes: number;
  /** Spent on MACs and checksums. */
  macNs: number;
  roundTripUs: number;
  transport: "auto" | "shm" | "rdma" | "tcp";
}

export class RankGroup {
  readonly pointer: GroupPointer;
  /** Opaque bytes for the other ranks. */
  readonly address: Uint8Array;
  #closed = false;

  private constructor(pointer: GroupPointer, address: Uint8Array) {
    this.pointer = pointer;
    this.address = address;
  }

  /** Listens for the other ranks. Throws what cv_group_open said. */
  static open(options: GroupOptions): RankGroup {
    const address = new Uint8Array(ADDRESS_BYTES);
    const size = new BigUint64Array([BigInt(ADDRESS_BYTES)]);
    const out = new BigUint64Array(1);
    const error = new Uint8Array(TEXT_BYTES);
    const bytes = encode(options);
    const { cv_group_open } = groupFunctions();
    const code = cv_group_open(bytes, bytes.length, address, size, out, error, error.length);
    if (code !== 0) throw nativeError(code, error, "opening a group of ranks");
    return new RankGroup(Number(out[0] ?? 0n) as GroupPointer, address.slice(0, Number(size[0] ?? 0n)));
  }

  /** Connects to all ranks and votes for a transport. addresses: of all ranks, this one's too, in order. */
  async connect(addresses: readonly Uint8Array[], timeoutMs: number): Promise<Connection> {
    const { cv_group_connect_start, cv_group_connect_poll } = groupFunctions();
    const error = new Uint8Array(TEXT_BYTES);
    const note = new Uint8Array(TEXT_BYTES);
    const all = new Uint8Array(Buffer.concat(addresses));
    const sizes = BigUint64Array.from(addresses.map((each) => BigInt(each.length)));
    const started = cv_group_connect_start(this.pointer, all, sizes, timeoutMs, error, error.length);
    if (started !== 0) throw nativeError(started, error, "connecting the ranks");
    for (;;) {
      const code = cv_group_connect_poll(this.pointer, note, note.length, error, error.length);
      if (code === 0) break;
      if (code !== CV_E_AGAIN) throw nativeError(code, error, "connecting the ranks");
      await Bun.sleep(POLL_MS);
    }
    const { transport, roundTripUs } = this.stats();
    if (transport === "auto")
      throw new CaravanError("engine_failed", "the ranks are connected by no transport");
    return { transport, note: text(note), round_trip_us: roundTripUs };
  }

  /** What the connection of two ranks gives; the other one measures at the same time. Blocks for about mostMs. */
  measure(mostMs: number): LinkMeasure {
    const error = new Uint8Array(TEXT_BYTES);
    const out = new Float64Array(2);
    const { cv_group_measure } = groupFunctions();
    const code = cv_group_measure(
      this.pointer,
      mostMs,
      out.subarray(0, 1),
      out.subarray(1),
      error,
      error.length,
    );
    if (code !== 0) throw nativeError(code, error, "measuring a connection");
    return { roundTripUs: out[0] ?? 0, bandwidth: out[1] ?? 0 };
  }

  /** Ends every call of this rank and tells the others. */
  abort(why: string): void {
    if (!this.#closed) groupFunctions().cv_group_abort(this.pointer, new TextEncoder().encode(`${why}\0`));
  }

  /** The first failure as a sentence that names the rank; undefined while the group lives. */
  failure(): string | undefined {
    const { record, failure } = this.#read();
    const failed = new DataView(record.buffer).getUint32(GROUP_STATS.failed, true) !== 0;
    return failed ? failure || "the ranks of the model have lost each other" : undefined;
  }

  stats(): GroupStats {
    const { record } = this.#read();
    const view = new DataView(record.buffer);
    const long = (at: number): number => Number(view.getBigUint64(at, true));
    const [transport = "auto"] = Object.entries(TRANSPORTS).find(
      ([, number]) => number === view.getUint32(GROUP_STATS.transport, true),
    ) ?? ["auto"];
    return {
      transport: transport as GroupStats["transport"],
      failed: view.getUint32(GROUP_STATS.failed, true) !== 0,
      reduces: long(GROUP_STATS.reduces),
      reduceNs: long(GROUP_STATS.reduce_ns),
      reduceBytes: long(GROUP_STATS.reduce_bytes),
      messages: long(GROUP_STATS.messages),
      messageBytes: long(GROUP_STATS.message_bytes),
      macNs: long(GROUP_STATS.mac_ns),
      roundTripUs: view.getUint32(GROUP_STATS.round_trip_us, true),
    };
  }

  #read(): { record: Uint8Array<ArrayBuffer>; failure: string } {
    const record = new Uint8Array(GROUP_STATS.size);
    const error = new Uint8Array(TEXT_BYTES);
    const code = groupFunctions().cv_group_stats(this.pointer, record, error, error.length);
    if (code !== 0) throw nativeError(code, error, "reading a group's statistics");
    return { record, failure: text(error) };
  }

  /** Close the engine that uses the group first. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    groupFunctions().cv_group_close(this.pointer);
  }
}

function encode(options: GroupOptions): Uint8Array {
  const bytes = new Uint8Array(GROUP_OPTIONS.size);
  const view = new DataView(bytes.buffer);
  const u32 = (at: number, value: number) => view.setUint32(at, value, true);
  u32(GROUP_OPTIONS.version, ABI_VERSION);
  u32(GROUP_OPTIONS.rank, options.rank);
  u32(GROUP_OPTIONS.ranks, options.size);
  u32(GROUP_OPTIONS.transport, TRANSPORTS[options.transport]);
  view.setBigUint64(GROUP_OPTIONS.epoch, BigInt(options.epoch), true);
  bytes.set(Buffer.from(options.key, "hex"), GROUP_OPTIONS.key);
  bytes.set(Buffer.from(options.instance, "hex"), GROUP_OPTIONS.instance);
  bytes.set(new TextEncoder().encode(options.host ?? "").subarray(0, 255), GROUP_OPTIONS.host);
  bytes.set(new TextEncoder().encode(options.rdmaDevice ?? "").subarray(0, 511), GROUP_OPTIONS.rdma_device);
  bytes.set(new TextEncoder().encode(options.noRdma ?? "").subarray(0, 199), GROUP_OPTIONS.no_rdma);
  u32(GROUP_OPTIONS.silence_ms, options.silenceMs ?? 0);
  u32(
    GROUP_OPTIONS.rdma_flags,
    options.rdmaQueuePairs === undefined ? 0 : RDMA_FLAGS[options.rdmaQueuePairs],
  );
  return bytes;
}
