// Shows that the simulation can fail: each mutation is a bug put into a copy of the cluster's sources, and some seed must
// catch it. Bugs that a second line of defence hides from every client are not here but in test/unit. usage: bun test/simulation/mutations.ts [--only TEXT]. Ends with `N pass` (caught) and `N fail` (not caught).

import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";

interface Mutation {
  name: string;
  /** In src/cluster. */
  file: string;
  find: string;
  put: string;
}

const MUTATIONS: readonly Mutation[] = [
  {
    name: "memory is reserved without looking",
    file: "memory-ledger.ts",
    find: "if (entry.bytes <= this.free) {",
    put: "if (entry.bytes <= Number.POSITIVE_INFINITY) {",
  },
  {
    name: "memory of a rank counts as free before its process is gone",
    file: "rank-host.ts",
    find: '    held.life = "stopping";\n',
    put: '    held.life = "stopping";\n    this.#options.ledger.release(instance);\n',
  },
  {
    name: "nodes that are gone stay in view",
    file: "membership.ts",
    find: "if (now - Math.max(heardAt, this.#slept.endedAt) > GONE_MS) {",
    put: "if (now - Math.max(heardAt, this.#slept.endedAt) > 10 * GONE_MS) {",
  },
  {
    name: "what others repeat of a node counts as fresh",
    file: "membership.ts",
    find: "const heardAt = now - digest.ageMs;",
    put: "const heardAt = now;",
  },
  {
    name: "a restarted node does not replace itself",
    file: "run.ts",
    find: "return a.incarnation - b.incarnation ||",
    put: "return 0 &&",
  },
  {
    name: "records are never asked for",
    file: "membership.ts",
    find: "if (missing.length > 0 || answer.length > 0)",
    put: "if (answer.length > 0)",
  },
  {
    name: "a rank that ended begins again in the same epoch",
    file: "rank-host.ts",
    find: "if (epoch <= (this.#ended.get(endKey(order)) ?? 0)) {",
    put: "if (false) {",
  },
  {
    name: "nobody takes over orphans",
    file: "orphans.ts",
    find: "heirOf(state, members) === this.#id",
    put: "false",
  },
  {
    name: "everybody takes over orphans and nobody yields",
    file: "instance-life.ts",
    find: "const other = claimsOn(id, members).find(",
    put: "const other = [].find(",
  },
  {
    name: "stopped instances are forgotten",
    file: "orphans.ts",
    find: "this.#ended.set(id, {",
    put: "new Map().set(id, {",
  },
  {
    name: "nodes that come back are not used again",
    file: "instance-life.ts",
    find: "if (owned.move === undefined) return;",
    put: "return;",
  },
  {
    name: "an instance is called ready before all of its ranks are",
    file: "instance-loading.ts",
    find: 'if (ranks.every(({ state }) => state?.phase === "ready")) return',
    put: 'if (ranks.some(({ state }) => state?.phase === "ready")) return',
  },
  {
    name: "runners' news of an earlier epoch counts",
    file: "rank-host.ts",
    find: 'return held?.order.epoch === epoch && held.life === "running" ? held : undefined;',
    put: 'return held?.life === "running" ? held : undefined;',
  },
  {
    name: "a silent owner is waited for",
    file: "requests.ts",
    find: "if (this.#options.now() - request.heardAt > SILENT_MS)",
    put: "if (this.#options.now() - request.heardAt > 10 * SILENT_MS)",
  },
  {
    name: "requests are never given up",
    file: "requests.ts",
    find: "if (fault !== undefined) this.#fail(",
    put: "if (false) this.#fail(",
  },
  {
    name: "a refused placement is never looked at again",
    file: "instance-life.ts",
    find: "if (now() < owned.notBefore) return;\n    } else {",
    put: "return;\n    } else {",
  },
];

/** Seeds that a bug may take to show. */
const SEEDS = 300;

const root = join(import.meta.dir, "../..");
const { values } = parseArgs({ options: { only: { type: "string", default: "" } } });

function mutated(dir: string, { file, find, put }: Mutation): void {
  for (const part of ["src", "test/simulation", "test/tools", "package.json", "tsconfig.json"])
    cpSync(join(root, part), join(dir, part), { recursive: true });
  symlinkSync(join(root, "node_modules"), join(dir, "node_modules"));
  const path = join(dir, "src/cluster", file);
  const text = readFileSync(path, "utf8");
  if (text.split(find).length !== 2) throw new Error(`${file} has not exactly one \`${find}\``);
  writeFileSync(
    path,
    text.replace(find, () => put),
  );
}

async function caught(mutation: Mutation): Promise<string | undefined> {
  const dir = mkdtempSync(join(tmpdir(), "caravan-mutation-"));
  try {
    mutated(dir, mutation);
    const command = [process.execPath, "test/simulation/run.ts", "--until-failure", "--seeds", String(SEEDS)];
    const child = Bun.spawn(command, { cwd: dir, stdout: "pipe", stderr: "pipe" });
    const out = await child.stdout.text();
    await child.exited;
    return /^\(fail\) (.*)$/m.exec(out)?.[1];
  } finally {
    rmSync(dir, { recursive: true });
  }
}

let missed = 0;
const chosen = MUTATIONS.filter(({ name }) => name.includes(values.only));
const waiting = [...chosen];

/** One of them after the other; several of these run side by side. */
async function worker(): Promise<void> {
  for (let mutation = waiting.shift(); mutation !== undefined; mutation = waiting.shift()) {
    const how = await caught(mutation);
    if (how === undefined) missed++;
    const line =
      how === undefined ? `(fail) not caught: ${mutation.name}` : `caught: ${mutation.name}: ${how}`;
    console.log(line.slice(0, 240));
  }
}

await Promise.all([worker(), worker()]);
console.log(` ${chosen.length - missed} pass\n ${missed} fail`);
process.exitCode = missed === 0 ? 0 : 1;
