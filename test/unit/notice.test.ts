// NOTICE.txt names everything that the executable contains.

import { expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { makeNotice } from "../tools/make-notice.ts";

test("NOTICE.txt is what the dependencies of today make (else run: bun test/tools/make-notice.ts)", () => {
  expect(readFileSync(join(import.meta.dir, "../../NOTICE.txt"), "utf8")).toBe(makeNotice());
});
