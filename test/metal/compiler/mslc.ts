// mslc — checks and compiles Metal kernel files on Linux.
//
//   bun mslc.ts check FILE.metal… [--prelude P.metal]            problems, a line each; exit code 1 when there are any
//   bun mslc.ts build FILE.metal -o LIB.so [--prelude P.metal] [--checked] [--fast-math] [-DNAME…]

import { tmpdir } from "node:os";
import { build, check } from "./compile.ts";

function option(words: string[], name: string): string | undefined {
  const at = words.indexOf(name);
  return at < 0 ? undefined : words.splice(at, 2)[1];
}

function flag(words: string[], name: string): boolean {
  const at = words.indexOf(name);
  if (at >= 0) words.splice(at, 1);
  return at >= 0;
}

function main(words: string[]): number {
  const prelude = option(words, "--prelude");
  const out = option(words, "-o");
  const checked = flag(words, "--checked");
  const fastMath = flag(words, "--fast-math");
  const defines = words.filter((word) => word.startsWith("-D")).map((word) => word.slice(2));
  const [command, ...files] = words.filter((word) => !word.startsWith("-D"));
  const source = (path: string) => ({ path, defines, ...(prelude === undefined ? {} : { prelude }) });
  if (command === "check" && files.length > 0) {
    let total = 0;
    for (const path of files) {
      const { problems, kernels } = check(source(path), tmpdir());
      for (const problem of problems) console.log(problem);
      console.log(`${path}: ${problems.length} problems, ${kernels.length} kernels`);
      total += problems.length;
    }
    return total > 0 ? 1 : 0;
  }
  const path = files[0];
  if (command === "build" && path !== undefined && out !== undefined) {
    const problems = build(source(path), out, { checked, fastMath });
    for (const problem of problems) console.error(problem);
    return problems.length > 0 ? 1 : 0;
  }
  console.error(
    "usage: mslc check FILE… | mslc build FILE -o LIB.so [--prelude FILE] [--checked] [--fast-math] [-DNAME]",
  );
  return 2;
}

process.exit(main(process.argv.slice(2)));
