// Copies checkpoints so that no tensor is misaligned. Writers that do not pad their headers (MLX's among them)
// leave U32 and F16 tensors on odd addresses; a padded header moves all data by a few bytes and mends that. Where
// it does not, because the tensors are unaligned among themselves, they are put in another order.

import { constants } from "node:fs";
import { copyFile, mkdir, readdir, rename, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { CaravanError } from "../errors.ts";
import { AtomicFile, partialPath, writeError } from "./atomic-file.ts";
import {
  isAligned,
  openForReading,
  readExactly,
  readSafetensorsHeader,
  type SafetensorsHeader,
  type TensorInfo,
  unreadable,
} from "./safetensors-header.ts";
import { layoutSafetensors, padHead, SafetensorsWriter } from "./safetensors-writer.ts";

const COPY_BYTES = 8 << 20;

export type AlignMethod = "already-aligned" | "header-padded" | "reordered";

export interface AlignOptions {
  /** Called after each piece with the bytes of tensor data copied so far, over all files. */
  onProgress?: (bytesDone: number, bytesTotal: number) => void;
}

/** What aligning the file takes. Only a matter of its header. */
export function alignMethod(header: SafetensorsHeader): AlignMethod {
  const tensors = [...header.tensors.values()];
  if (tensors.every(isAligned)) return "already-aligned";
  const inData = (t: TensorInfo) => ({ ...t, offset: t.offset - header.dataStart });
  return tensors.every((t) => isAligned(inData(t))) ? "header-padded" : "reordered";
}

/** Size of the aligned copy in bytes, for disk checks. Exact. */
export function alignedSizeBytes(header: SafetensorsHeader): number {
  switch (alignMethod(header)) {
    case "already-aligned":
      return header.sizeBytes;
    case "header-padded":
      return padHead(new Uint8Array(header.dataStart - 8)).byteLength + header.sizeBytes - header.dataStart;
    case "reordered":
      return reorderedLayout(header).sizeBytes;
  }
}

/**
 * Copies `src` to `dst` with every tensor on its natural alignment and the bytes of every tensor unchanged.
 * `dst` appears only when it is whole.
 * @throws CaravanError bad_file, disk_full
 */
export async function alignSafetensors(
  src: string,
  dst: string,
  options: AlignOptions = {},
): Promise<AlignMethod> {
  const header = await readSafetensorsHeader(src);
  const total = header.sizeBytes - header.dataStart;
  let done = 0;
  await copyAligned(header, dst, (bytes) => {
    done += bytes;
    options.onProgress?.(done, total);
  });
  return alignMethod(header);
}

/**
 * Copies a whole checkpoint folder: safetensors files aligned, all other files as they are. `dstDir` must not
 * exist; it appears only when everything is in it.
 * @throws CaravanError invalid_argument, bad_file, disk_full
 */
export async function alignCheckpoint(
  srcDir: string,
  dstDir: string,
  options: AlignOptions = {},
): Promise<void> {
  const entries = await readdir(srcDir, { withFileTypes: true }).catch((cause: unknown) => {
    throw unreadable(srcDir, cause);
  });
  const names: string[] = [];
  for (const e of entries) if ((await stat(join(srcDir, e.name))).isFile()) names.push(e.name);
  const headers: SafetensorsHeader[] = [];
  for (const n of names.filter(isWeights)) headers.push(await readSafetensorsHeader(join(srcDir, n)));
  if (await exists(dstDir)) throw new CaravanError("invalid_argument", "already exists", { where: dstDir });
  const total = headers.reduce((sum, h) => sum + h.sizeBytes - h.dataStart, 0);
  const partial = partialPath(dstDir);
  let done = 0;
  try {
    await rm(partial, { recursive: true, force: true });
    await mkdir(partial, { recursive: true });
    for (const name of names.filter((n) => !isWeights(n)))
      await copyFile(join(srcDir, name), join(partial, name));
    for (const header of headers) {
      const name = header.path.slice(srcDir.length).replace(/^\/+/, "");
      await copyAligned(header, join(partial, name), (bytes) => {
        done += bytes;
        options.onProgress?.(done, total);
      });
    }
    await rename(partial, dstDir);
  } catch (cause) {
    await rm(partial, { recursive: true, force: true });
    throw writeError(dstDir, cause);
  }
}

async function copyAligned(
  header: SafetensorsHeader,
  dst: string,
  moved: (bytes: number) => void,
): Promise<void> {
  switch (alignMethod(header)) {
    case "already-aligned":
      return clone(header, dst, moved);
    case "header-padded":
      return copyPadded(header, dst, moved);
    case "reordered":
      return copyReordered(header, dst, moved);
  }
}

/** Shares the blocks where the file system can. */
async function clone(header: SafetensorsHeader, dst: string, moved: (bytes: number) => void): Promise<void> {
  try {
    await copyFile(header.path, partialPath(dst), constants.COPYFILE_FICLONE);
    await rename(partialPath(dst), dst);
  } catch (cause) {
    await rm(partialPath(dst), { force: true });
    throw writeError(dst, cause);
  }
  moved(header.sizeBytes - header.dataStart);
}

async function copyPadded(
  header: SafetensorsHeader,
  dst: string,
  moved: (bytes: number) => void,
): Promise<void> {
  const src = await openForReading(header.path);
  const out = await AtomicFile.create(dst);
  try {
    const head = padHead(await readExactly(src, header.path, 8, header.dataStart - 8));
    await out.write(head, 0);
    const shift = head.byteLength - header.dataStart;
    const range = { offset: header.dataStart, sizeBytes: header.sizeBytes - header.dataStart };
    for await (const { bytes, offset } of pieces(src, header.path, range)) {
      await out.write(bytes, offset + shift);
      moved(bytes.byteLength);
    }
    await out.commit();
  } finally {
    await out.abort();
    await src.close();
  }
}

async function copyReordered(
  header: SafetensorsHeader,
  dst: string,
  moved: (bytes: number) => void,
): Promise<void> {
  const src = await openForReading(header.path);
  let out: SafetensorsWriter | undefined;
  try {
    out = await SafetensorsWriter.create(dst, specsOf(header), Object.fromEntries(header.metadata));
    for (const [name, tensor] of header.tensors) {
      for await (const { bytes } of pieces(src, header.path, tensor)) {
        await out.write(name, bytes);
        moved(bytes.byteLength);
      }
    }
    await out.finish();
  } finally {
    await out?.abort();
    await src.close();
  }
}

function specsOf(header: SafetensorsHeader) {
  return [...header.tensors].map(([name, { dtype, shape }]) => ({ name, dtype, shape }));
}

function reorderedLayout(header: SafetensorsHeader) {
  return layoutSafetensors(specsOf(header), Object.fromEntries(header.metadata));
}

/** Reads a range of a file in pieces; the yielded bytes are valid until the next piece. */
async function* pieces(
  file: Parameters<typeof readExactly>[0],
  path: string,
  range: { offset: number; sizeBytes: number },
) {
  const buffer = new Uint8Array(Math.min(COPY_BYTES, range.sizeBytes));
  for (let done = 0; done < range.sizeBytes; done += buffer.byteLength) {
    const offset = range.offset + done;
    const length = Math.min(buffer.byteLength, range.sizeBytes - done);
    yield { bytes: await readExactly(file, path, offset, length, buffer), offset };
  }
}

function isWeights(name: string): boolean {
  return name.endsWith(".safetensors");
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}
