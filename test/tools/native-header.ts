// The constants of native/include/caravan.h, read from its text, for tests that compare hand-written numbers with it.

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";

const ROOT = join(import.meta.dir, "../..");

/** The header without comments. */
export function headerCode(): string {
  const text = readFileSync(join(ROOT, "native/include/caravan.h"), "utf8");
  return text.replace(/\/\*[\s\S]*?\*\//g, "");
}

/** Enumerators (counted on where none is given) and numeric #defines, by name in their order. */
export function headerConstants(): Map<string, number> {
  const out = new Map<string, number>();
  const code = headerCode();
  for (const [, body = ""] of code.matchAll(/enum\s*\{([^}]*)\}/g)) {
    let next = 0;
    for (const entry of body.split(",")) {
      const [, name, value] = /^\s*(\w+)\s*(?:=\s*(-?\w+))?\s*$/.exec(entry) ?? [];
      if (name === undefined) continue;
      next = value === undefined ? next : Number(value);
      out.set(name, next++);
    }
  }
  for (const [, name = "", value] of code.matchAll(/#define (CV_\w+) (0x[0-9a-f]+|\d+)u/g))
    out.set(name, Number(value));
  return out;
}

/** A constant by name; throws where the header has none of it. */
export function headerConstant(name: string): number {
  const value = headerConstants().get(name);
  if (value === undefined) throw new Error(`caravan.h has no ${name}`);
  return value;
}

/** Whether the library that binding.ts loads is there. */
export function libraryIsBuilt(): boolean {
  const extension = process.platform === "darwin" ? "dylib" : "so";
  return existsSync(process.env.CARAVAN_LIBRARY || join(ROOT, "build", `libcaravan.${extension}`));
}
