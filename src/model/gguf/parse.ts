// Parses the header of one GGUF file (versions 2 and 3, little-endian): metadata and the table of tensors, every
// number checked against the file. Tensor data is not read.

import type { CaravanError } from "../../errors.ts";
import { Cursor } from "./cursor.ts";
import { type GgmlType, ggmlType } from "./tensor-types.ts";

/** Integers beyond 2^53 stay bigint; arrays hold one kind of element and are never nested. */
export type GgufValue = number | bigint | boolean | string | GgufValue[];

export interface GgufTensor {
  name: string;
  type: GgmlType;
  /** Outermost first (GGUF stores the row length first), so the last entry is the row length. */
  shape: number[];
  /** From the start of the file, in bytes. */
  offset: number;
  sizeBytes: number;
}

export interface GgufFile {
  path: string;
  fileBytes: number;
  version: number;
  alignment: number;
  metadata: ReadonlyMap<string, GgufValue>;
  tensors: ReadonlyMap<string, GgufTensor>;
}

const MAX_KEY_BYTES = 1 << 16;
const MAX_STRING_BYTES = 1 << 26;
const MAX_ARRAY_ELEMENTS = 1 << 24;
const MAX_METADATA = 1 << 16;
const MAX_TENSORS = 1 << 20;
const MAX_METADATA_BYTES = 1 << 28;
const MAX_ALIGNMENT = 1 << 20;
const MAX_DIMS = 4;
/** Least bytes of an entry: key length, one byte of key, type, one byte of value; and the tensor's like it. */
const MIN_METADATA_ENTRY = 8 + 1 + 4 + 1;
const MIN_TENSOR_ENTRY = 8 + 1 + 4 + 8 + 4 + 8;

const ARRAY = 9;
const STRING = 8;
const SCALAR_BYTES: readonly (number | undefined)[] = [1, 1, 2, 2, 4, 4, 4, 1, undefined, undefined, 8, 8, 8];

/** @throws CaravanError bad_file that names the file and what is wrong with it */
export function parseGguf(path: string): GgufFile {
  const cursor = new Cursor(path);
  try {
    return parse(cursor);
  } finally {
    cursor.close();
  }
}

function parse(c: Cursor): GgufFile {
  if (c.fileBytes < 24) throw c.fail(`is ${c.fileBytes} bytes long: too short for a GGUF file`);
  if (c.u32("magic") !== 0x46554747) throw c.fail("does not begin with GGUF: not a GGUF file");
  const version = readVersion(c);
  const tensorCount = c.count(
    "tensor count",
    Math.min(MAX_TENSORS, Math.floor(c.remaining / MIN_TENSOR_ENTRY)),
  );
  const entryCount = c.count(
    "metadata count",
    Math.min(MAX_METADATA, Math.floor(c.remaining / MIN_METADATA_ENTRY)),
  );
  const metadata = readMetadata(c, entryCount);
  const alignment = readAlignment(c, metadata);
  const listed = readTensorTable(c, tensorCount, alignment);
  const dataStart = Math.ceil(c.position / alignment) * alignment;
  const tensors = placeTensors(c, listed, dataStart);
  return { path: c.path, fileBytes: c.fileBytes, version, alignment, metadata, tensors };
}

function readVersion(c: Cursor): number {
  const version = c.u32("version");
  if (version === 0x02000000 || version === 0x03000000) throw c.fail("is big-endian, which is not supported");
  if (version !== 2 && version !== 3)
    throw c.fail(`has GGUF version ${version}; versions 2 and 3 are supported`);
  return version;
}

function readMetadata(c: Cursor, count: number): Map<string, GgufValue> {
  const metadata = new Map<string, GgufValue>();
  const start = c.position;
  for (let i = 0; i < count; i++) {
    const key = c.text(`key ${i + 1} of ${count}`, MAX_KEY_BYTES);
    if (key === "") throw c.fail(`metadata entry ${i + 1} has an empty key`);
    if (metadata.has(key)) throw c.fail(`metadata key ${quote(key)} occurs twice`);
    const type = c.u32(`type of ${quote(key)}`);
    metadata.set(key, type === ARRAY ? readArray(c, key) : readScalar(c, type, quote(key)));
    if (c.position - start > MAX_METADATA_BYTES)
      throw c.fail(`holds more than ${MAX_METADATA_BYTES} bytes of metadata`);
  }
  return metadata;
}

function readArray(c: Cursor, key: string): GgufValue[] {
  const what = `array ${quote(key)}`;
  const type = c.u32(`element type of ${what}`);
  if (type === ARRAY) throw c.fail(`${what} is an array of arrays, which is not supported`);
  const elementBytes = type === STRING ? 8 : SCALAR_BYTES[type];
  if (elementBytes === undefined) throw c.fail(`${what} has elements of unknown type ${type}`);
  const room = Math.floor(Math.max(0, c.remaining - 8) / elementBytes);
  const length = c.count(`length of ${what}`, Math.min(MAX_ARRAY_ELEMENTS, room));
  const values: GgufValue[] = [];
  for (let i = 0; i < length; i++) values.push(readScalar(c, type, what));
  return values;
}

function readScalar(c: Cursor, type: number, what: string): GgufValue {
  switch (type) {
    case 0:
      return c.u8(what);
    case 1:
      return c.i8(what);
    case 2:
      return c.u16(what);
    case 3:
      return c.i16(what);
    case 4:
      return c.u32(what);
    case 5:
      return c.i32(what);
    case 6:
      return c.f32(what);
    case 7:
      return readBool(c, what);
    case STRING:
      return c.text(what, MAX_STRING_BYTES);
    case 10:
      return narrow(c.u64(what));
    case 11:
      return narrow(c.i64(what));
    case 12:
      return c.f64(what);
    default:
      throw c.fail(`${what} has unknown type ${type}`);
  }
}

function readBool(c: Cursor, what: string): boolean {
  const byte = c.u8(what);
  if (byte > 1) throw c.fail(`${what} is a boolean of value ${byte}`);
  return byte === 1;
}

function narrow(n: bigint): number | bigint {
  return n >= BigInt(Number.MIN_SAFE_INTEGER) && n <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(n) : n;
}

function readAlignment(c: Cursor, metadata: Map<string, GgufValue>): number {
  const value = metadata.get("general.alignment") ?? 32;
  const valid = typeof value === "number" && Number.isInteger(value) && value > 0 && value <= MAX_ALIGNMENT;
  if (!valid || (value & (value - 1)) !== 0) {
    throw c.fail(
      `general.alignment is ${typeof value === "object" ? "an array" : value}, not a power of two`,
    );
  }
  return value;
}

/** Name, type, shape and the offset inside the data; sizes are known from type and shape. */
function readTensorTable(c: Cursor, count: number, alignment: number): GgufTensor[] {
  const tensors: GgufTensor[] = [];
  for (let i = 0; i < count; i++) {
    const name = c.text(`name of tensor ${i + 1} of ${count}`, MAX_KEY_BYTES);
    const bad = (message: string) => badTensor(c, name, message);
    const dims = c.u32(`dimensions of tensor ${quote(name)}`);
    if (dims < 1 || dims > MAX_DIMS) throw bad(`has ${dims} dimensions; 1 to ${MAX_DIMS} are possible`);
    const shape: number[] = [];
    for (let d = 0; d < dims; d++) {
      shape.unshift(c.count(`dimension ${d} of tensor ${quote(name)}`, Number.MAX_SAFE_INTEGER));
    }
    const typeId = c.u32(`type of tensor ${quote(name)}`);
    const type = ggmlType(typeId);
    if (type === undefined) throw bad(`has unknown type ${typeId}`);
    const sizeBytes = tensorBytes(shape, type, bad);
    const offset = c.count(`offset of tensor ${quote(name)}`, c.fileBytes);
    if (offset % alignment !== 0) throw bad(`starts at ${offset}, not a multiple of ${alignment}`);
    tensors.push({ name, type, shape, offset, sizeBytes });
  }
  return tensors;
}

function tensorBytes(shape: number[], type: GgmlType, bad: (message: string) => CaravanError): number {
  const row = shape[shape.length - 1] ?? 0;
  if (shape.includes(0)) throw bad(`is empty: [${shape}]`);
  if (row % type.blockElements !== 0) {
    throw bad(`has rows of ${row}, not a multiple of ${type.name}'s block of ${type.blockElements}`);
  }
  let bytes = (row / type.blockElements) * type.blockBytes;
  for (const n of shape.slice(0, -1)) bytes *= Number.isSafeInteger(bytes * n) ? n : Number.NaN;
  if (!Number.isSafeInteger(bytes)) throw bad(`shape [${shape}] overflows`);
  return bytes;
}

/** Turns offsets in the data into offsets in the file, and refuses data beyond the end or shared by two tensors. */
function placeTensors(c: Cursor, listed: GgufTensor[], dataStart: number): Map<string, GgufTensor> {
  const tensors = new Map<string, GgufTensor>();
  let end = dataStart;
  let previous = "";
  for (const t of [...listed].sort((a, b) => a.offset - b.offset)) {
    const offset = dataStart + t.offset;
    if (offset + t.sizeBytes > c.fileBytes) {
      throw badTensor(
        c,
        t.name,
        `ends at byte ${offset + t.sizeBytes} of ${c.fileBytes}: the file is truncated`,
      );
    }
    if (offset < end) throw badTensor(c, t.name, `overlaps tensor ${quote(previous)}`);
    end = offset + t.sizeBytes;
    previous = t.name;
  }
  for (const t of listed) {
    if (tensors.has(t.name)) throw badTensor(c, t.name, "is listed twice");
    tensors.set(t.name, { ...t, offset: dataStart + t.offset });
  }
  return tensors;
}

function badTensor(c: Cursor, name: string, message: string): CaravanError {
  return c.fail(`tensor ${quote(name)} ${message}`);
}

function quote(name: string): string {
  return JSON.stringify(name.length > 200 ? `${name.slice(0, 200)}…` : name);
}
