// JSON files that commands take and give.

import { readFileSync } from "node:fs";
import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import { AtomicFile } from "../model/atomic-file.ts";

/** Reads and checks a JSON file. Throws invalid_argument naming the file and what is wrong in it. */
export function readJsonFile<T extends v.GenericSchema>(path: string, schema: T): v.InferOutput<T> {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (thrown) {
    throw new CaravanError("invalid_argument", `cannot be read: ${message(thrown)}`, { where: path });
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (thrown) {
    throw new CaravanError("invalid_argument", `is not JSON: ${message(thrown)}`, { where: path });
  }
  const parsed = v.safeParse(schema, value);
  if (parsed.success) return parsed.output;
  const issue = parsed.issues[0];
  const key = v.getDotPath(issue);
  throw new CaravanError("invalid_argument", `${key === null ? "" : `${key}: `}${issue.message}`, {
    where: path,
  });
}

/** Writes `value` so that the file appears under its name only when it is whole. Throws disk_full or bad_file. */
export async function writeJsonFile(path: string, value: unknown): Promise<void> {
  const file = await AtomicFile.create(path);
  await file.write(new TextEncoder().encode(`${JSON.stringify(value)}\n`), 0);
  await file.commit();
}

function message(thrown: unknown): string {
  return thrown instanceof Error ? thrown.message : String(thrown);
}
