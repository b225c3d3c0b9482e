import { expect, test } from "bun:test";
import type { GrammarSpec } from "../../src/grammar/spec.ts";
import {
  JSON_WORDS,
  matcherSource,
  randomAnswer,
  smallVocabulary,
  takesWhole,
} from "../tools/grammar-walk.ts";
import { suiteCases, suiteHere, validatorOf } from "../tools/json-schema-suite.ts";
import { seededRandom } from "../tools/seeded-random.ts";

/** Whether the grammar takes the text whole, byte by byte. */
const ANSWERS = 4;

test.skipIf(!suiteHere())(
  "every schema of the JSON Schema suite is enforced or refused by name",
  () => {
    const vocabulary = smallVocabulary([...JSON_WORDS, '"foo', '"bar', "bar", "baz", "foo", "quux", "1.0"]);
    const random = seededRandom(20);
    const refused = new Map<string, number>();
    const broken: string[] = [];
    const unjudged: string[] = [];
    let enforced = 0;
    let answers = 0;
    let unfinished = 0;
    let validTests = 0;
    let validTaken = 0;
    const all = suiteCases();
    for (const { file, description, schema, tests } of all) {
      const spec: GrammarSpec = { type: "json_schema", schema, param: "schema" };
      let message: string | undefined;
      let start: ReturnType<typeof matcherSource> | undefined;
      try {
        start = matcherSource(spec, vocabulary);
      } catch (thrown) {
        message = thrown instanceof Error ? thrown.message : String(thrown);
        expect(thrown).toMatchObject({ code: "unsupported_parameter", param: "schema" });
        expect(message).toMatch(/^schema: #/);
      }
      if (start === undefined || message !== undefined) {
        const keyword = /^schema: (#\S*): (.*)/.exec(message ?? "");
        const reason = `${keyword?.[1]?.split("/").at(-1)}: ${keyword?.[2]}`;
        refused.set(reason, (refused.get(reason) ?? 0) + 1);
        // What is refused because nothing satisfies it must have no valid instance in the suite.
        if (message?.includes("no value can satisfy") && tests.some(({ valid }) => valid))
          broken.push(`${file}: ${description}: said to be empty`);
        continue;
      }
      enforced++;
      const validate = validatorOf(schema);
      // The suite's own instances judge those, too.
      if (validate === undefined) unjudged.push(`${file}: ${description}`);
      for (const { data, valid } of tests) {
        const taken = takesWhole(start(), JSON.stringify(data));
        if (valid) validTaken += taken ? 1 : 0;
        else if (taken) broken.push(`${file}: ${description}: takes ${JSON.stringify(data)}`);
      }
      validTests += tests.filter(({ valid }) => valid).length;
      for (let i = 0; i < ANSWERS; i++) {
        const answer = randomAnswer(start(), vocabulary, random, 200);
        if (answer === undefined) {
          unfinished++;
          continue;
        }
        answers++;
        if (validate?.(JSON.parse(answer)) === false)
          broken.push(`${file}: ${description}: ${answer.slice(0, 200)}`);
      }
    }
    for (const [reason, count] of [...refused].sort((a, b) => b[1] - a[1]))
      console.log(`  refused ${count}: ${reason.slice(0, 150)}`);
    console.log(
      `JSON Schema suite: ${enforced} of ${all.length} schemas enforced (${Math.round((100 * enforced) / all.length)} %), ` +
        `${answers} random answers, ${unfinished} not finished; ${validTaken} of their ${validTests} valid instances can come as they are`,
    );
    for (const each of unjudged) console.log(`  ajv cannot compile: ${each}`);
    expect(unjudged.length).toBeLessThan(5);
    expect(broken).toEqual([]);
    expect(enforced).toBeGreaterThan(all.length * 0.8);
    expect(answers).toBeGreaterThan(enforced * ANSWERS * 0.9);
  },
  120_000,
);
