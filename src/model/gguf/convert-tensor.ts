// Converts one GGUF tensor to its MLX tensors, a few megabytes at a time: reads rows, puts q and k rows back into
// half-split order, repacks blocks, and appends codes, scales and biases to the writer.

import type { FileHandle } from "node:fs/promises";
import { CaravanError } from "../../errors.ts";
import type { Dtype } from "../safetensors.ts";
import { readExactly } from "../safetensors-header.ts";
import type { SafetensorsWriter, TensorSpec } from "../safetensors-writer.ts";
import {
  type AffineTarget,
  GROUP_SIZE,
  noLoss,
  type Repacker,
  type RepackLoss,
  repackerFor,
  type ScaleType,
} from "./repack.ts";
import type { PlannedTensor } from "./tensor-plan.ts";

/** Bytes of source rows converted at once. */
const PIECE_BYTES = 4 << 20;
/** No row of a real model comes near; one that long would be read whole. */
const MAX_ROW_BYTES = 64 << 20;

export interface Conversion {
  planned: PlannedTensor;
  /** Undefined: the floats are copied. */
  repacker: Repacker | undefined;
  /** weight, and for quantized tensors scales and biases. */
  outputs: TensorSpec[];
  outputBytes: number;
}

const FLOATS: Record<string, Dtype> = { F32: "F32", F16: "F16", BF16: "BF16" };

/** Decides what a tensor becomes. @throws CaravanError unsupported_model for types that cannot be kept */
export function planConversion(planned: PlannedTensor, kScales: ScaleType): Conversion {
  const { source, module, kind } = planned;
  const float = FLOATS[source.type.name];
  if (float !== undefined) {
    const spec = { name: `${module}.${kind}`, dtype: float, shape: source.shape };
    return { planned, repacker: undefined, outputs: [spec], outputBytes: source.sizeBytes };
  }
  const repacker = repackerFor(source.type.name, kScales);
  if (repacker === undefined || source.shape.length < 2) {
    throw new CaravanError(
      "unsupported_model",
      `tensor ${source.name} is ${source.type.name} [${source.shape}], which is not supported`,
      {
        where: source.path,
        hint: "Use a file in Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, F16, BF16 or F32.",
      },
    );
  }
  const outer = source.shape.slice(0, -1);
  const groups = (source.shape[source.shape.length - 1] ?? 0) / GROUP_SIZE;
  const scales = { dtype: repacker.scaleType, shape: [...outer, groups] };
  const outputs: TensorSpec[] = [
    { name: `${module}.weight`, dtype: "U32", shape: [...outer, groups * repacker.bits] },
    { name: `${module}.scales`, ...scales },
    { name: `${module}.biases`, ...scales },
  ];
  const allGroups = outer.reduce((a, b) => a * b, 1) * groups;
  const scaleBytes = repacker.scaleType === "F32" ? 4 : 2;
  return { planned, repacker, outputs, outputBytes: allGroups * (repacker.bits * 4 + 2 * scaleBytes) };
}

/**
 * Streams the tensor. `moved` is called with the source bytes of each piece.
 * @returns what rounding did; undefined for copied floats
 */
export async function convertTensor(
  conversion: Conversion,
  file: FileHandle,
  writer: SafetensorsWriter,
  moved: (bytes: number) => void,
): Promise<RepackLoss | undefined> {
  const { planned, repacker } = conversion;
  const { source, unpermuteHeads } = planned;
  const rows =
    source.shape.length === 1 ? (source.shape[0] ?? 0) : source.shape.slice(0, -1).reduce((a, b) => a * b, 1);
  const rowBytes = source.sizeBytes / rows;
  const unit = unpermuteHeads === 0 ? 1 : rows / unpermuteHeads; // rows that must be read together
  if (rowBytes * unit > MAX_ROW_BYTES) {
    throw new CaravanError("unsupported_model", `tensor ${source.name} has rows of ${rowBytes} bytes`, {
      where: source.path,
    });
  }
  const pieceRows = Math.min(rows, Math.max(1, Math.floor(PIECE_BYTES / (rowBytes * unit))) * unit);
  const buffer = new Uint8Array(pieceRows * rowBytes);
  const ordered = unpermuteHeads === 0 ? undefined : new Uint8Array(buffer.byteLength);
  const loss = noLoss();
  for (let row = 0; row < rows; row += pieceRows) {
    const bytes = Math.min(pieceRows, rows - row) * rowBytes;
    await readExactly(file, source.path, source.offset + row * rowBytes, bytes, buffer);
    const piece = ordered === undefined ? buffer : unpermute(buffer, ordered, bytes, rowBytes, unit);
    if (repacker === undefined)
      await writer.write(conversion.outputs[0]?.name ?? "", piece.subarray(0, bytes));
    else await writePiece(conversion, repacker, piece.subarray(0, bytes), writer, loss);
    moved(bytes);
  }
  if (loss.badGroups > 0) {
    throw new CaravanError(
      "bad_file",
      `tensor ${source.name} has ${loss.badGroups} scales that are not finite numbers`,
      {
        where: source.path,
      },
    );
  }
  return repacker === undefined ? undefined : loss;
}

async function writePiece(
  { planned, outputs }: Conversion,
  repacker: Repacker,
  piece: Uint8Array,
  writer: SafetensorsWriter,
  loss: RepackLoss,
): Promise<void> {
  const blocks = piece.byteLength / planned.source.type.blockBytes;
  const groups = blocks * repacker.groupsPerBlock;
  const scaleArray = () =>
    repacker.scaleType === "F32" ? new Float32Array(groups) : new Uint16Array(groups);
  const to: AffineTarget = {
    codes: new Uint8Array(groups * repacker.bits * 4),
    scales: scaleArray(),
    biases: scaleArray(),
  };
  repacker.repack(piece, blocks, to, loss);
  const parts = [to.codes, asBytes(to.scales), asBytes(to.biases)];
  for (const [i, output] of outputs.entries()) await writer.write(output.name, parts[i] ?? new Uint8Array(0));
}

function asBytes(array: Uint16Array | Float32Array): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}

/**
 * GGUF keeps the two halves of a Llama head interleaved (row 2j is dimension j, row 2j+1 is j + headDim/2); MLX and
 * Hugging Face keep them one after the other.
 */
function unpermute(
  from: Uint8Array,
  to: Uint8Array,
  bytes: number,
  rowBytes: number,
  headDim: number,
): Uint8Array {
  const half = headDim / 2;
  for (let head = 0; head < bytes; head += headDim * rowBytes) {
    for (let j = 0; j < half; j++) {
      const even = head + 2 * j * rowBytes;
      to.set(from.subarray(even, even + rowBytes), head + j * rowBytes);
      to.set(from.subarray(even + rowBytes, even + 2 * rowBytes), head + (j + half) * rowBytes);
    }
  }
  return to;
}
