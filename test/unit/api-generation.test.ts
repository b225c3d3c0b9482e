// From engine events to text: stop strings, token positions, finish reasons, cancellation and failures.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import {
  type GenerationEvent,
  type GenerationOptions,
  generate,
  type TokenInfo,
} from "../../src/api/generation.ts";
import { generateGroup } from "../../src/api/generation-group.ts";
import { GREEDY } from "../../src/engine/protocol.ts";
import { CaravanError } from "../../src/errors.ts";
import { bytesOf, END } from "../tools/byte-text.ts";
import type { Script } from "../tools/scripted-engine.ts";
import { sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

const options: GenerationOptions = { sampling: GREEDY, maxTokens: 1000 };
const hold = new Promise<void>(() => undefined);

interface Outcome {
  text: string;
  tokens: TokenInfo[];
  finish: Extract<GenerationEvent, { type: "finish" }> | undefined;
}

async function collect(script: Script, more: Partial<GenerationOptions> = {}): Promise<Outcome> {
  const outcome: Outcome = { text: "", tokens: [], finish: undefined };
  for await (const event of generate(scriptedModels(script).model, [1], { ...options, ...more })) {
    expect(outcome.finish).toBeUndefined();
    if (event.type === "finish") outcome.finish = event;
    if (event.type !== "text") continue;
    outcome.text += event.text;
    outcome.tokens.push(...event.tokens);
    for (const token of event.tokens) expect(token.offset).toBeLessThanOrEqual(outcome.text.length);
  }
  return outcome;
}

async function thrownBy(promise: Promise<unknown>): Promise<CaravanError> {
  try {
    await promise;
  } catch (thrown) {
    if (thrown instanceof CaravanError) return thrown;
    throw thrown;
  }
  throw new Error("nothing was thrown");
}

describe("text", () => {
  test("ends at the earliest stop string, whatever the text and however it is cut", async () => {
    const letters = fc.string({
      unit: fc.constantFrom("a", "b", "é", "✓", "😀"),
      minLength: 0,
      maxLength: 30,
    });
    const stop = fc.string({ unit: fc.constantFrom("a", "b", "é", "😀"), minLength: 1, maxLength: 4 });
    await fc.assert(
      fc.asyncProperty(letters, fc.array(stop, { maxLength: 3 }), async (text, stops) => {
        const { text: got, finish } = await collect(sayScript(text), { stop: stops });
        const ends = stops.filter((one) => text.includes(one)).map((one) => text.indexOf(one) + one.length);
        const end = Math.min(...ends);
        const expected = stops
          .filter((one) => text.includes(one) && text.indexOf(one) + one.length === end)
          .map((one) => text.slice(0, end - one.length))
          .sort((a, b) => a.length - b.length)[0];
        expect(got).toBe(expected ?? text);
        expect(finish?.reason).toBe("stop");
        expect(finish?.stop === undefined).toBe(expected === undefined);
      }),
      { numRuns: 200 },
    );
  });

  test("has each token once, at the place where its text begins", async () => {
    const letters = fc.string({ unit: fc.constantFrom("a", "b", "é", "😀"), maxLength: 20 });
    await fc.assert(
      fc.asyncProperty(letters, fc.constantFrom(undefined, "ab", "é"), async (text, stop) => {
        const more = stop === undefined ? {} : { stop: [stop] };
        const { text: got, tokens } = await collect(sayScript(text), { ...more, logprobs: 0 });
        expect(tokens.map((token) => token.id)).toEqual(bytesOf(got));
        const positions = Array.from(got).reduce<number[]>((list, char) => {
          const start =
            list.length === 0 ? 0 : Buffer.from(bytesOf(got).slice(0, list.length)).toString().length;
          return list.concat(bytesOf(char).map(() => start));
        }, []);
        expect(tokens.map((token) => token.offset)).toEqual(positions);
      }),
      { numRuns: 200 },
    );
  });

  test("that was held back for a stop string comes out at the end", async () => {
    const { text, tokens, finish } = await collect(sayScript("wait for sto"), {
      stop: ["stop"],
      logprobs: 0,
    });
    expect(text).toBe("wait for sto");
    expect(tokens).toHaveLength(12);
    expect(finish).toMatchObject({ reason: "stop" });
  });

  test("that ends in part of a character gets a replacement character", async () => {
    const { text, finish } = await collect({ answer: () => [97, 0xf0, 0x9f] }, { maxTokens: 3 });
    expect(text).toBe("a\ufffd");
    expect(finish?.reason).toBe("length");
  });

  test("hides control tokens unless they are asked for", async () => {
    const script: Script = { answer: () => [97, 258, 98, END] };
    expect((await collect(script)).text).toBe("ab");
    expect((await collect(script, { showSpecials: true })).text).toBe("a<|header|>b");
  });
});

describe("usage", () => {
  test("at a stop string counts no token after it, and takes cached tokens from the engine's last word", async () => {
    const script = { ...sayScript("one two three"), cachedTokens: 1 };
    const { finish } = await collect(script, { stop: ["two"] });
    expect(finish?.usage).toEqual({ prompt_tokens: 1, completion_tokens: 7, cached_tokens: 1 });
  });

  test("does not wait for ever for an engine that does not confirm a cancel", async () => {
    const script: Script = {
      ...sayScript("one two three"),
      gate: (position) => (position === 7 ? hold : undefined),
      ignoresCancel: true,
    };
    const { text, finish } = await collect(script, { stop: ["two"] });
    expect(text).toBe("one ");
    expect(finish).toMatchObject({ reason: "stop", stop: "two", timing: undefined });
  });
});

describe("cancellation", () => {
  test("by the signal reaches the engine at once and throws its reason", async () => {
    const models = scriptedModels({ ...sayScript("abc"), gate: () => hold, ignoresCancel: true });
    const abort = new AbortController();
    const run = thrownBy(Array.fromAsync(generate(models.model, [1], { ...options, signal: abort.signal })));
    await until(() => models.engine.running === 1, "the engine runs");
    abort.abort(new CaravanError("shutting_down", "over"));
    expect(models.engine.cancelled).toHaveLength(1);
    expect((await run).code).toBe("shutting_down");
  });

  test("before the start asks the engine for nothing", async () => {
    const models = scriptedModels(sayScript("abc"));
    const signal = AbortSignal.abort(new CaravanError("cancelled", "gone"));
    await thrownBy(Array.fromAsync(generate(models.model, [1], { ...options, signal })));
    expect(models.engine.requests).toHaveLength(0);
  });

  test("by leaving the iteration reaches the engine", async () => {
    const models = scriptedModels(sayScript("abcdef"));
    for await (const event of generate(models.model, [1], options)) if (event.type === "text") break;
    expect(models.engine.cancelled).toHaveLength(1);
    await until(() => models.engine.running === 0, "the engine ends the request");
  });

  test("of a group by leaving it reaches all its sequences", async () => {
    const models = scriptedModels(sayScript("abcdef"));
    const plans = [1, 2, 3].map((id) => ({ promptIds: [id], sampling: GREEDY, maxTokens: 10 }));
    for await (const { event } of generateGroup(models.model, plans, {})) if (event.type === "text") break;
    await until(() => models.engine.running === 0, "the engine ends the requests");
    expect(new Set(models.engine.cancelled).size).toBe(3);
  });

  test("leaves nothing behind on the signal", async () => {
    const abort = new AbortController();
    const models = scriptedModels(sayScript("abc"));
    await Array.fromAsync(generate(models.model, [1], { ...options, signal: abort.signal }));
    abort.abort();
    expect(models.engine.cancelled).toHaveLength(0);
  });
});

describe("failures", () => {
  test("of the engine are thrown with their code and hint", async () => {
    const error = {
      code: "deadline_exceeded",
      message: "Too late.",
      hint: "Ask for less.",
      retry_after_seconds: 4,
    };
    const run = collect({ ...sayScript("abc"), failAfter: () => ({ tokens: 1, error }) });
    expect((await thrownBy(run)).toJSON()).toEqual(error);
  });

  test("a stream that just ends is an engine failure", async () => {
    const models = scriptedModels(sayScript("abc"));
    models.engine.generate = async function* () {};
    const error = await thrownBy(Array.fromAsync(generate(models.model, [1], options)));
    expect(error.code).toBe("engine_failed");
  });

  test("an engine that cancels by itself is not taken for a client that left", async () => {
    const models = scriptedModels({
      ...sayScript("abc"),
      gate: (position) => (position === 1 ? hold : undefined),
    });
    const run = thrownBy(Array.fromAsync(generate(models.model, [1], options)));
    await until(() => models.engine.running === 1, "the engine runs");
    models.engine.cancel(models.engine.requests[0]?.id ?? "");
    expect((await run).code).toBe("engine_failed");
  });
});

test("a group's sequences interleave, so that none waits for another", async () => {
  const models = scriptedModels(sayScript("abcd"));
  const plans = [1, 2].map((id) => ({ promptIds: [id], sampling: GREEDY, maxTokens: 10 }));
  const order: number[] = [];
  for await (const { index, event } of generateGroup(models.model, plans, {})) {
    if (event.type === "text") order.push(index);
  }
  expect(order).toEqual([0, 1, 0, 1, 0, 1, 0, 1]);
});
