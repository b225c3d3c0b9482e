// Reads a Mach-O file of 64 bits the way macOS does before it runs one, and says what would make macOS refuse it: header,
// segments, minimum system, imported libraries, and the code signature, whose hash of every page is computed again.

import { createHash } from "node:crypto";

export interface Segment {
  name: string;
  address: number;
  addressSize: number;
  offset: number;
  size: number;
  sections: { name: string; offset: number; size: number }[];
}

export interface Signature {
  identifier: string;
  adHoc: boolean;
  /** Hardened runtime: needs entitlements to compile code at run time and to load libraries of its own. */
  hardened: boolean;
  pageBytes: number;
  pages: number;
  /** Numbers of pages whose hash differs. */
  badPages: number[];
  /** Names of further parts (requirements, entitlements) whose hash differs. */
  badParts: string[];
  entitlements: string;
  /** Bytes that are signed. */
  limit: number;
}

export interface MachO {
  kind: "executable" | "library" | "other";
  arm64: boolean;
  /** Loaded at a random address; always so for libraries. */
  movable: boolean;
  platform: number;
  /** Oldest macOS, as "13.0". */
  oldest: string;
  libraries: string[];
  /** Folders of LC_RPATH. */
  searched: string[];
  segments: Segment[];
  signature: Signature | undefined;
  /** What is wrong, each a sentence; empty when macOS has no reason to refuse the file. */
  faults: string[];
}

const MAGIC_64 = 0xfeedfacf;
const CPU_ARM64 = 0x0100000c;
const KINDS: Record<number, MachO["kind"]> = { 2: "executable", 6: "library" };
const FLAG_PIE = 0x200000;
const LC = { segment: 0x19, rpath: 0x8000001c, buildVersion: 0x32, signature: 0x1d } as const;
/** Libraries to load: plain, weak, re-exported, upward, lazy. */
const LC_LIBRARIES = [0xc, 0x80000018, 0x8000001f, 0x80000023, 0x20];
const PLATFORM_MACOS = 1;

/** Parts of a signature by their slot; negative slots of the code directory hold their hashes. */
const PARTS: Record<number, string> = {
  1: "Info.plist",
  2: "requirements",
  3: "resources",
  5: "entitlements",
  7: "entitlements (DER)",
};
const MAGIC_SUPERBLOB = 0xfade0cc0;
const MAGIC_DIRECTORY = 0xfade0c02;
const SHA256 = 2;
const AD_HOC = 2;
const HARDENED = 0x10000;

/** Throws RangeError for a file that is too short to be one. */
export function readMachO(file: Uint8Array): MachO {
  const bytes = Buffer.from(file.buffer, file.byteOffset, file.byteLength);
  const faults: string[] = [];
  if (bytes.readUInt32LE(0) !== MAGIC_64) throw new RangeError("not a Mach-O file of 64 bits");
  const flags = bytes.readUInt32LE(24);
  const kind = KINDS[bytes.readUInt32LE(12)] ?? "other";
  const result: MachO = {
    kind,
    arm64: bytes.readUInt32LE(4) === CPU_ARM64,
    movable: kind !== "executable" || (flags & FLAG_PIE) !== 0,
    ...{ platform: 0, oldest: "", libraries: [], searched: [], segments: [], signature: undefined, faults },
  };
  const count = bytes.readUInt32LE(16);
  const end = 32 + bytes.readUInt32LE(20);
  let at = 32;
  for (let i = 0; i < count; i++) {
    const size = bytes.readUInt32LE(at + 4);
    if (size < 8 || size % 8 !== 0 || at + size > end) {
      faults.push(`load command ${i} has ${size} bytes, beyond the end of all of them`);
      break;
    }
    readCommand(bytes, at, size, result);
    at += size;
  }
  checkSegments(result, bytes.length);
  if (!result.arm64) faults.push("it is not for arm64");
  if (!result.movable) faults.push("it cannot be loaded at a random address, as arm64 needs");
  if (result.platform !== PLATFORM_MACOS) faults.push(`it is for platform ${result.platform}, not macOS`);
  if (result.signature === undefined) faults.push("it is not signed: arm64 Macs run no unsigned code");
  return result;
}

function readCommand(bytes: Buffer, at: number, size: number, result: MachO): void {
  const command = bytes.readUInt32LE(at);
  if (command === LC.segment) result.segments.push(readSegment(bytes, at));
  if (command === LC.rpath || LC_LIBRARIES.includes(command)) {
    const name = text(bytes, at + bytes.readUInt32LE(at + 8), at + size);
    (command === LC.rpath ? result.searched : result.libraries).push(name);
  }
  if (command === LC.buildVersion) {
    result.platform = bytes.readUInt32LE(at + 8);
    const oldest = bytes.readUInt32LE(at + 12);
    result.oldest = `${oldest >>> 16}.${(oldest >>> 8) & 255}`;
  }
  if (command === LC.signature)
    result.signature = readSignature(
      bytes,
      bytes.readUInt32LE(at + 8),
      bytes.readUInt32LE(at + 12),
      result.faults,
    );
}

function readSegment(bytes: Buffer, at: number): Segment {
  const long = (offset: number): number => Number(bytes.readBigUInt64LE(at + offset));
  const sections = Array.from({ length: bytes.readUInt32LE(at + 64) }, (_, i) => {
    const section = at + 72 + 80 * i;
    return {
      name: text(bytes, section, section + 16),
      offset: bytes.readUInt32LE(section + 48),
      size: Number(bytes.readBigUInt64LE(section + 40)),
    };
  });
  return {
    name: text(bytes, at + 8, at + 24),
    ...{ address: long(24), addressSize: long(32), offset: long(40), size: long(48), sections },
  };
}

function checkSegments({ segments, faults }: MachO, length: number): void {
  let address = 0;
  for (const segment of segments) {
    if (segment.offset + segment.size > length)
      faults.push(`${segment.name} reaches beyond the end of the file`);
    if (segment.size > segment.addressSize)
      faults.push(`${segment.name} is larger in the file than in memory`);
    if (segment.address < address) faults.push(`${segment.name} lies over the segment before it`);
    if (segment.offset % 16384 !== 0 || segment.address % 16384 !== 0)
      faults.push(`${segment.name} does not begin with a page of 16 KB`);
    address = segment.address + segment.addressSize;
  }
  const last = segments.at(-1);
  if (last?.name !== "__LINKEDIT") faults.push("__LINKEDIT is not the last segment");
  else if (last.offset + last.size !== length) faults.push("the file does not end where __LINKEDIT does");
}

function readSignature(bytes: Buffer, offset: number, size: number, faults: string[]): Signature | undefined {
  const blob = bytes.subarray(offset, offset + size);
  if (blob.length < size) {
    faults.push("the signature reaches beyond the end of the file");
    return undefined;
  }
  if (offset + size !== bytes.length) faults.push("the file does not end with its signature");
  if (blob.readUInt32BE(0) !== MAGIC_SUPERBLOB) {
    faults.push("the signature has an unknown form");
    return undefined;
  }
  const parts = new Map<number, Buffer>();
  for (let i = 0; i < blob.readUInt32BE(8); i++) {
    const at = blob.readUInt32BE(12 + 8 * i + 4);
    parts.set(blob.readUInt32BE(12 + 8 * i), blob.subarray(at, at + blob.readUInt32BE(at + 4)));
  }
  const directory = parts.get(0);
  if (directory === undefined || directory.readUInt32BE(0) !== MAGIC_DIRECTORY) {
    faults.push("the signature has no code directory");
    return undefined;
  }
  const signature = readDirectory(bytes, directory, parts);
  if (!signature.adHoc) faults.push("the signature is not ad hoc, and there is no certificate");
  if (signature.limit !== offset)
    faults.push(`${signature.limit} bytes are signed, the signature begins at ${offset}`);
  if (signature.pages !== Math.ceil(signature.limit / signature.pageBytes))
    faults.push(
      `${signature.pages} pages have hashes, not ${Math.ceil(signature.limit / signature.pageBytes)}`,
    );
  if (signature.badPages.length > 0)
    faults.push(`the hash of page ${signature.badPages[0]} differs (${signature.badPages.length} in all)`);
  for (const part of signature.badParts) faults.push(`the hash of the ${part} differs`);
  return signature;
}

function readDirectory(bytes: Buffer, directory: Buffer, parts: ReadonlyMap<number, Buffer>): Signature {
  const field = (offset: number): number => directory.readUInt32BE(offset);
  const [hashes, identifier, specials, pages, limit] = [
    field(16),
    field(20),
    field(24),
    field(28),
    field(32),
  ];
  const hashBytes = directory.readUInt8(36);
  if (directory.readUInt8(37) !== SHA256) throw new RangeError("the signature's hashes are not SHA-256");
  const pageBytes = 1 << directory.readUInt8(39);
  const hash = (data: Uint8Array): Buffer =>
    createHash("sha256").update(data).digest().subarray(0, hashBytes);
  const wanted = (slot: number): Buffer =>
    directory.subarray(hashes + slot * hashBytes, hashes + (slot + 1) * hashBytes);
  const badPages = Array.from({ length: pages }, (_, page) => page).filter(
    (page) =>
      !hash(bytes.subarray(page * pageBytes, Math.min((page + 1) * pageBytes, limit))).equals(wanted(page)),
  );
  const badParts: string[] = [];
  for (let slot = 1; slot <= specials; slot++) {
    const part = parts.get(slot);
    const right = part === undefined ? Buffer.alloc(hashBytes) : hash(part);
    if (!right.equals(wanted(-slot))) badParts.push(PARTS[slot] ?? `part ${slot}`);
  }
  return {
    identifier: text(directory, identifier, directory.length),
    adHoc: (field(12) & AD_HOC) !== 0,
    hardened: (field(12) & HARDENED) !== 0,
    entitlements: parts.get(5)?.subarray(8).toString() ?? "",
    ...{ pageBytes, pages, badPages, badParts, limit },
  };
}

/** A text that ends with a zero byte or at `end`. */
function text(bytes: Buffer, from: number, end: number): string {
  const zero = bytes.indexOf(0, from);
  return bytes.toString("utf8", from, zero < 0 || zero > end ? end : zero);
}
