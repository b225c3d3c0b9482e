// Scout and Maverick at real size, from files that are nearly all hole: sizes against the published ones, and decode steps
// on the CPU through layers of full size, with the last of 128 experts beyond 2^32 elements, and at position 10 million.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { open } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseModelConfig } from "../../src/model/config.ts";
import { makeLoadPlan } from "../../src/model/load-plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import {
  llama4Checkpoint,
  llama4Config,
  llama4Shards,
  llama4Tensors,
  llama4VisionTensors,
  tensorBytes,
} from "../tools/llama4-shapes.ts";
import { stepOnce, writeSparseModel } from "../tools/make-sparse-model.ts";

const NAMES = ["scout", "maverick"] as const;
/** A step over 10 million keys on two slow cores. */
const TIME_LIMIT_MS = 180_000;

let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-sparse-"));
});
afterEach(() => {
  rmSync(dir, { recursive: true });
});

describe("the shapes", () => {
  test.each(NAMES)("of %s, its image encoder and a header are the published size", (name) => {
    const specs = [...llama4Tensors(name), ...llama4VisionTensors()];
    const card = readFileSync(join(import.meta.dir, `../../cards/${name}-4bit.toml`), "utf8");
    const published = Number(/^in_bytes = (\d+)$/m.exec(card)?.[1]);
    // Headers are JSON with name, type, shape and two offsets of each tensor.
    const header = (published - tensorBytes(llama4Shards(specs))) / specs.length;
    expect(header).toBeGreaterThan(110);
    expect(header).toBeLessThan(160);
  });

  test.each(NAMES)("of %s are planned the same with the image encoder, which is left out", (name) => {
    const config = parseModelConfig(llama4Config(name), "/m/config.json");
    const plan = (specs: ReturnType<typeof llama4Tensors>) =>
      makeLoadPlan(config, llama4Checkpoint(llama4Shards(specs)));
    const text = plan(llama4Tensors(name));
    const whole = plan([...llama4Tensors(name), ...llama4VisionTensors()]);
    expect(whole.unused).toEqual([]);
    const shape = ({ slot, layer, name: tensor, experts, rows, cols }: (typeof text.tensors)[number]) =>
      [slot, layer, tensor, experts, rows, cols].join(" ");
    expect(whole.tensors.map(shape)).toEqual(text.tensors.map(shape));
  });
});

/** Writes bytes into a tensor of the sparse model, from element `first` on (uint32 words of codes, bf16 otherwise). */
async function poke(tensor: string, first: number, bytes: Uint8Array): Promise<void> {
  const found = (await openCheckpoint(dir)).tensors.get(`language_model.${tensor}`);
  if (found === undefined) throw new Error(`no tensor ${tensor}`);
  const at = found.offset + first * (found.dtype === "U32" ? 4 : 2);
  const file = await open(found.file, "r+");
  try {
    await file.write(bytes, 0, bytes.length, at);
  } finally {
    await file.close();
  }
}

/** `count` bf16 values; `value` must be one that bf16 holds. */
function bf16(value: number, count: number): Uint8Array {
  const high = new Uint32Array(Float32Array.of(value).buffer)[0] ?? 0;
  return new Uint8Array(new Uint16Array(count).fill(high >>> 16).buffer);
}

/** Rows of 4-bit codes that are all 1. */
const ones = (count: number) => new Uint8Array(count / 2).fill(0x11);

describe("one decode step", () => {
  test(
    "through Maverick's layers reads the last of 128 experts, beyond element 2^32",
    async () => {
      const [hidden, ff, experts, group] = [5120, 8192, 128, 64];
      const [expert, neuron, column, token] = [experts - 1, 8190, 5000, 202_047];
      writeSparseModel(dir, "maverick", 2);
      expect(expert * ff * hidden).toBeGreaterThan(2 ** 32);
      const feed = "model.layers.1.feed_forward.";
      // The token's embedding and the norms are 1, attention and the dense layer 0, so the experts' input is 1.
      await poke("model.embed_tokens.biases", (1 * hidden) / group, bf16(1, hidden / group));
      await poke("model.layers.1.post_attention_layernorm.weight", 0, bf16(1, hidden));
      await poke("model.norm.weight", 0, bf16(1, hidden));
      await poke(`${feed}router.biases`, (expert * hidden) / group, bf16(1, hidden / group));
      // One neuron of the last expert gives silu(1.25)·1.25; one row of `down` takes it four times.
      for (const name of ["gate_proj", "up_proj"]) {
        const row = expert * ff + neuron;
        await poke(`${feed}experts.${name}.weight`, (row * hidden) / 8, ones(hidden));
        await poke(`${feed}experts.${name}.scales`, (row * hidden) / group, bf16(1 / 4096, hidden / group));
      }
      const row = expert * hidden + column;
      await poke(`${feed}experts.down_proj.weight`, (row * ff) / 8, ones(ff));
      await poke(`${feed}experts.down_proj.scales`, (row * ff) / group, bf16(4, ff / group));
      // One token's head row sees that column's group.
      await poke("lm_head.biases", Math.floor((token * hidden + column) / group), bf16(1, 1));

      const added = 4 * 1.25 * (1.25 / (1 + Math.exp(-1.25)));
      const rms = Math.sqrt((hidden - 1 + (1 + added) ** 2) / hidden);
      const wanted = (group + added) / rms;
      expect(wanted).toBeGreaterThan(1.07 * group);
      // In fast the head's input has 8 bits beside that column.
      for (const [compute, tolerance] of [
        ["exact", 1e-4],
        ["fast", 0.03],
      ] as const) {
        const { logits, weightsMapped } = await stepOnce(dir, { compute });
        expect(Math.abs((logits[token] ?? Number.NaN) / wanted - 1), compute).toBeLessThan(tolerance);
        expect(logits.filter((value) => value !== 0).length).toBe(1);
        expect(weightsMapped).toBe(10_507_028_480);
      }
    },
    TIME_LIMIT_MS,
  );

  test(
    "at position 9,999,999 reads ten million keys of Scout's shape",
    async () => {
      // The second layer attends to everything, the first to its chunk.
      writeSparseModel(dir, "scout", 2, { no_rope_layers: [1, 0] });
      const { logits, step, weightsCopied } = await stepOnce(dir, { position: 9_999_999 });
      expect(logits.length).toBe(202_048);
      expect(logits.findIndex((value) => value !== 0)).toBe(-1);
      console.log(`a step over 10 million keys in one layer of Scout's shape took ${Math.round(step)} ms`);
      // Only the norms: everything else is read where it lies.
      expect(weightsCopied).toBeLessThan(2 ** 20);
    },
    TIME_LIMIT_MS,
  );
});
