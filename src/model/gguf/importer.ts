// `caravan import FILE.gguf`: a Llama or Llama 4 GGUF becomes an MLX checkpoint folder. Everything that can be
// refused is refused before the first byte is written; the folder gets its name only when it is complete.

import { mkdir, readdir, rename, rm, statfs } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import { CaravanError } from "../../errors.ts";
import { AtomicFile, syncFolder, writeError } from "../atomic-file.ts";
import { INDEX_FILE, SINGLE_FILE } from "../safetensors.ts";
import { openForReading, readExactly } from "../safetensors-header.ts";
import { SafetensorsWriter } from "../safetensors-writer.ts";
import { type Json, makeConfig, makeGenerationConfig } from "./config.ts";
import { type Conversion, convertTensor, planConversion } from "./convert-tensor.ts";
import { type Hyperparameters, readHyperparameters } from "./hyperparameters.ts";
import { LossReport, type TypeReport } from "./loss-report.ts";
import { Metadata, Text } from "./metadata.ts";
import type { ScaleType } from "./repack.ts";
import { fitRopeScaling } from "./rope-scaling.ts";
import { type GgufModel, openGguf } from "./split.ts";
import { planTensors, type TensorPlan } from "./tensor-plan.ts";
import { importTokenizer } from "./tokenizer.ts";

export interface ImportProgress {
  doneBytes: number;
  totalBytes: number;
  /** GGUF name of the tensor being converted. */
  tensor: string;
}

export interface ImportOptions {
  onProgress?: (progress: ImportProgress) => void;
  signal?: AbortSignal;
  /**
   * Scales of Q4_K and Q5_K: "F32" (default) keeps every weight exactly; "F16" saves one bit a weight and rounds
   * each scale and minimum to 11 significant bits.
   */
  kQuantScales?: ScaleType;
  /** Largest shard in bytes; one tensor is never divided. Default 5 GiB. */
  shardBytes?: number;
}

export interface ImportReport {
  /** The GGUF files that were read. */
  sources: string[];
  /** The folder that was written. */
  path: string;
  architecture: "llama" | "llama4";
  name: string | undefined;
  tensors: number;
  bytesRead: number;
  /** Of all files written. */
  bytes: number;
  files: string[];
  /** True where every weight has exactly the value it has in the GGUF. */
  lossless: boolean;
  /** One entry for each GGUF type in the file: what it became and what that cost. */
  types: TypeReport[];
  /** What was not kept exactly and anything else a reader should know, as sentences. */
  notes: string[];
}

const DEFAULT_SHARD_BYTES = 5 * 2 ** 30;

/**
 * @param path any file of the model
 * @param outDir must not exist (an empty folder is fine)
 * @throws CaravanError bad_file, unsupported_model, invalid_argument, disk_full, cancelled
 */
export async function importGguf(
  path: string,
  outDir: string,
  options: ImportOptions = {},
): Promise<ImportReport> {
  const model = openGguf(path);
  const prepared = await prepare(model, options);
  const target = resolve(outDir);
  await checkTarget(target, prepared.bytes);
  const partial = `${target}.${process.pid}.partial`;
  try {
    await rm(partial, { recursive: true, force: true });
    await mkdir(partial, { recursive: true });
    const written = await writeAll(partial, prepared, options);
    await rename(partial, target);
    await syncFolder(dirname(target));
    return report(model, target, prepared, written);
  } catch (cause) {
    await rm(partial, { recursive: true, force: true });
    throw writeError(target, cause);
  }
}

interface Prepared {
  hp: Hyperparameters;
  plan: TensorPlan;
  shards: Conversion[][];
  /** File name to content. */
  documents: Map<string, Json>;
  /** Weights and documents, without headers. */
  bytes: number;
  notes: string[];
  name: string | undefined;
}

/** Reads and checks everything but the weights. */
async function prepare(model: GgufModel, options: ImportOptions): Promise<Prepared> {
  const meta = new Metadata(model);
  const hp = readHyperparameters(meta);
  const plan = planTensors(model, hp, meta);
  const conversions = plan.tensors.map((t) => planConversion(t, options.kQuantScales ?? "F32"));
  const tokenizer = importTokenizer(meta);
  if (tokenizer.tokenCount > plan.vocabSize) {
    throw meta.bad(`${tokenizer.tokenCount} tokens do not fit ${plan.vocabSize} embeddings`);
  }
  const ropeScaling = await readRopeScaling(plan, hp, meta);
  const config = makeConfig({
    hp,
    plan,
    ropeScaling,
    ids: tokenizer.ids,
    bits: moduleBits(conversions),
    torchDtype: activationType(conversions),
  });
  const documents = new Map<string, Json>([
    ["config.json", config],
    ["generation_config.json", makeGenerationConfig(tokenizer.ids)],
    ["tokenizer_config.json", tokenizer.tokenizerConfig],
    ["tokenizer.json", tokenizer.tokenizer],
  ]);
  const shards = cutShards(conversions, options.shardBytes ?? DEFAULT_SHARD_BYTES);
  const bytes = conversions.reduce((sum, c) => sum + c.outputBytes, 0);
  const notes = [...tokenizer.notes, ...assumptions(hp)];
  return { hp, plan, shards, documents, bytes, notes, name: meta.optional("general.name", Text) };
}

/** What GGUF does not say and was taken as llama.cpp takes it. */
function assumptions(hp: Hyperparameters): string[] {
  if (hp.moe === undefined) return [];
  const qk = hp.moe.experts === 128 ? "no QK norm (128 experts, as Maverick)" : "QK norm (as Scout)";
  const chunk =
    hp.moe.attentionChunk === null ? "full attention everywhere" : `chunks of ${hp.moe.attentionChunk}`;
  return [
    `GGUF does not store Llama 4's attention constants; assumed: ${qk}, ${chunk}, temperature scale 0.1 from 8192`,
  ];
}

async function readRopeScaling(plan: TensorPlan, hp: Hyperparameters, meta: Metadata) {
  const source = plan.ropeFreqs;
  if (source === undefined) return undefined;
  if (source.type.name !== "F32" || source.sizeBytes !== hp.headDim * 2) {
    throw meta.bad(
      `tensor rope_freqs.weight is ${source.type.name} [${source.shape}]; F32 [${hp.headDim / 2}] is expected`,
    );
  }
  if (hp.linearRopeFactor !== undefined)
    throw meta.unsupported("has both RoPE factors and linear RoPE scaling");
  const file = await openForReading(source.path);
  try {
    const bytes = await readExactly(file, source.path, source.offset, source.sizeBytes);
    const { headDim, ropeTheta, originalContextLength } = hp;
    const fit = { theta: ropeTheta, headDim, originalContext: originalContextLength };
    return fitRopeScaling(new Float32Array(bytes.buffer), fit, (message) => meta.unsupported(message));
  } finally {
    await file.close();
  }
}

function moduleBits(conversions: Conversion[]): Map<string, number | false> {
  const bits = new Map<string, number | false>();
  for (const { planned, repacker } of conversions) {
    if (planned.source.shape.length >= 2) bits.set(planned.module, repacker?.bits ?? false);
  }
  return bits;
}

/** bfloat16 where the file has matrices in it, float32 where it has nothing shorter, float16 elsewhere. */
function activationType(conversions: Conversion[]): "float16" | "bfloat16" | "float32" {
  const types = new Set<string>();
  for (const { planned } of conversions)
    if (planned.source.shape.length >= 2) types.add(planned.source.type.name);
  if (types.has("BF16")) return "bfloat16";
  return types.size === 1 && types.has("F32") ? "float32" : "float16";
}

function cutShards(conversions: Conversion[], limit: number): Conversion[][] {
  const shards: Conversion[][] = [];
  let size = Number.POSITIVE_INFINITY;
  for (const conversion of conversions) {
    if (size + conversion.outputBytes > limit) {
      shards.push([]);
      size = 0;
    }
    shards[shards.length - 1]?.push(conversion);
    size += conversion.outputBytes;
  }
  return shards;
}

async function checkTarget(target: string, bytes: number): Promise<void> {
  const existing = await readdir(target).catch(() => undefined);
  if (existing !== undefined && existing.length > 0) {
    throw new CaravanError("invalid_argument", "already exists", {
      where: target,
      hint: "Choose another folder or remove this one.",
    });
  }
  const parent = dirname(target);
  try {
    await mkdir(parent, { recursive: true });
    await removeStale(parent, basename(target));
    const { bavail, bsize } = await statfs(parent);
    if (bavail * bsize < bytes) {
      throw new CaravanError("disk_full", `${bytes} bytes are needed, ${bavail * bsize} are free`, {
        where: target,
        hint: "Free some space, or choose a folder on a larger disk.",
      });
    }
  } catch (cause) {
    throw writeError(target, cause);
  }
}

/** Removes what an import into the same folder left behind when its process was killed. */
async function removeStale(parent: string, name: string): Promise<void> {
  for (const entry of await readdir(parent)) {
    if (!entry.startsWith(`${name}.`)) continue;
    const pid = /^(\d+)\.partial$/.exec(entry.slice(name.length + 1))?.[1];
    if (pid !== undefined && !isRunning(Number(pid)))
      await rm(join(parent, entry), { recursive: true, force: true });
  }
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as { code?: unknown }).code !== "ESRCH";
  }
}

interface Written {
  files: string[];
  bytesRead: number;
  bytesWritten: number;
  losses: LossReport;
}

async function writeAll(dir: string, prepared: Prepared, options: ImportOptions): Promise<Written> {
  const { shards } = prepared;
  const totalBytes = shards.flat().reduce((sum, c) => sum + c.planned.source.sizeBytes, 0);
  const written: Written = { files: [], bytesRead: 0, bytesWritten: 0, losses: new LossReport() };
  const moved = (bytes: number, tensor: string) => {
    if (options.signal?.aborted === true) throw new CaravanError("cancelled", "the import was cancelled");
    written.bytesRead += bytes;
    options.onProgress?.({ doneBytes: written.bytesRead, totalBytes, tensor });
  };
  const weightMap: Json = {};
  for (const [k, shard] of shards.entries()) {
    const name =
      shards.length === 1 ? SINGLE_FILE : `model-${five(k + 1)}-of-${five(shards.length)}.safetensors`;
    written.bytesWritten += await writeShard(join(dir, name), shard, moved, written.losses);
    written.files.push(name);
    for (const output of shard.flatMap((c) => c.outputs)) weightMap[output.name] = name;
  }
  const documents = new Map(prepared.documents);
  documents.set(INDEX_FILE, { metadata: { total_size: prepared.bytes }, weight_map: weightMap });
  for (const [name, content] of documents) {
    written.bytesWritten += await writeDocument(join(dir, name), content);
    written.files.push(name);
  }
  return written;
}

async function writeShard(
  path: string,
  shard: Conversion[],
  moved: (bytes: number, tensor: string) => void,
  losses: LossReport,
): Promise<number> {
  const writer = await SafetensorsWriter.create(
    path,
    shard.flatMap((c) => c.outputs),
  );
  try {
    for (const conversion of shard) {
      const { source } = conversion.planned;
      const file = await openForReading(source.path);
      try {
        losses.add(
          conversion,
          await convertTensor(conversion, file, writer, (bytes) => moved(bytes, source.name)),
        );
      } finally {
        await file.close();
      }
    }
    await writer.finish();
  } finally {
    await writer.abort();
  }
  return writer.layout.sizeBytes;
}

async function writeDocument(path: string, content: Json): Promise<number> {
  const big = basename(path) === "tokenizer.json";
  const bytes = new TextEncoder().encode(
    big ? JSON.stringify(content) : `${JSON.stringify(content, null, 2)}\n`,
  );
  const file = await AtomicFile.create(path);
  try {
    await file.write(bytes, 0);
    await file.commit();
  } finally {
    await file.abort();
  }
  return bytes.byteLength;
}

function report(model: GgufModel, outDir: string, prepared: Prepared, written: Written): ImportReport {
  return {
    sources: model.paths,
    path: outDir,
    architecture: prepared.hp.architecture,
    name: prepared.name,
    tensors: model.tensors.size,
    bytesRead: written.bytesRead,
    bytes: written.bytesWritten,
    files: written.files,
    lossless: written.losses.lossless,
    types: written.losses.types(),
    notes: [...written.losses.notes(), ...prepared.notes],
  };
}

function five(n: number): string {
  return String(n).padStart(5, "0");
}
