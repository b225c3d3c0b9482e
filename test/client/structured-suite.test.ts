// The JSON Schema suite on a real model that is as wild as sampling can make it: whatever ends by itself is valid, and
// hostile schemas cost their senders an error and nobody else anything.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { symlinkSync } from "node:fs";
import { join } from "node:path";
import OpenAI from "openai";
import { built, type Node, Place, SMOLLM2, smollm2Here } from "../tools/built-caravan.ts";
import { inTime, msOf } from "../tools/in-time.ts";
import { suiteCases, suiteHere, validatorOf } from "../tools/json-schema-suite.ts";

const MODEL = "smol";
const STREAMS = 16;
const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: "Give me some JSON." }];
const place = new Place();
let node: Node;
let openai: OpenAI;

function answer(schema: unknown, seed: number, more: object = {}) {
  const json_schema = { name: "x", schema: schema as Record<string, unknown> };
  return openai.chat.completions.create({
    model: MODEL,
    messages,
    temperature: 2,
    seed,
    max_completion_tokens: 48,
    response_format: { type: "json_schema", json_schema },
    ...more,
  });
}

describe.skipIf(!built || !smollm2Here())("SmolLM2 at temperature 2", () => {
  beforeAll(async () => {
    symlinkSync(SMOLLM2, join(place.models, MODEL));
    node = await place.serve([MODEL]);
    openai = new OpenAI({ baseURL: `${node.url}/v1`, apiKey: "unused", maxRetries: 5 });
    await answer({ type: "boolean" }, 1);
  }, 120_000);
  afterAll(() => place.remove());

  test.skipIf(!suiteHere())(
    "gives a valid answer to every schema of the suite that is not refused",
    async () => {
      const objects = suiteCases().filter(({ schema }) => typeof schema === "object");
      const broken: string[] = [];
      let refused = 0;
      let valid = 0;
      let cut = 0;
      let late = 0;
      let unjudged = 0;
      const work = objects.entries();
      const stream = async (): Promise<void> => {
        for (const [i, { file, description, schema }] of work) {
          try {
            const { choices } = await answer(schema, i);
            const [choice] = choices;
            if (choice?.finish_reason !== "stop") {
              cut++;
              continue;
            }
            const text = choice.message.content ?? "";
            const validate = validatorOf(schema);
            const value: unknown = JSON.parse(text);
            // test/unit/grammar-suite.test.ts holds those to the suite's own instances.
            if (validate === undefined) unjudged++;
            else if (validate(value)) valid++;
            else broken.push(`${file}: ${description}: ${text}`);
          } catch (thrown) {
            if (!(thrown instanceof OpenAI.BadRequestError)) throw thrown;
            expect(thrown).toMatchObject({ param: "response_format.json_schema.schema" });
            // On a machine that is busy with other things the time limit may come first.
            if (/longer than \d+ ms/.test(thrown.message)) late++;
            else expect(thrown.message).toMatch(/schema: #/);
            refused++;
          }
        }
      };
      await Promise.all(Array.from({ length: STREAMS }, stream));
      console.log(
        `JSON Schema suite on SmolLM2: ${objects.length - refused} of ${objects.length} schemas enforced ` +
          `(${Math.round((100 * (objects.length - refused)) / objects.length)} %), ${valid} complete answers, all valid; ${unjudged} of schemas that ajv cannot compile, ${cut} cut at 48 tokens, ${late} not compiled in time`,
      );
      expect(broken).toEqual([]);
      expect(valid).toBeGreaterThan(60);
      expect(late).toBeLessThan(5);
      expect(unjudged).toBeLessThan(5);
    },
    240_000,
  );

  test("refuses hostile schemas in time, while others go on", async () => {
    const long = {
      type: "object",
      properties: { text: { type: "string", minLength: 4000 } },
      required: ["text"],
    };
    const stream = await openai.chat.completions.create({
      model: MODEL,
      messages,
      max_completion_tokens: 400,
      stream: true,
      response_format: { type: "json_schema", json_schema: { name: "x", schema: long } },
    });
    const gaps: number[] = [];
    const reading = (async () => {
      let last = performance.now();
      for await (const _ of stream) {
        gaps.push(performance.now() - last);
        last = performance.now();
      }
    })();
    let nested: unknown = {};
    for (let i = 0; i < 120; i++) nested = { type: "array", items: nested };
    const optional = Array.from({ length: 2000 }, (_, i) => [`a property that is the ${i}th of many`, {}]);
    const hostile: unknown[] = [
      { type: "string", pattern: "^(a|b)*a(a|b){25}$" },
      { enum: Array.from({ length: 20_000 }, (_, i) => `value ${i}`) },
      { type: "string", pattern: "^(([a-z])+.)+[A-Z]([a-z])+$", enum: [`${"a".repeat(60)}`] },
      { type: "object", properties: Object.fromEntries(optional) },
      { type: "object", description: "x".repeat(10 << 20) },
      { $ref: "#/$defs/a", $defs: { a: { anyOf: [{ $ref: "#/$defs/a" }, { $ref: "#/$defs/a" }] } } },
      nested,
    ];
    for (const schema of hostile) {
      // The limit is 2 s; the rest is the machine's.
      await inTime(4000, async () => {
        let failure: unknown;
        const took = await msOf(async () => {
          failure = await answer(schema, 1, { max_completion_tokens: 1 }).then(
            () => "an answer",
            (thrown: unknown) => thrown,
          );
        });
        console.log(
          `  ${JSON.stringify(schema).slice(0, 60)}: ${Math.round(took)} ms, ${String(failure).slice(0, 120)}`,
        );
        return took;
      });
    }
    await reading;
    gaps.sort((a, b) => a - b);
    console.log(
      `  beside them a stream's gaps: median ${Math.round(gaps[gaps.length >> 1] ?? 0)} ms, longest ${Math.round(gaps.at(-1) ?? 0)} ms`,
    );
    expect(gaps.length).toBeGreaterThan(100);
    const after = await answer({ type: "integer", minimum: 3, maximum: 3 }, 1);
    expect(after.choices[0]?.message.content).toBe("3");
  }, 120_000);
});
