// Reads safetensors headers: which tensor lies where in which file, checked against the file before anyone maps
// it. Nothing here reads tensor data. The format: 8 bytes little-endian header length, a JSON object
// {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {string: string}}, then the data.

import { type FileHandle, open } from "node:fs/promises";
import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import { findDuplicateKey } from "./duplicate-keys.ts";

/** Bytes of one element, for every dtype that is accepted. */
export const DTYPE_BYTES = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
  I16: 2,
  U16: 2,
  F16: 2,
  BF16: 2,
  I32: 4,
  U32: 4,
  F32: 4,
  F64: 8,
  I64: 8,
  U64: 8,
} as const;

export type Dtype = keyof typeof DTYPE_BYTES;

export interface TensorInfo {
  dtype: Dtype;
  /** Outermost first; [] is a scalar. */
  shape: number[];
  /** From the start of the file, in bytes. */
  offset: number;
  sizeBytes: number;
}

export interface SafetensorsHeader {
  path: string;
  /** Of the whole file. */
  sizeBytes: number;
  /** Where the data begins: 8 + header length. */
  dataStart: number;
  metadata: ReadonlyMap<string, string>;
  tensors: ReadonlyMap<string, TensorInfo>;
}

/** 200,000 tensors; the reference implementation takes up to 100 MB, which nobody writes but to make readers stall. */
export const MAX_HEADER_BYTES = 32 * 1024 * 1024;
const MAX_RANK = 16;

const Size = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const Entry = v.object({
  dtype: v.string(),
  shape: v.pipe(v.array(Size), v.maxLength(MAX_RANK)),
  data_offsets: v.strictTuple([Size, Size]),
});
const Metadata = v.record(v.string(), v.string());

/**
 * Reads and checks the header of one file.
 * @throws CaravanError bad_file that names the file, and the tensor where there is one
 */
export async function readSafetensorsHeader(path: string): Promise<SafetensorsHeader> {
  const file = await openForReading(path);
  try {
    const stat = await file.stat();
    if (!stat.isFile()) throw badFile(path, "is not a regular file");
    const { bytes, dataStart } = await readHeaderBytes(file, path, stat.size);
    return parseSafetensorsHeader(bytes, { path, sizeBytes: stat.size, dataStart });
  } finally {
    await file.close();
  }
}

/**
 * Checks header bytes (the JSON without its length prefix) against the size of the file they came from.
 * @throws CaravanError bad_file
 */
export function parseSafetensorsHeader(
  bytes: Uint8Array,
  file: { path: string; sizeBytes: number; dataStart: number },
): SafetensorsHeader {
  const { path, sizeBytes, dataStart } = file;
  const json = parseJson(bytes, path);
  const tensors = new Map<string, TensorInfo>();
  let metadata = new Map<string, string>();
  for (const [name, value] of Object.entries(json)) {
    if (name === "__metadata__") {
      const parsed = v.safeParse(Metadata, value);
      if (!parsed.success) throw badFile(path, "__metadata__ is not an object of strings");
      metadata = new Map(Object.entries(parsed.output));
    } else {
      tensors.set(name, checkEntry(name, value, path, sizeBytes, dataStart));
    }
  }
  checkLayout(tensors, path, sizeBytes, dataStart);
  return { path, sizeBytes, dataStart, metadata, tensors };
}

async function readHeaderBytes(file: FileHandle, path: string, sizeBytes: number) {
  if (sizeBytes < 8) throw badFile(path, `is ${sizeBytes} bytes long: too short for a safetensors file`);
  const prefix = await readExactly(file, path, 0, 8);
  const length = new DataView(prefix.buffer, prefix.byteOffset, 8).getBigUint64(0, true);
  if (length > BigInt(MAX_HEADER_BYTES)) {
    throw badFile(path, `header length ${length} is over the limit of ${MAX_HEADER_BYTES} bytes`);
  }
  const dataStart = 8 + Number(length);
  if (dataStart > sizeBytes) {
    throw badFile(path, `header of ${length} bytes does not fit into the file's ${sizeBytes} bytes`);
  }
  return { bytes: await readExactly(file, path, 8, Number(length)), dataStart };
}

function parseJson(bytes: Uint8Array, path: string): Record<string, unknown> {
  if (bytes[0] !== 123 /* { */) throw badFile(path, "header does not begin with '{'");
  let text: string;
  let json: unknown;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    json = JSON.parse(text);
  } catch (cause) {
    throw badFile(path, `header is not valid JSON: ${cause instanceof Error ? cause.message : cause}`, cause);
  }
  if (typeof json !== "object" || json === null) throw badFile(path, "header is not a JSON object");
  const twice = findDuplicateKey(text);
  if (twice !== undefined) throw badFile(path, `key ${quote(twice)} occurs twice in the header`);
  return json as Record<string, unknown>;
}

function checkEntry(
  name: string,
  value: unknown,
  path: string,
  sizeBytes: number,
  dataStart: number,
): TensorInfo {
  const parsed = v.safeParse(Entry, value);
  if (!parsed.success) {
    const issue = parsed.issues[0];
    throw badTensor(path, name, `${v.getDotPath(issue) ?? "entry"}: ${issue.message}`);
  }
  const { dtype, shape, data_offsets } = parsed.output;
  if (!isDtype(dtype)) throw badTensor(path, name, `unknown dtype ${quote(dtype)}`);
  const [begin, end] = data_offsets;
  if (begin > end) throw badTensor(path, name, `begins at ${begin}, behind its end ${end}`);
  if (end > sizeBytes - dataStart) {
    throw badTensor(path, name, `ends at byte ${end} of ${sizeBytes - dataStart}: the file is truncated`);
  }
  const expected = byteSize(shape, dtype);
  if (expected === undefined) throw badTensor(path, name, `shape [${shape}] overflows`);
  if (expected !== end - begin) {
    throw badTensor(
      path,
      name,
      `${dtype} [${shape}] takes ${expected} bytes, the offsets give ${end - begin}`,
    );
  }
  return { dtype, shape, offset: dataStart + begin, sizeBytes: expected };
}

/** No two tensors share a byte, and the file ends where the last one does. */
function checkLayout(
  tensors: Map<string, TensorInfo>,
  path: string,
  sizeBytes: number,
  dataStart: number,
): void {
  const order = [...tensors].filter(([, t]) => t.sizeBytes > 0).sort((a, b) => a[1].offset - b[1].offset);
  let end = dataStart;
  let previous = "";
  for (const [name, tensor] of order) {
    if (tensor.offset < end) throw badTensor(path, name, `overlaps tensor ${quote(previous)}`);
    end = tensor.offset + tensor.sizeBytes;
    previous = name;
  }
  if (end !== sizeBytes) {
    throw badFile(path, `is ${sizeBytes} bytes long, but its tensors end at byte ${end}`);
  }
}

/** Bytes of a tensor, or undefined where the product leaves the safe integers. */
export function byteSize(shape: readonly number[], dtype: Dtype): number | undefined {
  let bytes: number = DTYPE_BYTES[dtype];
  if (shape.includes(0)) return 0;
  for (const n of shape) {
    bytes *= n;
    if (!Number.isSafeInteger(bytes)) return undefined;
  }
  return bytes;
}

export function isDtype(text: string): text is Dtype {
  return Object.hasOwn(DTYPE_BYTES, text);
}

/** True where the tensor starts on a multiple of its element size, so that it can be read through a pointer. */
export function isAligned(tensor: TensorInfo): boolean {
  return tensor.sizeBytes === 0 || tensor.offset % DTYPE_BYTES[tensor.dtype] === 0;
}

/** Opens a file for reading; a missing or unreadable one is a bad_file error that names it. */
export async function openForReading(path: string): Promise<FileHandle> {
  try {
    return await open(path, "r");
  } catch (cause) {
    throw unreadable(path, cause);
  }
}

/** Reads `length` bytes at `offset` or fails; a read may return less than asked for. */
export async function readExactly(
  file: FileHandle,
  path: string,
  offset: number,
  length: number,
  into?: Uint8Array,
) {
  const bytes = into?.subarray(0, length) ?? new Uint8Array(length);
  let done = 0;
  while (done < length) {
    let got: number;
    try {
      got = (await file.read(bytes, done, length - done, offset + done)).bytesRead;
    } catch (cause) {
      throw unreadable(path, cause);
    }
    if (got === 0) throw badFile(path, `ends at byte ${offset + done}, before byte ${offset + length}`);
    done += got;
  }
  return bytes;
}

export function unreadable(path: string, cause: unknown): CaravanError {
  const code = (cause as { code?: unknown } | undefined)?.code;
  const reason = code === "ENOENT" ? "does not exist" : `cannot be read (${code ?? cause})`;
  return new CaravanError("bad_file", reason, { where: path, cause });
}

const HINT = "The file is damaged or incomplete: fetch it again.";

function badFile(path: string, message: string, cause?: unknown): CaravanError {
  return new CaravanError("bad_file", message, {
    where: path,
    hint: HINT,
    ...(cause === undefined ? {} : { cause }),
  });
}

function badTensor(path: string, tensor: string, message: string): CaravanError {
  return badFile(path, `tensor ${quote(tensor)}: ${message}`);
}

/** Names come from the file: quoted, and never longer than a line. */
function quote(name: string): string {
  return JSON.stringify(name.length > 200 ? `${name.slice(0, 200)}…` : name);
}
