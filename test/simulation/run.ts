// Runs seeds of the simulation and prints those that fail, each with the command that repeats it.
// usage: bun test/simulation/run.ts [--seeds N] [--from S] [--jobs J]    many seeds; ends with `N pass` and `N fail`
//        bun test/simulation/run.ts --seed S                             one, with its story
// --until-failure ends with the first one that fails.

import { parseArgs } from "node:util";
import { runSeed } from "./world.ts";

const { values } = parseArgs({
  options: {
    seeds: { type: "string", default: "500" },
    from: { type: "string", default: "1" },
    jobs: { type: "string", default: "1" },
    seed: { type: "string" },
    "until-failure": { type: "boolean", default: false },
  },
});

interface Sums {
  failed: number;
  ran: number;
  answer: number;
  error: number;
  gone: number;
  messages: number;
  faults: number;
}

function one(seed: number): number {
  const { story, violation, requests, messages } = runSeed(seed, true);
  for (const line of story) console.log(line);
  console.log(`${messages} messages, requests: ${JSON.stringify(requests)}`);
  console.log(violation === undefined ? `seed ${seed} holds` : `seed ${seed} fails ${violation}`);
  return violation === undefined ? 0 : 1;
}

function many(from: number, count: number): Sums {
  const sums: Sums = { failed: 0, ran: 0, answer: 0, error: 0, gone: 0, messages: 0, faults: 0 };
  for (let seed = from; seed < from + count; seed++) {
    const result = runSeed(seed);
    sums.ran++;
    for (const end of ["answer", "error", "gone"] as const) sums[end] += result.requests[end];
    sums.messages += result.messages;
    sums.faults += result.faults;
    if (result.violation === undefined) continue;
    sums.failed++;
    console.log(`(fail) seed ${seed} ${result.violation}`);
    console.log(`       repeat it: bun test/simulation/run.ts --seed ${seed}`);
    if (values["until-failure"]) break;
  }
  return sums;
}

/** Several processes, each with a run of seeds of its own. Their last line is their sums. */
async function inProcesses(from: number, count: number, jobs: number): Promise<Sums> {
  const each = Math.ceil(count / jobs);
  const parts = await Promise.all(
    Array.from({ length: jobs }, async (_, job): Promise<Sums> => {
      const first = from + job * each;
      const seeds = Math.max(0, Math.min(each, from + count - first));
      const command = [process.execPath, import.meta.path, "--from", `${first}`, "--seeds", `${seeds}`];
      const child = Bun.spawn([...command, "--jobs", "0"], { stdout: "pipe", stderr: "inherit" });
      const lines = (await child.stdout.text()).trim().split("\n");
      const last = lines.pop() ?? "";
      for (const line of lines) console.log(line);
      await child.exited;
      return JSON.parse(last) as Sums;
    }),
  );
  return parts.reduce((sum, part) => {
    for (const key of Object.keys(sum) as (keyof Sums)[]) sum[key] += part[key];
    return sum;
  });
}

function whole(text: string, name: string): number {
  if (!/^\d{1,9}$/.test(text)) throw new Error(`--${name} takes a whole number, not "${text}"`);
  return Number(text);
}

if (values.seed !== undefined) process.exitCode = one(whole(values.seed, "seed"));
else {
  const [from, seeds, jobs] = (["from", "seeds", "jobs"] as const).map((name) => whole(values[name], name));
  const started = performance.now();
  if (jobs === 0) console.log(JSON.stringify(many(from ?? 1, seeds ?? 0)));
  else {
    const sums =
      jobs === 1 ? many(from ?? 1, seeds ?? 0) : await inProcesses(from ?? 1, seeds ?? 0, jobs ?? 1);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    console.log(
      `${sums.faults} faults, ${sums.messages} messages, ${sums.answer} requests answered, ${sums.error} ended with an error, ${sums.gone} lost with their client's node, ${seconds} s`,
    );
    console.log(` ${sums.ran - sums.failed} pass\n ${sums.failed} fail`);
    process.exitCode = sums.failed === 0 ? 0 : 1;
  }
}
