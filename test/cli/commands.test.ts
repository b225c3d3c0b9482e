// The command line of the built executable: help, version, wrong use, and outputs that fail.

import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { built, Place, PROGRAM } from "../tools/built-caravan.ts";
import { TINY_CHAT_VOCAB, writeTinyChatModel } from "../tools/tiny-chat-model.ts";

const place = new Place();
const model = writeTinyChatModel(place.path("tiny"));
afterAll(() => place.remove());

const COMMANDS = [
  "run",
  "serve",
  "ps",
  "stop",
  "pull",
  "import",
  "models",
  "plan",
  "bench",
  "logits",
  "tokenize",
  "template",
  "doctor",
  "config",
  "completion",
  "licenses",
];

describe.skipIf(!built)("the executable", () => {
  test("answers in an empty folder with an empty HOME and nothing else in the environment", async () => {
    const bare = Bun.spawn([PROGRAM, "run", model, "hi", "-n", "3", "--here"], {
      cwd: place.cwd,
      env: { HOME: "" },
      stdout: "pipe",
      stderr: "pipe",
    });
    const err = await bare.stderr.text();
    expect(err).toContain("answer 3 tokens");
    expect(await bare.exited).toBe(0);
    expect((await bare.stdout.text()).length).toBeGreaterThan(0);
    expect(readdirSync(place.cwd)).toEqual([]);
  });

  test("takes neither code nor settings from the folder it runs in", async () => {
    const cwd = place.path("hostile");
    mkdirSync(cwd);
    writeFileSync(join(cwd, "bunfig.toml"), 'preload = ["./preload.ts"]\n');
    writeFileSync(join(cwd, "preload.ts"), 'console.log("loaded"); process.exit(3);\n');
    writeFileSync(join(cwd, ".env"), "CARAVAN_MAX_QUEUE=not-a-number\n");
    const ended = await place.run(["models", "--json"], { cwd });
    expect(ended).toMatchObject({ code: 0, err: "" });
    expect(JSON.parse(ended.out)).toEqual({ models: [], partial: [] });
  });

  test("says its version", async () => {
    const { version } = JSON.parse(readFileSync(join(import.meta.dir, "../../package.json"), "utf8"));
    for (const flag of ["--version", "-V", "version"]) {
      expect(await place.run([flag])).toEqual({ code: 0, out: `caravan ${version}\n`, err: "" });
    }
  });

  test("lists its commands and shows the help of each", async () => {
    const overview = await place.run(["--help"]);
    expect(overview.code).toBe(0);
    expect(overview.out).not.toContain("runner");
    const helps = await Promise.all(COMMANDS.map((name) => place.run([name, "--help"])));
    COMMANDS.forEach((name, i) => {
      expect(overview.out).toContain(`\n  ${name} `);
      expect(helps[i]).toMatchObject({ code: 0, err: "" });
      expect(helps[i]?.out).toStartWith(`caravan ${name}`);
    });
  });

  test.each([
    [["nonsense"], 2, 'there is no command "nonsense"'],
    [["run", "--nonsense"], 2, "--nonsense"],
    [["logits"], 2, "`caravan logits` takes MODEL"],
    [["logits", "tiny", "--out", "x.npy"], 2, "--tokens-file is missing"],
    [["run", "--context", "0", "m"], 2, "--context takes a whole number"],
    [["run", "--port", "70000", "m"], 2, "--port takes a whole number from 1 to 65535"],
    [["run", "--temperature", "hot", "m", "x"], 2, "--temperature takes a number"],
    [["serve", "--log-level", "loud"], 2, "--log-level is one of debug"],
    [["bench", "tiny", "--streams", "1,x"], 2, "--streams takes whole numbers"],
    [["import", "x.gguf", "--scales", "f64"], 2, "--scales is one of f16, f32"],
    [["import", "x.gguf", "--name", "../up"], 2, "--name takes letters"],
    [
      ["logits", "tiny", "--out", "x", "--tokens-file", "t", "--transport", "mail"],
      2,
      "--transport is one of auto",
    ],
    [["bench", "tiny", "--pipeline", "0"], 2, "--pipeline takes a whole number from 1 to 64"],
    [["plan", "tiny", "--streams", "0"], 2, "--streams takes a whole number"],
    [["run", "nope/nothing", "x"], 1, "caravan pull nope/nothing"],
    [["run", "smollm2", "x"], 1, "caravan pull smollm2"],
  ] as [string[], number, string][])("%j ends with %d and says why", async (args, code, message) => {
    const ended = await place.run(args);
    expect(ended.err).toContain(message);
    expect(ended).toMatchObject({ code, out: "" });
    expect(ended.err).not.toMatch(/^\s+at /m);
  });

  test("an empty prompt is refused before anything is loaded", async () => {
    for (const stdin of ["", " \n"]) {
      const ended = await place.run(["run", model], { stdin });
      expect(ended).toMatchObject({ code: 2, out: "" });
      expect(ended.err).toContain("the prompt is empty");
    }
  });

  test("a wrong setting names the variable or the file's line", async () => {
    const wrong = await place.run(["models"], { env: { CARAVAN_MAX_QUEUE: "many" } });
    expect(wrong).toMatchObject({ code: 2, out: "" });
    expect(wrong.err).toContain("CARAVAN_MAX_QUEUE: max_queue");
    const file = place.path("wrong.toml");
    writeFileSync(file, "port = 1\nqueue = 3\n");
    const line = await place.run(["models"], { env: { CARAVAN_CONFIG: file } });
    expect(line.code).toBe(2);
    expect(line.err).toContain(`${file}: line 2: queue is not a setting`);
  });

  test("a reader that leaves ends it without a word", async () => {
    const ended = Bun.spawnSync(["bash", "-c", 'set -o pipefail; "$0" models --cards | true', PROGRAM], {
      cwd: place.cwd,
      env: place.env,
    });
    expect(ended.stderr.toString()).toBe("");
    expect([0, 141]).toContain(ended.exitCode);
  });

  test.skipIf(!existsSync("/dev/full"))("an output that is full gives one line", async () => {
    const ended = Bun.spawnSync(["bash", "-c", '"$0" models --cards >/dev/full', PROGRAM], {
      cwd: place.cwd,
      env: place.env,
    });
    expect(ended.stderr.toString()).toMatch(/^caravan: the output cannot be written: ENOSPC[^\n]*\n$/);
    expect(ended.exitCode).toBe(1);
  });
});

describe.skipIf(!built)("doctor and models", () => {
  test("doctor checks the machine and gives JSON", async () => {
    const ended = await place.run(["doctor", "--json"]);
    const checks: { name: string; ok: boolean }[] = JSON.parse(ended.out);
    expect(checks.map((check) => check.name)).toEqual(
      expect.arrayContaining(["processor", "memory", "settings", "models folder", "cards", "models"]),
    );
    expect(ended.code).toBe(checks.every((check) => check.ok) ? 0 : 1);
  });

  test("models lists what is here, and removes it", async () => {
    const empty = await place.run(["models"]);
    expect(empty.out).toContain("no models here yet: `caravan pull MODEL`");
    writeTinyChatModel(join(place.models, "mine"));
    expect((await place.run(["models"])).out).toMatch(/^mine +[\d.]+ MB +imported +\S+\/mine$/m);
    const listed = JSON.parse((await place.run(["models", "--json"])).out);
    expect(listed).toMatchObject({ models: [{ name: "mine", source: "imported" }], partial: [] });
    expect(await place.run(["models", "--remove", "mine"])).toMatchObject({ code: 0 });
    expect(existsSync(join(place.models, "mine"))).toBe(false);
    expect(await place.run(["models", "--remove", "mine"])).toMatchObject({ code: 1, out: "" });
  });
});

describe.skipIf(!built)("tokenize and template", () => {
  const expected = JSON.parse(
    readFileSync(join(import.meta.dir, "../fixtures/chat/tiny-bytes/expected.json"), "utf8"),
  );

  test("tokenize gives the ids that the reference tokenizer gives", async () => {
    const cases: { text: string; ids: number[] }[] = expected.encode ?? [];
    expect(cases.length).toBeGreaterThan(10);
    writeFileSync(place.path("in.json"), JSON.stringify(cases.map((each) => each.text)));
    const out = place.path("ids.json");
    expect(await place.run(["tokenize", model, "--in", place.path("in.json"), "--out", out])).toEqual({
      code: 0,
      out: "",
      err: "",
    });
    expect(JSON.parse(readFileSync(out, "utf8"))).toEqual(cases.map((each) => each.ids));
  });

  test("template renders a chat, and its ids are in the vocabulary", async () => {
    writeFileSync(
      place.path("chats.json"),
      JSON.stringify([{ messages: [{ role: "user", content: "<|end|> hi" }], add_generation_prompt: true }]),
    );
    const out = place.path("prompts.json");
    const args = ["template", model, "--in", place.path("chats.json"), "--out", out];
    expect(await place.run(args)).toMatchObject({ code: 0, err: "" });
    const [prompt] = JSON.parse(readFileSync(out, "utf8"));
    expect(prompt.text).toBe(
      "<|begin|><|start|>user<|middle|>\n\n<|end|> hi<|end|><|start|>assistant<|middle|>\n\n<think>",
    );
    expect(prompt.ids.every((id: number) => id < TINY_CHAT_VOCAB)).toBe(true);
    // What the user typed is text: only the template's own end of turn is the token.
    expect(prompt.ids.filter((id: number) => id === 703)).toHaveLength(1);
  });

  test("standard output can be the file, and a device is never replaced by a file", async () => {
    writeFileSync(place.path("one.json"), '["hi"]');
    const args = ["tokenize", model, "--in", place.path("one.json"), "--out"];
    const shown = Bun.spawnSync(["bash", "-c", '"$@" /dev/stdout | cat', "bash", PROGRAM, ...args], {
      cwd: place.cwd,
      env: place.env,
    });
    expect(JSON.parse(shown.stdout.toString())).toHaveLength(1);
    expect(await place.run([...args, "/dev/null"])).toMatchObject({ code: 0, err: "" });
    expect(existsSync("/dev/null.partial")).toBe(false);
  });

  test.each([
    ["not there", undefined, 2, "cannot be read"],
    ["not JSON", "[", 2, "is not JSON"],
    ["not strings", '["a",1]', 2, "1: "],
  ] as [string, string | undefined, number, string][])(
    "an input that is %s is refused",
    async (name, text, code, message) => {
      const input = place.path(`${name}.json`);
      if (text !== undefined) writeFileSync(input, text);
      const out = place.path("never.json");
      const ended = await place.run(["tokenize", model, "--in", input, "--out", out]);
      expect(ended).toMatchObject({ code, out: "" });
      expect(ended.err).toContain(`${input}: ${message}`);
      expect(existsSync(out)).toBe(false);
    },
  );
});
