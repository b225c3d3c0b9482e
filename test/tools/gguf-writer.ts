// Builds small GGUF files for tests, byte for byte, so that the tests need no other tool. It writes what it is
// told, including nonsense.

import { ggmlTypeId } from "../../src/model/gguf/tensor-types.ts";

export type Kv =
  | { type: "u32" | "i32" | "f32" | "u64"; value: number }
  | { type: "bool"; value: boolean }
  | { type: "string"; value: string }
  | { type: "strings"; value: string[] }
  | { type: "i32s" | "f32s"; value: number[] };

export interface TensorInput {
  name: string;
  /** GGUF's name of the type. */
  type: string;
  /** Outermost first. */
  shape: number[];
  data: Uint8Array;
}

const TYPE_ID = { u32: 4, i32: 5, f32: 6, bool: 7, string: 8, u64: 10 } as const;

class Bytes {
  #bytes = new Uint8Array(1 << 12);
  length = 0;

  raw(data: Uint8Array): void {
    while (this.length + data.length > this.#bytes.length) {
      const grown = new Uint8Array(this.#bytes.length * 2);
      grown.set(this.#bytes);
      this.#bytes = grown;
    }
    this.#bytes.set(data, this.length);
    this.length += data.length;
  }

  number(bytes: number, set: (view: DataView) => void): void {
    const buffer = new Uint8Array(bytes);
    set(new DataView(buffer.buffer));
    this.raw(buffer);
  }

  u32 = (n: number) => this.number(4, (v) => v.setUint32(0, n, true));
  i32 = (n: number) => this.number(4, (v) => v.setInt32(0, n, true));
  f32 = (n: number) => this.number(4, (v) => v.setFloat32(0, n, true));
  u64 = (n: number | bigint) => this.number(8, (v) => v.setBigUint64(0, BigInt(n), true));

  text(s: string): void {
    const bytes = new TextEncoder().encode(s);
    this.u64(bytes.length);
    this.raw(bytes);
  }

  padTo(alignment: number): void {
    this.raw(new Uint8Array((alignment - (this.length % alignment)) % alignment));
  }

  done(): Uint8Array<ArrayBuffer> {
    return this.#bytes.slice(0, this.length);
  }
}

/** A GGUF version 3 file. Tensor data is laid out in order, each piece on `alignment`. */
export function buildGguf(
  metadata: Record<string, Kv>,
  tensors: TensorInput[],
  alignment = 32,
): Uint8Array<ArrayBuffer> {
  const out = new Bytes();
  out.raw(new TextEncoder().encode("GGUF"));
  out.u32(3);
  out.u64(tensors.length);
  out.u64(Object.keys(metadata).length);
  for (const [key, kv] of Object.entries(metadata)) {
    out.text(key);
    writeValue(out, kv);
  }
  let offset = 0;
  for (const t of tensors) {
    out.text(t.name);
    out.u32(t.shape.length);
    for (const n of [...t.shape].reverse()) out.u64(n);
    out.u32(ggmlTypeId(t.type) ?? 9999);
    out.u64(offset);
    offset += Math.ceil(t.data.length / alignment) * alignment;
  }
  for (const t of tensors) {
    out.padTo(alignment);
    out.raw(t.data);
  }
  return out.done();
}

function writeValue(out: Bytes, kv: Kv): void {
  switch (kv.type) {
    case "strings":
      out.u32(9);
      out.u32(8);
      out.u64(kv.value.length);
      for (const s of kv.value) out.text(s);
      return;
    case "i32s":
    case "f32s":
      out.u32(9);
      out.u32(kv.type === "i32s" ? 5 : 6);
      out.u64(kv.value.length);
      for (const n of kv.value) (kv.type === "i32s" ? out.i32 : out.f32)(n);
      return;
    default:
      out.u32(TYPE_ID[kv.type]);
  }
  if (kv.type === "string") out.text(kv.value);
  else if (kv.type === "bool") out.raw(new Uint8Array([kv.value ? 1 : 0]));
  else if (kv.type === "f32") out.f32(kv.value);
  else if (kv.type === "i32") out.i32(kv.value);
  else if (kv.type === "u64") out.u64(kv.value);
  else out.u32(kv.value);
}

/** float32 data of a shape, from a function of the flat index. */
export function floats(shape: number[], value: (i: number) => number): Uint8Array {
  const data = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => value(i));
  return new Uint8Array(data.buffer);
}

export interface TinyModel {
  metadata: Record<string, Kv>;
  tensors: TensorInput[];
}

const u32 = (value: number): Kv => ({ type: "u32", value });

/** A byte-level BPE tokenizer of 8 tokens: two merges, one control token at each end. */
export function tinyTokenizer(pre: string): Record<string, Kv> {
  return {
    "tokenizer.ggml.model": { type: "string", value: "gpt2" },
    "tokenizer.ggml.pre": { type: "string", value: pre },
    "tokenizer.ggml.tokens": {
      type: "strings",
      value: ["<|start|>", "a", "b", "c", "ab", "abc", "Ġ", "<|eot|>"],
    },
    "tokenizer.ggml.token_type": { type: "i32s", value: [3, 1, 1, 1, 1, 1, 1, 3] },
    "tokenizer.ggml.merges": { type: "strings", value: ["a b", "ab c"] },
    "tokenizer.ggml.bos_token_id": u32(0),
    "tokenizer.ggml.eos_token_id": u32(7),
    "tokenizer.chat_template": { type: "string", value: "{{ messages }}" },
  };
}

/** A whole Llama or Llama 4 model in float32 with 2 layers; the numbers name their place. */
export function tinyModel(architecture: "llama" | "llama4"): TinyModel {
  const [hidden, ff, heads, kv, dim, vocab, experts, expertFf] = [32, 64, 2, 1, 16, 8, 4, 32];
  const key = (name: string) => `${architecture}.${name}`;
  const metadata: Record<string, Kv> = {
    "general.architecture": { type: "string", value: architecture },
    "general.name": { type: "string", value: "tiny" },
    [key("block_count")]: u32(2),
    [key("context_length")]: u32(1024),
    [key("embedding_length")]: u32(hidden),
    [key("feed_forward_length")]: u32(ff),
    [key("attention.head_count")]: u32(heads),
    [key("attention.head_count_kv")]: u32(kv),
    [key("rope.dimension_count")]: u32(dim),
    [key("rope.freq_base")]: { type: "f32", value: 500000 },
    [key("attention.layer_norm_rms_epsilon")]: { type: "f32", value: 1e-5 },
    ...tinyTokenizer(architecture === "llama" ? "llama-bpe" : "llama4"),
  };
  const tensors: TensorInput[] = [];
  const put = (name: string, ...shape: number[]) => {
    const base = tensors.length;
    tensors.push({
      name: `${name}.weight`,
      type: "F32",
      shape,
      data: floats(shape, (i) => base + i / 65536),
    });
  };
  put("token_embd", vocab, hidden);
  put("output_norm", hidden);
  put("output", vocab, hidden);
  for (let i = 0; i < 2; i++) {
    const b = `blk.${i}.`;
    put(`${b}attn_norm`, hidden);
    put(`${b}ffn_norm`, hidden);
    put(`${b}attn_q`, heads * dim, hidden);
    put(`${b}attn_k`, kv * dim, hidden);
    put(`${b}attn_v`, kv * dim, hidden);
    put(`${b}attn_output`, hidden, heads * dim);
    if (architecture === "llama4" && i === 1) {
      put(`${b}ffn_gate_inp`, experts, hidden);
      for (const n of ["gate", "up"]) put(`${b}ffn_${n}_exps`, experts, expertFf, hidden);
      put(`${b}ffn_down_exps`, experts, hidden, expertFf);
      for (const n of ["gate", "up"]) put(`${b}ffn_${n}_shexp`, expertFf, hidden);
      put(`${b}ffn_down_shexp`, hidden, expertFf);
    } else {
      for (const n of ["gate", "up"]) put(`${b}ffn_${n}`, ff, hidden);
      put(`${b}ffn_down`, hidden, ff);
    }
  }
  if (architecture === "llama4") {
    metadata[key("expert_count")] = u32(experts);
    metadata[key("expert_used_count")] = u32(1);
    metadata[key("expert_feed_forward_length")] = u32(expertFf);
    metadata[key("interleave_moe_layer_step")] = u32(2);
  }
  return { metadata, tensors };
}
