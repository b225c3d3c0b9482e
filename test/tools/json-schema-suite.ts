// The JSON Schema suite (draft 2020-12), where `make fixtures` has put it.

import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import Ajv2020, { type ValidateFunction } from "ajv/dist/2020";

const SUITE = join(import.meta.dir, "../../build/json-schema-suite/draft2020-12");

export interface SuiteCase {
  file: string;
  description: string;
  schema: unknown;
  tests: { description: string; data: unknown; valid: boolean }[];
}

/** Whether the suite is there; says so when it is not. */
export function suiteHere(): boolean {
  const here = existsSync(SUITE);
  if (!here) console.log("skipped: build/json-schema-suite is missing (make fixtures fetches it)");
  return here;
}

/** All schemas of the suite but those of single formats. */
export function suiteCases(): SuiteCase[] {
  const names = readdirSync(SUITE, { recursive: true, encoding: "utf8" });
  return names
    .filter((name) => name.endsWith(".json") && !name.includes("format/"))
    .sort()
    .flatMap((file) =>
      (JSON.parse(readFileSync(join(SUITE, file), "utf8")) as Omit<SuiteCase, "file">[]).map((each) => ({
        file,
        ...each,
      })),
    );
}

/** Undefined where ajv cannot compile the schema: it refers to other documents. */
export function validatorOf(schema: unknown): ValidateFunction | undefined {
  try {
    const ajv = new Ajv2020({ strict: false, validateFormats: false, ownProperties: true, logger: false });
    return ajv.compile(schema as object);
  } catch {
    return undefined;
  }
}
