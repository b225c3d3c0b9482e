// The smallest set of files that counts as a whole model, for tests of downloads and of the store.

import type { HubFile } from "./misbehaving-hub.ts";

/** A safetensors file with one U8 tensor of `dataBytes`, the same bytes for the same seed. `headPad`: spaces that move
 * the data, to make it misaligned for wider types. */
export function safetensors(
  dataBytes: number,
  seed = 1,
  dtype: "U8" | "F32" = "U8",
  headPad = 0,
): Uint8Array {
  const shape = [dtype === "U8" ? dataBytes : dataBytes / 4];
  const json = JSON.stringify({ w: { dtype, shape, data_offsets: [0, dataBytes] } });
  const padded = json.padEnd(Math.ceil(json.length / 8) * 8 + headPad);
  const bytes = new Uint8Array(8 + padded.length + dataBytes);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(padded.length), true);
  bytes.set(new TextEncoder().encode(padded), 8);
  let state = seed >>> 0 || 1;
  for (let i = 8 + padded.length; i < bytes.length; i += 1) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    bytes[i] = state & 255;
  }
  return bytes;
}

export function text(value: unknown): Uint8Array {
  return new TextEncoder().encode(typeof value === "string" ? value : JSON.stringify(value));
}

/** config.json, tokenizer.json and one weight file of about `weightBytes`. */
export function tinyModel(weightBytes: number): HubFile[] {
  return [
    { path: "config.json", content: text({ model_type: "llama" }) },
    { path: "tokenizer.json", content: text({ version: "1.0", model: { type: "BPE" } }) },
    { path: "model.safetensors", content: safetensors(weightBytes) },
  ];
}
