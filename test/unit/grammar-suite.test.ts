import { expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import Ajv2020, { type ValidateFunction } from "ajv/dist/2020";
import type { GrammarSpec } from "../../src/grammar/spec.ts";
import { JSON_WORDS, matcherSource, randomAnswer, smallVocabulary } from "../tools/grammar-walk.ts";
import { seededRandom } from "../tools/seeded-random.ts";

const SUITE = join(import.meta.dir, "../../build/json-schema-suite/draft2020-12");
const ANSWERS = 6;

interface Case {
  file: string;
  description: string;
  schema: unknown;
  tests: { description: string; data: unknown; valid: boolean }[];
}

function cases(): Case[] {
  const names = readdirSync(SUITE, { recursive: true, encoding: "utf8" }).filter((name) =>
    name.endsWith(".json"),
  );
  return names
    .filter((name) => !name.includes("format/"))
    .sort()
    .flatMap((file) =>
      (JSON.parse(readFileSync(join(SUITE, file), "utf8")) as Omit<Case, "file">[]).map((each) => ({
        file,
        ...each,
      })),
    );
}

function validator(schema: unknown): ValidateFunction | undefined {
  try {
    const ajv = new Ajv2020({ strict: false, validateFormats: false, ownProperties: true, logger: false });
    return ajv.compile(schema as object);
  } catch {
    // References to other documents; those schemas are refused.
    return undefined;
  }
}

if (!existsSync(SUITE)) {
  console.log(`grammar-suite.test.ts skips: ${SUITE} is missing; \`make fixtures\` fetches it`);
  test.skip("every schema of the JSON Schema suite is enforced or refused by name", () => {});
} else
  test("every schema of the JSON Schema suite is enforced or refused by name", () => {
    const vocabulary = smallVocabulary([...JSON_WORDS, '"foo', '"bar', "bar", "baz", "foo", "quux", "1.0"]);
    const random = seededRandom(20);
    const refused = new Map<string, number>();
    const broken: string[] = [];
    let enforced = 0;
    let answers = 0;
    let unfinished = 0;
    const all = cases();
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
      const validate = validator(schema);
      if (validate === undefined) {
        broken.push(`${file}: ${description}: enforced, but ajv cannot compile it`);
        continue;
      }
      for (let i = 0; i < ANSWERS; i++) {
        const answer = randomAnswer(start(), vocabulary, random, 200);
        if (answer === undefined) {
          unfinished++;
          continue;
        }
        answers++;
        if (!validate(JSON.parse(answer))) broken.push(`${file}: ${description}: ${answer.slice(0, 200)}`);
      }
    }
    for (const [reason, count] of [...refused].sort((a, b) => b[1] - a[1]))
      console.log(`  refused ${count}: ${reason.slice(0, 150)}`);
    console.log(
      `JSON Schema suite: ${enforced} of ${all.length} schemas enforced (${Math.round((100 * enforced) / all.length)} %), ` +
        `${answers} random answers, ${unfinished} not finished`,
    );
    expect(broken).toEqual([]);
    expect(enforced).toBeGreaterThan(all.length / 3);
    expect(answers).toBeGreaterThan(enforced * ANSWERS * 0.9);
  }, 60_000);
