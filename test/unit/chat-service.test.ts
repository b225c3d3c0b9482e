import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { cpSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { SlowRenderer } from "../../src/chat/slow-renderer.ts";
import { TextService, workerUrl } from "../../src/chat/text-service.ts";
import { Tokenizer } from "../../src/chat/tokenizer.ts";
import { CaravanError } from "../../src/errors.ts";
import { inTime } from "../tools/in-time.ts";
import { TINY_BYTES } from "./chat-folders.ts";

const MEGABYTE = 1 << 20;

async function errorOf(promise: Promise<unknown>): Promise<CaravanError> {
  try {
    await promise;
  } catch (error) {
    if (error instanceof CaravanError) return error;
    throw error;
  }
  throw new Error("no error was thrown");
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1] ?? Number.NaN;
}

describe("a text service", () => {
  let service: TextService;
  beforeAll(async () => {
    service = await TextService.start(TINY_BYTES);
  });
  afterAll(() => service.close());

  test("gives what the tokenizer gives", async () => {
    const tokenizer = await Tokenizer.load(TINY_BYTES);
    const text = "Hello <|end|> né 你好";
    expect(await service.encode(text, { specials: false })).toEqual(tokenizer.encodeText(text));
    const ids = await service.encode(text, { specials: true });
    expect(ids).toEqual(tokenizer.encodeWithSpecials(text));
    expect(await service.decode(ids)).toBe(text);
    expect(await service.encode("", { specials: false })).toEqual([]);
    expect(await service.decode([])).toBe("");
    const { vocabSize, bosId, eosIds, beginIds, hasChatTemplate } = service.info;
    expect({ vocabSize, bosId, eosIds, beginIds, hasChatTemplate }).toEqual({
      vocabSize: tokenizer.vocabSize,
      bosId: tokenizer.bosId,
      eosIds: tokenizer.eosIds,
      beginIds: tokenizer.beginIds,
      hasChatTemplate: true,
    });
  });
  test("renders chats, and streams their tokens back from shared memory", async () => {
    const { text, ids } = await service.renderChat({ messages: [{ role: "user", content: "Hi <|end|> é" }] });
    const detokenizer = service.detokenizer();
    expect(ids.map((id) => detokenizer.push(id)).join("") + detokenizer.flush()).toBe(text);
    expect(service.table.bytes.buffer).toBeInstanceOf(SharedArrayBuffer);
  });
  test("passes errors of the worker on, and goes on", async () => {
    const error = await errorOf(service.renderChat({ messages: [{ role: "nobody", content: "" }] }));
    expect(error).toMatchObject({ code: "invalid_argument", param: "messages[0].role" });
    const uncopyable = await errorOf(service.renderChat({ messages: [() => 1] }));
    expect(uncopyable.code).toBe("invalid_argument");
    const circle: unknown[] = [];
    circle.push(circle);
    for (const tools of [circle, [{ circle }]]) {
      const nested = await errorOf(service.renderChat({ messages: [{ role: "user", content: "" }], tools }));
      expect(nested.code).toBe("invalid_argument");
    }
    expect(await service.encode("a", { specials: false })).toHaveLength(1);
  });
  test("drops a cancelled request", async () => {
    const controller = new AbortController();
    const big = service.encode("a".repeat(4 * MEGABYTE), { specials: false, signal: controller.signal });
    controller.abort();
    expect((await errorOf(big)).code).toBe("cancelled");
    expect((await errorOf(service.decode([1], { signal: controller.signal }))).code).toBe("cancelled");
    expect(await service.encode("a", { specials: false })).toHaveLength(1);
  });

  test("a megabyte at work delays neither small requests nor this thread by 50 ms", async () => {
    await service.encode("warm up ".repeat(100_000), { specials: false });
    await inTime(50, async () => {
      let bigDone = 0;
      const bigs = ["a", "中", "<|", "é", "x y"].map(async (piece) => {
        const text = piece.repeat(MEGABYTE / piece.length);
        const { ids } = await service.renderChat({ messages: [{ role: "user", content: text }] });
        bigDone++;
        expect(ids.length).toBeGreaterThan(1000);
      });
      const small: number[] = [];
      const ticks: number[] = [];
      let last = performance.now();
      const timer = setInterval(() => {
        ticks.push(performance.now() - last);
        last = performance.now();
      }, 1);
      while (bigDone < bigs.length) {
        const start = performance.now();
        await service.encode("a small text", { specials: false });
        small.push(performance.now() - start);
      }
      clearInterval(timer);
      await Promise.all(bigs);
      expect(small.length).toBeGreaterThan(20);
      console.log(
        `5 MB at once: small request median ${median(small).toFixed(1)} ms, worst ${Math.max(...small).toFixed(0)} ms;`,
        `this thread's worst gap ${Math.max(...ticks).toFixed(0)} ms`,
      );
      return Math.max(median(small), median(ticks));
    });
  });
});

describe("a worker that", () => {
  const dir = mkdtempSync(join(tmpdir(), "caravan-text-"));
  beforeAll(() => cpSync(TINY_BYTES, dir, { recursive: true }));
  afterAll(() => rmSync(dir, { recursive: true }));
  const plainFiles = {
    where: "memory",
    namedTokens: { bos_token: null, eos_token: null, unk_token: null, pad_token: null },
    addedTokens: [],
    normalizer: null,
  };
  const hi = { messages: [{ role: "user", content: "Hi" }] };

  test("hangs is replaced: its job fails, the others are answered", async () => {
    // Seconds in few steps, between which nobody looks at the clock.
    const slow = "{% for i in range(400) %}{{ range(1000000)|sort(reverse=true)|length }}{% endfor %}";
    writeFileSync(join(dir, "chat_template.jinja"), slow);
    const service = await TextService.start(dir, { hangLimitMs: 1500 });
    const table = service.table;
    const stuck = errorOf(service.renderChat(hi));
    const others = ["a", "b", "a b"].map((text) => service.encode(text, { specials: false }));
    expect((await stuck).code).toBe("deadline_exceeded");
    const tokenizer = await Tokenizer.load(TINY_BYTES);
    expect(await Promise.all(others)).toEqual(["a", "b", "a b"].map((text) => tokenizer.encodeText(text)));
    expect(service.table).toBe(table);
    service.close();
  });
  test("is not held up by a template of many steps, which another thread renders", async () => {
    const steps = "{% for i in range(300) %}{% for j in range(300) %}{% endfor %}{% endfor %}";
    writeFileSync(join(dir, "chat_template.jinja"), `${steps}{{ messages[0].content }}<|end|>`);
    const service = await TextService.start(dir);
    await inTime(50, async () => {
      let rendered = 0;
      const chats = ["<|end|>", "b"].map(async (content) => {
        const chat = await service.renderChat({ messages: [{ role: "user", content }] });
        rendered++;
        return chat;
      });
      const waits: number[] = [];
      while (rendered === 0) {
        const start = performance.now();
        await service.encode("a small text", { specials: false });
        waits.push(performance.now() - start);
      }
      const tokenizer = await Tokenizer.load(TINY_BYTES);
      const end = tokenizer.addedId("<|end|>") ?? -1;
      const [hostile, other] = await Promise.all(chats);
      expect(other?.ids).toEqual([...tokenizer.encodeText("b"), end]);
      expect(hostile?.text).toBe("<|end|><|end|>");
      expect(hostile?.ids.filter((id) => id === end)).toHaveLength(1);
      return median(waits);
    });
    const leaver = new AbortController();
    const left = errorOf(service.renderChat(hi, { signal: leaver.signal }));
    leaver.abort();
    expect((await left).code).toBe("cancelled");
    const stays = errorOf(service.renderChat(hi));
    service.close();
    expect((await stays).code).toBe("shutting_down");
  }, 120_000);
  test("renders a template that does not end is killed, and the next template is rendered", async () => {
    const renderer = new SlowRenderer(workerUrl(), 4000);
    const render = (template: string) =>
      new Promise((resolve, reject) => {
        const files = { ...plainFiles, chatTemplates: { default: template } };
        renderer.add({ files, input: hi, resolve, reject, dropped: () => false });
      });
    const slow = errorOf(render("{% for i in range(600) %}{{ range(1000000)|sort|length }}{% endfor %}"));
    const next = render("fine");
    expect((await slow).code).toBe("deadline_exceeded");
    expect(await next).toEqual({ text: "fine", guard: "" });
    renderer.close();
  }, 120_000);
  test("cannot read its folder says why, and a later start can succeed", async () => {
    expect((await errorOf(TextService.start(join(dir, "nowhere")))).code).toBe("bad_file");
    writeFileSync(join(dir, "chat_template.jinja"), "fine");
    const service = await TextService.start(dir);
    expect((await service.renderChat(hi)).text).toBe("fine");
    service.close();
  });
  test("is closed rejects what is not finished and what comes later", async () => {
    const service = await TextService.start(TINY_BYTES);
    const big = errorOf(service.encode("a".repeat(MEGABYTE), { specials: false }));
    service.close();
    expect((await big).code).toBe("shutting_down");
    expect((await errorOf(service.decode([1]))).code).toBe("shutting_down");
    service.close();
  });
});
