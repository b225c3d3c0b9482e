// Gives other nodes the files of a model that is here: a list, then any ranges, each with its hash. On a connection of purpose
// "file". Only models by name, only files in the model's folder, only those that a model is made of.
//
//   asker: {model}                        holder: {files: [{name, size}]}
//   asker: {name, start, end} …           holder: bytes …, {sha256}

import { createHash } from "node:crypto";
import { open, readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import * as v from "valibot";
import { asCaravanError, CaravanError } from "../../errors.ts";
import { type Channel, MAX_BYTES_FRAME } from "./channel.ts";

/** Longest range of one request. */
export const MOST_RANGE_BYTES = 16 * 1024 * 1024;
const IDLE_LIMIT_MS = 120_000;
const MOST_FILES = 1024;

/** What a model is made of; nothing else leaves the folder. */
const FILE_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.(?:json|safetensors|jinja|txt|model)$/;

const size = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const fileName = v.pipe(v.string(), v.regex(FILE_NAME));
const Ask = v.object({ model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)) });
const Range = v.object({ name: fileName, start: size, end: size });
const Files = v.object({
  files: v.pipe(v.array(v.object({ name: fileName, size })), v.maxLength(MOST_FILES)),
});
const Hash = v.object({ sha256: v.pipe(v.string(), v.regex(/^[0-9a-f]{64}$/)) });
const Failure = v.object({ error: v.record(v.string(), v.unknown()) });

export interface ModelFile {
  name: string;
  /** Bytes. */
  size: number;
}

/** The holder's side. `folderOf`: of a model by name, throws model_not_found. Never rejects. */
export async function serveModelFiles(channel: Channel, folderOf: (model: string) => string): Promise<void> {
  try {
    const { model } = v.parse(Ask, await channel.readJson(IDLE_LIMIT_MS));
    const folder = folderOf(model);
    const files = await listFiles(folder);
    channel.send({ files });
    for (;;) {
      const frame = await channel.read(IDLE_LIMIT_MS);
      if (frame === undefined) return;
      const range = v.parse(Range, frame.kind === "json" ? frame.value : undefined);
      await sendRange(channel, folder, files, range);
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
    if (found.isFile()) files.push({ name, size: found.size });
  }
  return files;
}

async function sendRange(
  channel: Channel,
  folder: string,
  files: readonly ModelFile[],
  { name, start, end }: v.InferOutput<typeof Range>,
): Promise<void> {
  const file = files.find((each) => each.name === name);
  if (file === undefined || start >= end || end > file.size || end - start > MOST_RANGE_BYTES)
    throw new CaravanError("invalid_argument", `there are no bytes ${start} to ${end} to give`, {
      where: name,
    });
  const handle = await open(join(folder, name));
  try {
    const hash = createHash("sha256");
    for (let at = start; at < end; ) {
      const piece = new Uint8Array(Math.min(MAX_BYTES_FRAME, end - at));
      const { bytesRead } = await handle.read(piece, 0, piece.length, at);
      if (bytesRead === 0) throw new CaravanError("bad_file", "the file has become shorter", { where: name });
      const read = piece.subarray(0, bytesRead);
      hash.update(read);
      await channel.sendBytes(read);
      at += bytesRead;
    }
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

  /** Bytes [start, end) of a file, checked against the holder's hash. At most MOST_RANGE_BYTES. */
  async read(name: string, start: number, end: number): Promise<Uint8Array> {
    this.channel.send({ name, start, end });
    const bytes = new Uint8Array(end - start);
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
