// libcaravan's functions (native/include/caravan.h) as typed calls: the only file that imports bun:ffi.
// Nothing is interpreted here; load plans, steps and results are bytes (see layout.ts and its neighbours).

import { dlopen, FFIType, type Pointer } from "bun:ffi";
import { CaravanError, type CaravanErrorOptions, type ErrorCode } from "../errors.ts";
import { withLibrary } from "./library.ts";

/** CV_ABI_VERSION that this program was written for. */
const ABI_VERSION = 3;
/** A line of about a hundred bytes for each device. */
const RDMA_LIST_BYTES = 8192;
const ERROR_BYTES = 1024;
const STATS_BYTES = 88;

/** How often loading is looked at: at once for small models, rarely for large ones. Milliseconds. */
const FIRST_POLL_MS = 1;
const LAST_POLL_MS = 50;

const CV_E_ARGUMENT = -1;
const CV_E_AGAIN = -6;
const CV_E_ABORTED = -8;
const CV_E_BUFFER = -9;
const CV_E_GROUP = -11;

const CODES: Record<number, ErrorCode> = {
  [-1]: "internal_error",
  [-2]: "bad_file",
  [-3]: "bad_file",
  [-4]: "out_of_memory",
  [-5]: "unsupported_model",
  [-7]: "internal_error",
  [CV_E_ABORTED]: "engine_failed",
  [-10]: "engine_failed",
  [CV_E_GROUP]: "cluster_degraded",
};

const {
  ptr,
  usize,
  u64,
  u32,
  i32,
  void: nothing,
  cstring,
} = {
  ptr: FFIType.ptr,
  usize: FFIType.u64,
  u64: FFIType.u64,
  u32: FFIType.u32,
  i32: FFIType.i32,
  void: FFIType.void,
  cstring: FFIType.cstring,
} as const;

const FUNCTIONS = {
  cv_abi: { args: [], returns: u32 },
  cv_layout: { args: [ptr, usize], returns: FFIType.u64_fast },
  cv_cpu_best: { args: [], returns: u32 },
  cv_cpu_name: { args: [u32], returns: cstring },
  cv_cpu_note: { args: [], returns: cstring },
  cv_metal_info: { args: [ptr, usize, ptr, usize], returns: i32 },
  cv_metal_selftest: { args: [u32, u32, ptr, usize, ptr, usize], returns: i32 },
  cv_metal_speed: { args: [u32, u64, ptr, usize, ptr, usize], returns: i32 },
  cv_metal_hand_over_times: { args: [ptr, usize, ptr, usize], returns: i32 },
  cv_performance_cores: { args: [], returns: u32 },
  cv_stay_awake: { args: [ptr, ptr, ptr, usize], returns: i32 },
  cv_may_sleep: { args: [u32], returns: nothing },
  cv_measure_bandwidth: { args: [u64, u32, ptr], returns: i32 },
  cv_measure_int8: { args: [u32, u32, ptr], returns: i32 },
  cv_open: { args: [ptr, usize, ptr, ptr, ptr, usize], returns: i32 },
  cv_load_start: { args: [ptr, usize, ptr, ptr, ptr, usize], returns: i32 },
  cv_load_poll: { args: [ptr, ptr, ptr, ptr, usize], returns: i32 },
  cv_load_cancel: { args: [ptr], returns: nothing },
  cv_event_fd: { args: [ptr], returns: i32 },
  cv_follow_state: { args: [ptr, ptr, usize], returns: i32 },
  cv_submit: { args: [ptr, ptr, usize, ptr, ptr, usize], returns: i32 },
  cv_give_masks: { args: [ptr, u64, u32, ptr, usize, ptr, usize], returns: i32 },
  cv_collect: { args: [ptr, u64, ptr, usize, ptr, ptr, usize], returns: i32 },
  cv_abort: { args: [ptr], returns: nothing },
  cv_stats: { args: [ptr, ptr], returns: i32 },
  cv_close: { args: [ptr], returns: nothing },
  cv_group_open: { args: [ptr, usize, ptr, ptr, ptr, ptr, usize], returns: i32 },
  cv_group_connect_start: { args: [ptr, ptr, ptr, u32, ptr, usize], returns: i32 },
  cv_group_connect_poll: { args: [ptr, ptr, usize, ptr, usize], returns: i32 },
  cv_group_measure: { args: [ptr, u32, ptr, ptr, ptr, usize], returns: i32 },
  cv_rdma_devices: { args: [ptr, usize, ptr, usize], returns: i32 },
  cv_group_abort: { args: [ptr, ptr], returns: nothing },
  cv_group_stats: { args: [ptr, ptr, ptr, usize], returns: i32 },
  cv_group_close: { args: [ptr], returns: nothing },
} as const;

/** A cv_group (group.ts). */
export type GroupPointer = Pointer;

type Symbols = ReturnType<typeof dlopen<typeof FUNCTIONS>>["symbols"];

/** cv_stats_record. Bytes and nanoseconds. */
export interface NativeStats {
  weightsMapped: number;
  weightsCopied: number;
  kvBytes: number;
  scratchBytes: number;
  steps: number;
  tokens: number;
  computeNs: number;
  kernelNs: number;
  /** Exchanging with other ranks, and waiting for them. */
  exchangeNs: number;
  threads: number;
  cpuLevel: number;
}

/** Outcome of `collect`: the result's bytes are a view that the next `collect` overwrites. */
export type Collected =
  | { state: "running" }
  | { state: "done"; result: Uint8Array }
  /** over: the engine takes no further steps. */
  | { state: "failed"; error: CaravanError; over: boolean };

let loaded: Symbols | undefined;

/** Loads the library once a process. Throws engine_failed when it is missing or of another version. */
function library(): Symbols {
  if (loaded === undefined)
    loaded = withLibrary((path) => {
      const { symbols } = dlopen(path, FUNCTIONS);
      const abi = symbols.cv_abi();
      if (abi !== ABI_VERSION)
        throw new CaravanError(
          "engine_failed",
          `the C library has interface version ${abi}, not ${ABI_VERSION}`,
          {
            where: path,
            hint: "build both again with `make`",
          },
        );
      checkCpuLimit(symbols);
      return symbols;
    });
  return loaded;
}

/** CV_CPU_* of caravan.h. */
const AVX512_VNNI = 4;
const AMX = 5;
const CPU_LEVELS: readonly number[] = [1, 2, 3, AVX512_VNNI, AMX, 16, 17, 18];

/** The C library takes CARAVAN_CPU as the highest kernel set; a name that it does not know would limit nothing. */
function checkCpuLimit({ cv_cpu_name }: Symbols): void {
  const name = process.env.CARAVAN_CPU ?? "";
  const names = CPU_LEVELS.map((level) => String(cv_cpu_name(level)));
  if (name === "" || names.includes(name)) return;
  throw new CaravanError("invalid_argument", `there is no kernel set "${name}"`, {
    where: "CARAVAN_CPU",
    hint: `the sets are ${names.join(", ")}`,
  });
}

/** cv_group_* for group.ts. */
export function groupFunctions(): Symbols {
  return library();
}

/** This machine's RDMA devices as lines (cv_rdma_devices). May never come back where a port is wedged. Throws with the reason where the
 * system has no library for them. */
export function rdmaDeviceLines(): string {
  const out = new Uint8Array(RDMA_LIST_BYTES);
  const error = new Uint8Array(ERROR_BYTES);
  const code = library().cv_rdma_devices(out, out.length, error, error.length);
  if (code !== 0) throw nativeError(code, error, "listing RDMA devices");
  return text(out);
}

/** "record.field=offset,size" for every record of caravan.h, one a line. */
export function nativeLayout(): string {
  const { cv_layout } = library();
  const bytes = new Uint8Array(Number(cv_layout(new Uint8Array(1), 0)) + 1);
  cv_layout(bytes, bytes.length);
  return text(bytes);
}

/** The best CPU kernel set of this machine: number and name, and why a better one that the processor has is not used. */
export function bestCpu(): { level: number; name: string; note?: string } {
  const level = library().cv_cpu_best();
  const note = String(library().cv_cpu_note());
  return { level, name: cpuName(level), ...(note === "" ? {} : { note }) };
}

export function cpuName(level: number): string {
  return String(library().cv_cpu_name(level));
}

/** Names of all kernel sets of all processors. */
export function cpuNames(): string[] {
  return CPU_LEVELS.map(cpuName);
}

export function cpuLevel(name: string): number | undefined {
  return CPU_LEVELS.find((level) => cpuName(level) === name);
}

/** Lines "key=value" about the GPU (cv_metal_info). Throws with the reason where there is no Metal device. */
export function metalDescription(): string {
  const out = new Uint8Array(ERROR_BYTES);
  const error = new Uint8Array(ERROR_BYTES);
  const code = library().cv_metal_info(out, out.length, error, error.length);
  if (code !== 0) throw nativeError(code, error, "asking for a Metal device");
  return text(out);
}

/** Lines about one case of the GPU's self-test, undefined past the last. Blocks while it runs. */
export function metalSelftest(index: number, hasBfloat: boolean): string | undefined {
  return metalLines((out, error) =>
    library().cv_metal_selftest(index, hasBfloat ? 1 : 0, out, out.length, error, error.length),
  );
}

/** Lines about the speed of one kernel over a matrix of about `bytes`, undefined past the last. Blocks. */
export function metalSpeed(index: number, bytes: number): string | undefined {
  return metalLines((out, error) =>
    library().cv_metal_speed(index, Math.round(bytes), out, out.length, error, error.length),
  );
}

/** Lines about how long GPU and host take to hand over to each other. Blocks. */
export function metalHandOvers(): string {
  return (
    metalLines((out, error) => library().cv_metal_hand_over_times(out, out.length, error, error.length)) ?? ""
  );
}

function metalLines(call: (out: Uint8Array, error: Uint8Array) => number): string | undefined {
  const out = new Uint8Array(ERROR_BYTES);
  const error = new Uint8Array(ERROR_BYTES);
  const code = call(out, error);
  if (code === CV_E_ARGUMENT) return undefined;
  if (code !== 0) throw nativeError(code, error, "testing the GPU");
  return text(out);
}

/** Cores of a Mac that compute threads should use; 0 elsewhere. */
export function performanceCores(): number {
  return library().cv_performance_cores();
}

/** Keeps a Mac from sleeping while idle; gives the function that ends it. Throws where that is not possible. */
export function stayAwake(why: string): () => void {
  const symbols = library();
  const assertion = new Uint32Array(1);
  const error = new Uint8Array(ERROR_BYTES);
  const code = symbols.cv_stay_awake(new TextEncoder().encode(`${why}\0`), assertion, error, error.length);
  if (code !== 0) throw nativeError(code, error, "asking the system not to sleep");
  return () => symbols.cv_may_sleep(assertion[0] ?? 0);
}

/** Bytes a second that `threads` read of a buffer of `bytes`, which is allocated. Blocks for about a second. */
export function measureBandwidth(bytes: number, threads: number): number {
  const out = new Float64Array(1);
  const code = library().cv_measure_bandwidth(Math.round(bytes), threads, out);
  if (code !== 0)
    throw new CaravanError(CODES[code] ?? "engine_failed", `cannot measure reading ${bytes} bytes`);
  return out[0] ?? 0;
}

/** int8 multiply-adds a second of a kernel set, the machine's best unless `level` says which; undefined where it has no int8
 * instruction of its own. Blocks for a moment. */
export function measureInt8(threads: number, level = 0): number | undefined {
  const out = new Float64Array(1);
  return library().cv_measure_int8(level, threads, out) === 0 ? out[0] : undefined;
}

/** The same without AMX: what predictions of prompts scale from. What of its tiles' peak, sixteen times as high, a prompt gets was not measured. */
export function measureVectorInt8(threads: number): number | undefined {
  return measureInt8(threads, library().cv_cpu_best() === AMX ? AVX512_VNNI : 0);
}

/** An open engine. Not to be used after `close`. */
export class EngineHandle {
  readonly #symbols: Symbols;
  readonly #error = new Uint8Array(ERROR_BYTES);
  /** Out-parameters: a u64 as two halves, so that no BigInt is made for every step. */
  readonly #out = new Uint32Array(2);
  #engine: Pointer | null;
  #result = new Uint8Array(1 << 14);

  private constructor(symbols: Symbols, engine: Pointer) {
    this.#symbols = symbols;
    this.#engine = engine;
  }

  /** Opens an engine from a load plan's bytes (not kept). Blocks while weights are mapped or read. `group`: a connected
   * cv_group that outlives the engine, for a model on several ranks. */
  static open(plan: Uint8Array, group: Pointer | null = null): EngineHandle {
    const symbols = library();
    const error = new Uint8Array(ERROR_BYTES);
    const out = new BigUint64Array(1);
    const code = symbols.cv_open(plan, plan.byteLength, group, out, error, error.length);
    if (code !== 0) throw nativeError(code, error, "loading the model");
    return new EngineHandle(symbols, Number(out[0] ?? 0n) as Pointer);
  }

  /** Opens an engine in a thread of the library: the event loop stays free. `onBytes` hears how many bytes of weights
   * are in place; aborting the signal stops loading. Throws what cv_open would. */
  static async load(
    plan: Uint8Array,
    onBytes: (done: number) => void = () => {},
    signal?: AbortSignal,
    group: Pointer | null = null,
  ): Promise<EngineHandle> {
    const symbols = library();
    const error = new Uint8Array(ERROR_BYTES);
    const out = new BigUint64Array(2);
    const started = symbols.cv_load_start(plan, plan.byteLength, group, out, error, error.length);
    if (started !== 0) throw nativeError(started, error, "loading the model");
    const loader = Number(out[0] ?? 0n) as Pointer;
    const done = out.subarray(0, 1);
    const engine = out.subarray(1, 2);
    for (let pauseMs = FIRST_POLL_MS; ; pauseMs = Math.min(pauseMs * 2, LAST_POLL_MS)) {
      if (signal?.aborted) symbols.cv_load_cancel(loader);
      const code = symbols.cv_load_poll(loader, done, engine, error, error.length);
      if (code === 0) return new EngineHandle(symbols, Number(engine[0] ?? 0n) as Pointer);
      if (code !== CV_E_AGAIN) throw nativeError(code, error, "loading the model");
      onBytes(Number(done[0] ?? 0n));
      await Bun.sleep(pauseMs);
    }
  }

  /** Readable end of a pipe: a byte for each step that ended. Owned by the engine. */
  eventDescriptor(): number {
    return this.#symbols.cv_event_fd(this.#live());
  }

  /** Queues a step (copied) and gives its ticket. Never blocks. */
  submit(step: Uint8Array): number {
    const { cv_submit } = this.#symbols;
    const code = cv_submit(this.#live(), step, step.byteLength, this.#out, this.#error, ERROR_BYTES);
    if (code !== 0) throw nativeError(code, this.#error, "submitting a step", again(code));
    return this.#number();
  }

  /** The masks of a row that waits for them (copied); null: its sample does not matter any more. Nothing for a step that has
   * ended. */
  giveMasks(ticket: number, row: number, masks: Uint32Array | null): void {
    const { cv_give_masks } = this.#symbols;
    const size = masks?.byteLength ?? 0;
    const code = cv_give_masks(this.#live(), ticket, row, masks, size, this.#error, ERROR_BYTES);
    if (code !== 0) throw nativeError(code, this.#error, "giving masks to a step");
  }

  /** Of a rank > 0: undefined while it follows rank 0, then "closed" when rank 0 has closed its engine, or why it failed. */
  followState(): "closed" | CaravanError | undefined {
    const code = this.#symbols.cv_follow_state(this.#live(), this.#error, ERROR_BYTES);
    if (code === CV_E_AGAIN) return undefined;
    return code === 0 ? "closed" : nativeError(code, this.#error, "following rank 0");
  }

  /** The outcome of a ticket, once. */
  collect(ticket: number): Collected {
    let code = this.#collect(ticket);
    if (code === CV_E_BUFFER) {
      this.#result = new Uint8Array(Math.max(this.#number(), this.#result.length * 2));
      code = this.#collect(ticket);
    }
    if (code === 0) return { state: "done", result: this.#result.subarray(0, this.#number()) };
    if (code === CV_E_AGAIN) return { state: "running" };
    const error = nativeError(code, this.#error, "computing a step", again(code));
    return { state: "failed", error, over: code === CV_E_ABORTED || code === CV_E_GROUP };
  }

  /** Ends the running and the queued steps as soon as possible; the engine takes no more. */
  abort(): void {
    if (this.#engine !== null) this.#symbols.cv_abort(this.#engine);
  }

  stats(): NativeStats {
    const record = new Uint8Array(STATS_BYTES);
    const code = this.#symbols.cv_stats(this.#live(), record);
    if (code !== 0)
      throw new CaravanError("internal_error", `error ${code} while reading the engine's statistics`);
    const bytes = new DataView(record.buffer);
    const long = (index: number): number => Number(bytes.getBigUint64(index * 8, true));
    return {
      weightsMapped: long(0),
      weightsCopied: long(1),
      kvBytes: long(2),
      scratchBytes: long(3),
      steps: long(4),
      tokens: long(5),
      computeNs: long(6),
      kernelNs: long(7),
      exchangeNs: long(8),
      threads: bytes.getUint32(80, true),
      cpuLevel: bytes.getUint32(84, true),
    };
  }

  /** Aborts, waits for the compute thread, frees everything. Idempotent. */
  close(): void {
    if (this.#engine === null) return;
    this.#symbols.cv_close(this.#engine);
    this.#engine = null;
  }

  #collect(ticket: number): number {
    const { cv_collect } = this.#symbols;
    return cv_collect(
      this.#live(),
      ticket,
      this.#result,
      this.#result.length,
      this.#out,
      this.#error,
      ERROR_BYTES,
    );
  }

  #number(): number {
    return (this.#out[0] ?? 0) + (this.#out[1] ?? 0) * 0x1_0000_0000;
  }

  #live(): Pointer {
    if (this.#engine === null) throw new CaravanError("internal_error", "the engine is closed");
    return this.#engine;
  }
}

/** A group that has failed is made anew by the next request. */
function again(code: number): CaravanErrorOptions {
  if (code !== CV_E_GROUP) return {};
  return {
    hint: "send the request again; the model's ranks are started again",
    retryAfterSeconds: 2,
  };
}

export function nativeError(
  code: number,
  error: Uint8Array,
  doing: string,
  options: CaravanErrorOptions = {},
): CaravanError {
  const said = text(error);
  return new CaravanError(
    CODES[code] ?? "engine_failed",
    said === "" ? `error ${code} while ${doing}` : said,
    options,
  );
}

/** Zero-terminated UTF-8. */
export function text(bytes: Uint8Array): string {
  const end = bytes.indexOf(0);
  return new TextDecoder().decode(end < 0 ? bytes : bytes.subarray(0, end));
}
