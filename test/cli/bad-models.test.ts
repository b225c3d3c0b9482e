// What the built executable says to damaged checkpoints and wrong tokens: one error that names the file and the
// reason, the right exit code, no stack trace, and never a half-written output.

import { afterAll, describe, expect, test } from "bun:test";
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { readNpy } from "../../src/model/npy.ts";
import { built, Place } from "../tools/built-caravan.ts";
import { TINY_VOCAB, writeTinyLlama4 } from "../tools/tiny-llama4.ts";
import { until } from "../tools/until.ts";

const place = new Place();
const good = place.path("good");
mkdirSync(good);
writeTinyLlama4(good);
afterAll(() => place.remove());

const TOKENS = [5, 17, 42, 99, 7, 8, 9, 10, 11, 12];
writeFileSync(place.path("tokens.json"), JSON.stringify({ tokens: TOKENS }));

let serial = 0;
/** A copy of the good model, changed by `change`. */
function damaged(change: (dir: string) => void): string {
  const dir = place.path(`damaged-${++serial}`);
  cpSync(good, dir, { recursive: true });
  change(dir);
  return dir;
}

function logits(model: string, out: string, ...more: string[]) {
  return place.run(["logits", model, "--tokens-file", place.path("tokens.json"), "--out", out, ...more]);
}

type Header = Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>;

/** Rewrites the header of model.safetensors; the data stays. */
function editHeader(dir: string, edit: (header: Header) => void): void {
  const path = join(dir, "model.safetensors");
  const bytes = readFileSync(path);
  const length = Number(bytes.readBigUInt64LE(0));
  const header: Header = JSON.parse(bytes.toString("utf8", 8, 8 + length));
  edit(header);
  const text = Buffer.from(JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(path, Buffer.concat([prefix, text, bytes.subarray(8 + length)]));
}

function editConfig(dir: string, changes: Record<string, unknown>): void {
  const path = join(dir, "config.json");
  writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, "utf8")), ...changes }));
}

function tensor(header: Header, name: string): Header[string] {
  const entry = header[name];
  if (entry === undefined) throw new Error(`the tiny model has no ${name}`);
  return entry;
}

const EMBED = "model.embed_tokens.weight";
const Q = "model.layers.0.self_attn.q_proj.weight";
const WEIGHTS = "model.safetensors";

const DAMAGE: [string, string, RegExp, (dir: string) => void][] = [
  [
    "an empty weight file",
    WEIGHTS,
    /cut short|truncated|too short/,
    (d) => truncateSync(join(d, WEIGHTS), 0),
  ],
  ["truncated weights", WEIGHTS, /cut short|truncated/, (d) => truncateSync(join(d, WEIGHTS), 200_000)],
  [
    "a header that is longer than the file",
    WEIGHTS,
    /cut short|header/,
    (d) => {
      const bytes = readFileSync(join(d, WEIGHTS));
      bytes.writeBigUInt64LE(BigInt(bytes.length), 0);
      writeFileSync(join(d, WEIGHTS), bytes);
    },
  ],
  [
    "a header of 2^60 bytes",
    WEIGHTS,
    /not a safetensors file|header/,
    (d) => {
      const bytes = readFileSync(join(d, WEIGHTS));
      bytes.writeBigUInt64LE(1n << 60n, 0);
      writeFileSync(join(d, WEIGHTS), bytes);
    },
  ],
  [
    "a header that is not JSON",
    WEIGHTS,
    /not a safetensors file|JSON/,
    (d) => {
      const bytes = readFileSync(join(d, WEIGHTS));
      bytes.write("[[[[", 8);
      writeFileSync(join(d, WEIGHTS), bytes);
    },
  ],
  [
    "bytes behind the last tensor",
    WEIGHTS,
    /bytes/,
    (d) => writeFileSync(join(d, WEIGHTS), Buffer.concat([readFileSync(join(d, WEIGHTS)), Buffer.alloc(64)])),
  ],
  [
    "a shape that does not fit its bytes",
    EMBED,
    /bytes|shape/,
    (d) =>
      editHeader(d, (h) => {
        tensor(h, EMBED).shape = [TINY_VOCAB, 63];
      }),
  ],
  [
    "overlapping tensors",
    WEIGHTS,
    /overlap|bytes|gap|hole/,
    (d) =>
      editHeader(d, (h) => {
        const [begin, end] = tensor(h, Q).data_offsets;
        tensor(h, "model.layers.0.self_attn.o_proj.weight").data_offsets = [begin, end];
      }),
  ],
  [
    "an element type that does not exist",
    WEIGHTS,
    /F33/,
    (d) =>
      editHeader(d, (h) => {
        tensor(h, Q).dtype = "F33";
      }),
  ],
  [
    "a tensor of the wrong shape",
    Q,
    /shape|\[/,
    (d) =>
      editHeader(d, (h) => {
        tensor(h, Q).shape = [...tensor(h, Q).shape].reverse().map((n, i) => (i === 0 ? n * 2 : n / 2));
      }),
  ],
  [
    "a missing tensor",
    Q,
    /missing|not there|no tensor|lacks/,
    (d) =>
      editHeader(d, (h) => {
        const entry = tensor(h, Q);
        delete h[Q];
        h["model.layers.0.self_attn.x_proj.weight"] = entry;
      }),
  ],
  ["no config.json", "config.json", /not there/, (d) => rmSync(join(d, "config.json"))],
  [
    "a config that is not JSON",
    "config.json",
    /not a JSON object/,
    (d) => writeFileSync(join(d, "config.json"), "{"),
  ],
  ["an unknown architecture", "config.json", /GPTNeoX/, (d) => editConfig(d, { architectures: ["GPTNeoX"] })],
  [
    "an unknown quantization",
    "config.json",
    /awq/,
    (d) => editConfig(d, { quantization: undefined, quantization_config: { quant_method: "awq", bits: 4 } }),
  ],
  ["a lying hidden size", EMBED, /\[/, (d) => editConfig(d, { hidden_size: 128 })],
  ["more layers than tensors", "layers.4", /./, (d) => editConfig(d, { num_hidden_layers: 8 })],
  ["a negative size", "config.json", /vocab_size/, (d) => editConfig(d, { vocab_size: -5 })],
];

describe.skipIf(!built)("logits", () => {
  test("of a good model are written whole", async () => {
    const out = place.path("good.npy");
    expect(await logits(good, out)).toEqual({ code: 0, out: "", err: "" });
    expect((await readNpy(out)).shape).toEqual([TOKENS.length, TINY_VOCAB]);
  });

  test("do not depend on how the tokens are fed, in exact arithmetic", async () => {
    const ways = [["--prefill", "0"], ["--prefill", "7", "--piece", "3"], ["--threads", "1"], []];
    const files = await Promise.all(
      ways.map(async (way, i) => {
        const out = place.path(`way-${i}.npy`);
        expect(await logits(good, out, "--compute", "exact", ...way)).toMatchObject({ code: 0 });
        return (await readNpy(out)).data;
      }),
    );
    for (const data of files) {
      const worst = data.reduce((most, x, i) => Math.max(most, Math.abs(x - (files[0]?.[i] ?? 0))), 0);
      expect(worst).toBeLessThan(1e-3);
    }
  });

  test.each(DAMAGE)("refuse %s", async (_, place_, reason, damage) => {
    const dir = damaged(damage);
    const out = `${dir}.npy`;
    const ended = await logits(dir, out);
    expect(ended).toMatchObject({ code: 1, out: "" });
    expect(ended.err).toStartWith("caravan: ");
    expect(ended.err).toContain(dir);
    expect(ended.err).toContain(place_);
    expect(ended.err).toMatch(reason);
    expect(ended.err).not.toMatch(/^\s+at |undefined|\[object/m);
    expect(ended.err.trim().split("\n").length).toBeLessThanOrEqual(3);
    expect(existsSync(out) || existsSync(`${out}.partial`)).toBe(false);
  });

  test.each([
    [
      "outside the vocabulary",
      `{"tokens":[1,${TINY_VOCAB}]}`,
      `token ${TINY_VOCAB} is not in the vocabulary`,
    ],
    ["none at all", '{"tokens":[]}', "an empty list of tokens"],
    ["negative", '{"tokens":[-1]}', "tokens.0"],
    ["not whole", '{"tokens":[1.5]}', "tokens.0"],
    ["no list", '{"tokens":"abc"}', "tokens"],
    ["more than the context", JSON.stringify({ tokens: Array(4097).fill(1) }), "4096"],
  ])("refuse tokens that are %s", async (name, text, message) => {
    const file = place.path(`${name}.json`);
    writeFileSync(file, text);
    const out = place.path(`${name}.npy`);
    const ended = await place.run(["logits", good, "--tokens-file", file, "--out", out]);
    expect(ended.err).toContain(message);
    expect(ended.err).toContain(file);
    expect([1, 2]).toContain(ended.code);
    expect(existsSync(out) || existsSync(`${out}.partial`)).toBe(false);
  });

  test.skipIf(!existsSync("/dev/full"))("say when the disk is full", async () => {
    const ended = await logits(good, "/dev/full");
    expect(ended).toMatchObject({ code: 1, out: "" });
    expect(ended.err).toContain("/dev/full: no space left to write this file");
  });

  test("refuse an output in a folder that is not there before the model is loaded", async () => {
    const ended = await logits(good, join(place.path("nowhere"), "x.npy"));
    expect(ended).toMatchObject({ code: 1, out: "" });
    expect(ended.err).toContain("cannot be written (ENOENT)");
  });

  test("leave nothing behind when they are interrupted, and keep the file that was there", async () => {
    const file = place.path("many.json");
    writeFileSync(file, JSON.stringify({ tokens: Array.from({ length: 4000 }, (_, i) => i % 150) }));
    mkdirSync(place.path("cut"));
    const out = join(place.path("cut"), "logits.npy");
    writeFileSync(out, "earlier");
    const running = place.start(["logits", good, "--tokens-file", file, "--out", out, "--prefill", "0"]);
    await until(() => existsSync(`${out}.partial`), "the output is begun");
    running.kill("SIGINT");
    expect(await running.ended).toMatchObject({ code: 130, out: "", err: "caravan: interrupted\n" });
    expect(readdirSync(place.path("cut"))).toEqual(["logits.npy"]);
    expect(readFileSync(out, "utf8")).toBe("earlier");
  });
});
