// Gives other nodes the files of a model that is here: a list, then any strips of bytes (../strips.ts) packed together, each time with a hash of
// them. On a connection of purpose "file". Only models by name, only files in the model's folder, only those that a model is made of.
//
//   asker: {model}                        holder: {files: [{name, size, hash?, stamp?}]}
//   asker: {name, strips} …               holder: bytes …, {sha256}
//   asker: {verify: name}                 holder: {reading: bytes} …, {verified: name}
//
// hash: what the hub states of the whole file, where the file came from there. The holder vouches for it only when asked to verify.
// stamp: of any other file, by which the asker sees that it is no longer the file that it has parts of.

import { createHash } from "node:crypto";
import type { Stats } from "node:fs";
import { open, readdir, readlink, stat } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import * as v from "valibot";
import { asCaravanError, CaravanError } from "../../errors.ts";
import { endOf, type Strips, stripBytes } from "../strips.ts";
import type { Channel } from "./channel.ts";
import type { FileVerdicts } from "./file-verdicts.ts";
import { type FileHash, FileHashSchema, FileStampSchema, StripsSchema } from "./part-note.ts";
import { packStrips } from "./sparse-file.ts";

/** Of one request. */
export const MOST_WISH_BYTES = 16 * 1024 * 1024;
export const MOST_WISH_STRIPS = 512;
const IDLE_LIMIT_MS = 120_000;
const MOST_FILES = 1024;
/** While the holder reads a file, it says how far it is that often. */
const READING_MS = 1000;

/** What a model is made of; nothing else leaves the folder. */
const FILE_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.(?:json|safetensors|jinja|txt|model)$/;

const size = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const fileName = v.pipe(v.string(), v.regex(FILE_NAME));
const Ask = v.object({ model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)) });
const Wish = v.union([
  v.object({
    name: fileName,
    strips: v.pipe(v.array(StripsSchema), v.minLength(1), v.maxLength(MOST_WISH_STRIPS)),
  }),
  v.object({ verify: fileName }),
]);
const Files = v.object({
  files: v.pipe(
    v.array(
      v.object({
        name: fileName,
        size,
        hash: v.exactOptional(FileHashSchema),
        stamp: v.exactOptional(FileStampSchema),
      }),
    ),
    v.maxLength(MOST_FILES),
  ),
});
const Verdict = v.union([v.object({ reading: size }), v.object({ verified: fileName })]);
const Hash = v.object({ sha256: v.pipe(v.string(), v.regex(/^[0-9a-f]{64}$/)) });
const Failure = v.object({ error: v.record(v.string(), v.unknown()) });

export interface ModelFile {
  name: string;
  /** Bytes. */
  size: number;
  hash?: FileHash;
  /** Where there is no hash. */
  stamp?: string;
}

export interface HolderOptions {
  /** Folder of a model by name. Throws model_not_found. */
  folderOf: (model: string) => string;
  verdicts: FileVerdicts;
}

/** The holder's side. Never rejects. */
export async function serveModelFiles(channel: Channel, options: HolderOptions): Promise<void> {
  try {
    const { model } = v.parse(Ask, await channel.readJson(IDLE_LIMIT_MS));
    const folder = options.folderOf(model);
    const files = await listFiles(folder);
    channel.send({ files });
    for (;;) {
      const frame = await channel.read(IDLE_LIMIT_MS);
      if (frame === undefined) return;
      const wish = v.parse(Wish, frame.kind === "json" ? frame.value : undefined);
      if ("verify" in wish) await verifyFile(channel, folder, files, wish.verify, options.verdicts);
      else await sendStrips(channel, folder, files, wish);
    }
  } catch (thrown) {
    if (channel.open) channel.send({ error: asCaravanError(thrown).toJSON() });
    channel.finish();
  }
}

async function listFiles(folder: string): Promise<ModelFile[]> {
  const names = (await readdir(folder)).filter((name) => FILE_NAME.test(name)).sort();
  const files: ModelFile[] = [];
  for (const name of names.slice(0, MOST_FILES)) {
    const found = await stat(join(folder, name));
    if (!found.isFile()) continue;
    const hash = await statedHash(join(folder, name));
    files.push({ name, size: found.size, ...(hash === undefined ? { stamp: stampOf(found) } : { hash }) });
  }
  return files;
}

function stampOf({ mtimeMs, ino }: Stats): string {
  return `${mtimeMs} ${ino}`;
}

/** In the hub's cache a model's file is a link to a blob whose name is the content's hash, as the hub stated it. */
async function statedHash(path: string): Promise<FileHash | undefined> {
  const target = await readlink(path).catch(() => undefined);
  if (target === undefined || basename(dirname(target)) !== "blobs") return undefined;
  const value = basename(target);
  if (/^[0-9a-f]{64}$/.test(value)) return { kind: "sha256", value };
  return /^[0-9a-f]{40}$/.test(value) ? { kind: "git", value } : undefined;
}

async function verifyFile(
  channel: Channel,
  folder: string,
  files: readonly ModelFile[],
  name: string,
  verdicts: FileVerdicts,
): Promise<void> {
  const hash = files.find((each) => each.name === name)?.hash;
  if (hash === undefined)
    throw new CaravanError("invalid_argument", "nobody stated a hash of this file", { where: name });
  const check = verdicts.check(join(folder, name), hash);
  const alive = setInterval(() => channel.send({ reading: check.done }), READING_MS);
  try {
    await check.result;
  } finally {
    clearInterval(alive);
  }
  channel.send({ verified: name });
}

async function sendStrips(
  channel: Channel,
  folder: string,
  files: readonly ModelFile[],
  { name, strips }: { name: string; strips: Strips[] },
): Promise<void> {
  const file = files.find((each) => each.name === name);
  if (
    file === undefined ||
    strips.some((each) => endOf(each) > file.size) ||
    stripBytes(strips) > MOST_WISH_BYTES
  )
    throw new CaravanError("invalid_argument", "there are no such bytes to give", { where: name });
  const handle = await open(join(folder, name));
  try {
    const hash = createHash("sha256");
    for await (const bytes of packStrips(handle, strips, name)) {
      hash.update(bytes);
      await channel.sendBytes(bytes);
    }
    if (file.stamp !== undefined && stampOf(await handle.stat()) !== file.stamp)
      throw new CaravanError("bad_file", "the file was changed while it was being given away", {
        where: name,
      });
    channel.send({ sha256: hash.digest("hex") });
  } finally {
    await handle.close();
  }
}

/** The asker's side of one connection. */
export class ModelSourceChannel {
  private constructor(
    private readonly channel: Channel,
    readonly files: readonly ModelFile[],
  ) {}

  /** Rejects with model_not_found where the holder has no such model. */
  static async ask(channel: Channel, model: string): Promise<ModelSourceChannel> {
    channel.send({ model });
    const { files } = read(Files, await channel.readJson(IDLE_LIMIT_MS));
    return new ModelSourceChannel(channel, files);
  }

  /** These strips of a file, packed in their order, checked against the holder's hash. At most MOST_WISH_BYTES, MOST_WISH_STRIPS of them. */
  async read(name: string, strips: readonly Strips[]): Promise<Uint8Array> {
    this.channel.send({ name, strips });
    const bytes = new Uint8Array(stripBytes(strips));
    let at = 0;
    for (;;) {
      const frame = await this.channel.read(IDLE_LIMIT_MS);
      if (frame === undefined)
        throw new CaravanError("download_failed", "the other node ended early", { where: name });
      if (frame.kind === "bytes") {
        if (at + frame.bytes.length > bytes.length)
          throw new CaravanError("download_failed", "the other node sends too much", { where: name });
        bytes.set(frame.bytes, at);
        at += frame.bytes.length;
        continue;
      }
      const { sha256 } = read(Hash, frame.value);
      if (at !== bytes.length || createHash("sha256").update(bytes).digest("hex") !== sha256)
        throw new CaravanError("download_failed", "bytes from another node are not what it read", {
          where: name,
        });
      return bytes;
    }
  }

  /** Has the holder compare its whole file with the hash that the hub states. `onBytes`: how much of it has been read. Rejects
   * with bad_file where it is another one. */
  async verify(name: string, onBytes: (read: number) => void): Promise<void> {
    this.channel.send({ verify: name });
    for (;;) {
      const verdict = read(Verdict, await this.channel.readJson(IDLE_LIMIT_MS));
      if ("verified" in verdict) return;
      onBytes(verdict.reading);
    }
  }

  close(): void {
    this.channel.finish();
  }
}

function read<T>(schema: v.GenericSchema<unknown, T>, value: unknown): T {
  const failure = v.safeParse(Failure, value);
  if (failure.success) throw CaravanError.fromJSON(failure.output.error);
  const parsed = v.safeParse(schema, value);
  if (parsed.success) return parsed.output;
  throw new CaravanError("download_failed", "the other node's answer makes no sense");
}
