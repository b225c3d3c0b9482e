// All commands, in the order in which the overview lists them.

import { bench } from "./bench.ts";
import { cluster } from "./cluster.ts";
import type { Command } from "./command.ts";
import { completion } from "./completion.ts";
import { configCommand } from "./config.ts";
import { doctor } from "./doctor.ts";
import { importCommand } from "./import.ts";
import { join } from "./join.ts";
import { licenses } from "./licenses.ts";
import { logits } from "./logits.ts";
import { models } from "./models.ts";
import { plan } from "./plan.ts";
import { ps } from "./ps.ts";
import { pull } from "./pull.ts";
import { rank } from "./rank.ts";
import { rdma } from "./rdma.ts";
import { run } from "./run.ts";
import { runner } from "./runner.ts";
import { serve } from "./serve.ts";
import { service } from "./service.ts";
import { stop } from "./stop.ts";
import { template } from "./template.ts";
import { tokenize } from "./tokenize.ts";

export const commands: readonly Command[] = [
  run,
  serve,
  ps,
  stop,
  pull,
  importCommand,
  models,
  cluster,
  join,
  service,
  plan,
  bench,
  logits,
  tokenize,
  template,
  doctor,
  configCommand,
  completion,
  licenses,
  runner,
  rank,
  rdma,
];

/** Commands of which nothing is built, and what they will come with. */
export const LATER_COMMANDS: Readonly<Record<string, string>> = {};
