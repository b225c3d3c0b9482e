// src/engine/layout.ts and the other hand-written numbers against the C library and its header: every record's size, every
// field's offset, every constant.

import { describe, expect, test } from "bun:test";
import { nativeLayout } from "../../src/engine/binding.ts";
import {
  ABI_VERSION,
  FILE,
  GROUP_OPTIONS,
  NO_FILE,
  PLAN_MAGIC,
  RECORDS,
  STEP_MAGIC,
} from "../../src/engine/layout.ts";
import { SLOT } from "../../src/model/tensor-names.ts";
import { TOKEN_LAST } from "../../src/scheduler/step.ts";
import { headerCode, headerConstants, libraryIsBuilt } from "../tools/native-header.ts";

const built = libraryIsBuilt();
if (!built) console.log("skipped: the records' offsets, since libcaravan is not built (make lib)");

/** Records of the header that TypeScript reads without layout.ts (binding.ts). */
const ELSEWHERE = ["cv_stats_record"];

interface Field {
  record: string;
  field: string;
  offset: number;
  size: number;
}

/** Lines "record=0,size" and "record.field=offset,size". */
function native(): { sizes: Map<string, number>; fields: Field[] } {
  const sizes = new Map<string, number>();
  const fields: Field[] = [];
  for (const line of nativeLayout().trim().split("\n")) {
    const [, record = "", field, offset, size] = /^(\w+)(?:\.(\w+))?=(\d+),(\d+)$/.exec(line) ?? [];
    if (field === undefined) sizes.set(record, Number(size));
    else fields.push({ record, field, offset: Number(offset), size: Number(size) });
  }
  return { sizes, fields };
}

/** `size` is the record's own size in layout.ts, so a field of that name has another. */
function mirrored(record: string, field: string): number | undefined {
  if (record === "cv_plan_file" && field === "size") return FILE.file_size;
  if (record === "cv_group_options" && field === "size") return GROUP_OPTIONS.ranks;
  return field === "size" ? undefined : RECORDS[record]?.[field];
}

describe.skipIf(!built)("the records", () => {
  const none: ReturnType<typeof native> = { sizes: new Map(), fields: [] };
  const { sizes, fields } = built ? native() : none;

  test("are all mirrored, and no others", () => {
    const wanted = [...sizes.keys()].filter((record) => !ELSEWHERE.includes(record)).sort();
    expect(Object.keys(RECORDS).sort()).toEqual(wanted);
  });

  test.each(Object.keys(RECORDS))("%s has the library's size and offsets", (record) => {
    const own = fields.filter((field) => field.record === record);
    const theirs = Object.fromEntries(own.map(({ field, offset }) => [field, offset]));
    const mine = Object.fromEntries(own.map(({ field }) => [field, mirrored(record, field)]));
    expect(mine).toEqual(theirs);
    expect(RECORDS[record]?.size).toBe(sizes.get(record) as number);
    // Nothing is mirrored that the library does not have.
    expect(Object.keys(RECORDS[record] ?? {}).length).toBe(own.length + 1);
  });

  test("cover every field of the header but its reserved ones", () => {
    let seen = 0;
    for (const [, body = "", record = ""] of headerCode().matchAll(
      /typedef struct\s*\{([^}]*)\}\s*(cv_\w+);/g,
    )) {
      const names = [...body.matchAll(/(\w+)(?:\[\d+\])?\s*[,;]/g)].map(([, name]) => name);
      const known = fields.filter((field) => field.record === record).map(({ field }) => field);
      expect([record, ...names.filter((name) => name !== "reserved").sort()]).toEqual([
        record,
        ...known.sort(),
      ]);
      seen++;
    }
    expect(seen).toBe(sizes.size);
  });

  test("of statistics lie where binding.ts reads them: ten 64-bit numbers, then two of 32", () => {
    const own = fields.filter(({ record }) => record === "cv_stats_record");
    expect(own.map(({ offset, size }) => [offset, size])).toEqual([
      ...Array.from({ length: 10 }, (_, i) => [i * 8, 8]),
      [80, 4],
      [84, 4],
    ]);
    expect(sizes.get("cv_stats_record")).toBe(88);
  });
});

test("the constants are the header's", () => {
  const header = headerConstants();
  expect(header.get("CV_PLAN_MAGIC")).toBe(PLAN_MAGIC);
  expect(header.get("CV_STEP_MAGIC")).toBe(STEP_MAGIC);
  expect(header.get("CV_ABI_VERSION")).toBe(ABI_VERSION);
  expect(header.get("CV_NO_FILE")).toBe(NO_FILE);
  expect(header.get("CV_TOKEN_LAST")).toBe(TOKEN_LAST);
});

test("the tensor slots are the header's", () => {
  const header = [...headerConstants()].filter(([name]) => name.startsWith("CV_T_") && name !== "CV_T_COUNT");
  const snake = (name: string) => `CV_T_${name.replace(/[A-Z]/g, (letter) => `_${letter}`).toUpperCase()}`;
  const mine = Object.entries(SLOT).map(([name, value]): [string, number] => [snake(name), value]);
  expect(mine).toEqual(header);
});
