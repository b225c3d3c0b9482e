// Writes NOTICE.txt: the licences of everything that the executable contains. Run it when a dependency changes; a test
// compares the file with what this makes.
//   bun test/tools/make-notice.ts

import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const ROOT = join(import.meta.dir, "../..");
const RULE = "-".repeat(80);

/** C sources by others: the file whose first comment holds the licence. */
const NATIVE = [{ name: "Monocypher", file: "native/transport/monocypher.c" }];

/** What Bun is made of, as its own licence page lists it. */
const BUN = `Bun (the runtime), https://bun.sh
MIT. Copyright (c) Oven and the contributors to Bun.
Bun contains, under their own licences: JavaScriptCore and WebKit's WTF and bmalloc (LGPL 2 and BSD 2-Clause; source and
how to relink: https://github.com/oven-sh/WebKit), BoringSSL (OpenSSL, ISC and others), brotli (MIT), c-ares (MIT), ICU
(Unicode), libarchive (BSD and others), libbase64 (BSD 2-Clause), libdeflate (MIT), lol-html (BSD 3-Clause), ls-hpack
(MIT), mimalloc (MIT), picohttpparser (MIT), simdutf (Apache 2.0), TinyCC (LGPL 2.1), parts of TigerBeetle's input and
output (Apache 2.0), uSockets and uWebSockets (Apache 2.0), zlib (zlib) and zstd (BSD). The whole list with links:
https://bun.com/docs/project/license`;

function licenceOf(folder: string): string {
  const name = readdirSync(folder).find((file) => /^licen[cs]e/i.test(file));
  if (name === undefined) throw new Error(`${folder} has no licence file`);
  return readFileSync(join(folder, name), "utf8").trim();
}

function packages(): string[] {
  const { dependencies } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as {
    dependencies: Record<string, string>;
  };
  return Object.keys(dependencies).map((name) => {
    const folder = join(ROOT, "node_modules", name);
    const about = JSON.parse(readFileSync(join(folder, "package.json"), "utf8")) as {
      version: string;
      license: string;
    };
    return `${name} ${about.version}, ${about.license}\n\n${licenceOf(folder)}`;
  });
}

function native(): string[] {
  return NATIVE.filter(({ file }) => existsSync(join(ROOT, file))).map(({ name, file }) => {
    const lines = readFileSync(join(ROOT, file), "utf8").split("\n");
    const end = lines.findIndex((line) => !line.startsWith("//"));
    return `${name}\n\n${lines
      .slice(0, end)
      .map((line) => line.replace(/^\/\/ ?/, ""))
      .join("\n")
      .trim()}`;
  });
}

/** The text of NOTICE.txt. */
export function makeNotice(): string {
  const head = `caravan
Copyright the caravan contributors. Licensed under the Apache License 2.0 (LICENSE).

The executable contains the works below, each under its own licence. Models are not part of it: whoever uses Llama
models accepts Meta's licence for them, which \`caravan pull\` names.`;
  return `${[head, BUN, ...packages(), ...native()].join(`\n\n${RULE}\n\n`)}\n`;
}

if (import.meta.main) {
  writeFileSync(join(ROOT, "NOTICE.txt"), makeNotice());
  console.log("wrote NOTICE.txt");
}
