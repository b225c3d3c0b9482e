// What of a model is in a folder of parts, written down beside it (part.json): which ranges of which files have arrived, what is
// known of their content, and for how long no rank has read them. Data reaches the disk before the note that says so.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";
import { AtomicFile } from "../../model/atomic-file.ts";
import { missingStrips, run, type Strips } from "../strips.ts";
import { DISK_BLOCK_BYTES, isClose } from "./sparse-file.ts";

/** What the hub states of a file's content: its sha256, or the id that git gives it (files outside LFS). Lower-case hex. */
export interface FileHash {
  kind: "sha256" | "git";
  value: string;
}

/**
 * How far a file's content was checked. "whole": all of it is here and has the stated hash. "source": the file that the strips come
 * from has it, and each piece of them came with a hash of its own. Missing: each piece came with a hash of what the other node read.
 */
export type Checked = "whole" | "source";

export interface PartFile {
  /** Of the whole file, bytes. */
  size: number;
  /** What has arrived. */
  held: Strips[];
  hash?: FileHash;
  /** Of a file without a hash: what the holder's file looked like when these bytes came. */
  stamp?: string;
  checked?: Checked;
}

export interface PartNote {
  model: string;
  /** Hours in which a node ran here and no rank read it. Not a date: clocks jump. */
  idleHours: number;
  files: Record<string, PartFile>;
}

const NOTE_NAME = "part.json";

const bytes = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const positive = v.pipe(bytes, v.minValue(1));
/** Changes when a file is written or replaced; compared, never read. */
export const FileStampSchema = v.pipe(v.string(), v.maxLength(100));
export const FileHashSchema = v.variant("kind", [
  v.object({ kind: v.literal("sha256"), value: v.pipe(v.string(), v.regex(/^[0-9a-f]{64}$/)) }),
  v.object({ kind: v.literal("git"), value: v.pipe(v.string(), v.regex(/^[0-9a-f]{40}$/)) }),
]);
/** Strips in the form that strips.ts keeps to. */
export const StripsSchema = v.pipe(
  v.strictTuple([bytes, positive, positive, positive]),
  v.check(([, length, stride, rows]) => (rows === 1 ? stride === length : stride > length), "no strips"),
);
const NoteSchema = v.object({
  model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)),
  idleHours: bytes,
  files: v.record(
    v.string(),
    v.object({
      size: bytes,
      held: v.array(StripsSchema),
      hash: v.exactOptional(FileHashSchema),
      stamp: v.exactOptional(FileStampSchema),
      checked: v.exactOptional(v.picklist(["whole", "source"])),
    }),
  ),
});

/** undefined where there is none, or a damaged one: that costs a new fetch, not a wrong model. */
export function readPartNote(folder: string): PartNote | undefined {
  let value: unknown;
  try {
    value = JSON.parse(readFileSync(join(folder, NOTE_NAME), "utf8"));
  } catch {
    return undefined;
  }
  const parsed = v.safeParse(NoteSchema, value);
  return parsed.success ? parsed.output : undefined;
}

/** The latest writing of each folder's note: two ranks of one model may fetch at one time, and one writer is in the other's way. */
const writing = new Map<string, Promise<void>>();

/** Rejects with disk_full or bad_file; the note before stays then. */
export async function writePartNote(folder: string, note: PartNote): Promise<void> {
  const content = Buffer.from(JSON.stringify(note));
  const before = writing.get(folder) ?? Promise.resolve();
  const mine = before.catch(() => undefined).then(() => writeNote(folder, content));
  writing.set(folder, mine);
  try {
    await mine;
  } finally {
    if (writing.get(folder) === mine) writing.delete(folder);
  }
}

async function writeNote(folder: string, content: Uint8Array): Promise<void> {
  const file = await AtomicFile.create(join(folder, NOTE_NAME));
  await file.write(content, 0);
  await file.commit();
}

/** Bytes that the part takes on the disk, holes not counted. */
export function partBytes({ files }: PartNote): number {
  return Object.values(files).reduce((sum, { held }) => sum + diskBytes(held), 0);
}

/** What strips take of a disk: all that lies between them where they are close (sparse-file.ts fills it), else a block more for each. */
export function diskBytes(held: readonly Strips[]): number {
  return held.reduce((sum, [, length, stride, rows]) => {
    const between = isClose(stride - length) ? stride - length : DISK_BLOCK_BYTES;
    return sum + length * rows + between * (rows - 1);
  }, 0);
}

export function isWhole({ size, held }: PartFile): boolean {
  return size === 0 || missingStrips([run(0, size)], held).length === 0;
}
