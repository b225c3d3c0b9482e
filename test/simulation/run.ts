// Runs seeds of the simulation and prints those that fail, each with the command that repeats it.
// usage: bun test/simulation/run.ts [--seeds N] [--from S]        many seeds, a line at the end
//        bun test/simulation/run.ts --seed S                      one, with its story

import { parseArgs } from "node:util";
import { runSeed } from "./world.ts";

const { values } = parseArgs({
  options: {
    seeds: { type: "string", default: "500" },
    from: { type: "string", default: "1" },
    seed: { type: "string" },
  },
});

function one(seed: number): number {
  const { story, violation, requests, messages } = runSeed(seed, true);
  for (const line of story) console.log(line);
  console.log(`${messages} messages, requests: ${JSON.stringify(requests)}`);
  console.log(violation === undefined ? `seed ${seed} holds` : `seed ${seed} fails ${violation}`);
  return violation === undefined ? 0 : 1;
}

function many(from: number, count: number): number {
  const started = performance.now();
  let failed = 0;
  const sums = { answer: 0, error: 0, gone: 0, messages: 0, faults: 0 };
  for (let seed = from; seed < from + count; seed++) {
    const result = runSeed(seed);
    if (result.violation !== undefined) {
      failed++;
      console.log(`(fail) seed ${seed} ${result.violation}`);
      console.log(`       repeat it: bun test/simulation/run.ts --seed ${seed}`);
    }
    for (const end of ["answer", "error", "gone"] as const) sums[end] += result.requests[end];
    sums.messages += result.messages;
    sums.faults += result.faults;
  }
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  console.log(
    `${sums.faults} faults, ${sums.messages} messages, ${sums.answer} requests answered, ${sums.error} ended with an error, ${sums.gone} lost with their client's node, ${seconds} s`,
  );
  console.log(` ${count - failed} pass\n ${failed} fail`);
  return failed === 0 ? 0 : 1;
}

const whole = (text: string, name: string): number => {
  if (!/^\d{1,9}$/.test(text)) throw new Error(`--${name} takes a whole number, not "${text}"`);
  return Number(text);
};
process.exitCode =
  values.seed === undefined
    ? many(whole(values.from, "from"), whole(values.seeds, "seeds"))
    : one(whole(values.seed, "seed"));
