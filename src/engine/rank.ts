// A rank process (`caravan rank`): one rank > 0 of a model. It opens its end of the group, connects, loads its shard, and
// follows rank 0 until that closes its engine. It ends when stdin does, whatever it is doing, so it never outlives
// the process that started it.

import * as v from "valibot";
import { shardPlan } from "../cluster/shard.ts";
import { CaravanError } from "../errors.ts";
import { readModelConfig } from "../model/config.ts";
import { makeLoadPlan } from "../model/load-plan.ts";
import { peakResidentBytes } from "../model/machine-memory.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import { cpuName } from "./binding.ts";
import { errorRecord } from "./error-record.ts";
import { Follower } from "./follower.ts";
import { RankGroup } from "./group.ts";
import { LineSplitter } from "./line-splitter.ts";
import { MessageWriter } from "./message-writer.ts";
import { encodePlan } from "./plan-encoder.ts";
import {
  addressBytes,
  addressText,
  type GroupOptions,
  GroupOptionsSchema,
  type RankCommand,
  RankCommandSchema,
  type RankLoad,
  type RankMessage,
} from "./rank-protocol.ts";

/** Time to free everything once told to leave; the system frees what is left. */
const LEAVE_LIMIT_MS = 2000;

/** Runs until stdin ends, a shutdown command comes, rank 0 is done, or something fails; gives the exit code. */
export async function runRank(): Promise<number> {
  // An interrupt in the terminal reaches the whole process group; the parent decides when its ranks end.
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => {});
  const rank = new Rank(new MessageWriter<RankMessage>(process.stdout));
  readCommands(rank);
  const code = await rank.ended;
  const timer = setTimeout(() => process.exit(code), LEAVE_LIMIT_MS);
  await rank.close();
  clearTimeout(timer);
  return code;
}

async function readCommands(rank: Rank): Promise<void> {
  const lines = new LineSplitter();
  try {
    for await (const chunk of Bun.stdin.stream()) for (const line of lines.push(chunk)) rank.take(line);
    rank.end(0);
  } catch (thrown) {
    rank.fail(thrown);
  }
}

class Rank {
  readonly #writer: MessageWriter<RankMessage>;
  readonly #ended = Promise.withResolvers<number>();
  /** Commands are carried out one after the other. */
  #turn: Promise<void> = Promise.resolve();
  #options: GroupOptions | undefined;
  #group: RankGroup | undefined;
  #engine: Follower | undefined;
  #over = false;

  constructor(writer: MessageWriter<RankMessage>) {
    this.#writer = writer;
  }

  get ended(): Promise<number> {
    return this.#ended.promise;
  }

  end(code: number): void {
    this.#over = true;
    this.#ended.resolve(code);
  }

  fail(thrown: unknown): void {
    if (this.#over) return;
    this.#say({ type: "fatal", error: errorRecord(thrown) });
    this.end(1);
  }

  /** A line of stdin. Throws where it makes no sense. */
  take(line: string): void {
    if (this.#options === undefined) {
      this.#options = parse(GroupOptionsSchema, line);
      this.#open(this.#options);
      return;
    }
    const command = parse(RankCommandSchema, line);
    if (command.type === "shutdown") this.end(0);
    else this.#turn = this.#turn.then(() => this.#obey(command)).catch((thrown) => this.fail(thrown));
  }

  async close(): Promise<void> {
    if (this.#group !== undefined) this.#group.abort("the rank is told to leave");
    await this.#engine?.close();
    this.#group?.close();
    await this.#writer.end();
  }

  #open(options: GroupOptions): void {
    this.#group = RankGroup.open(options);
    this.#say({ type: "address", address: addressText(this.#group.address) });
  }

  async #obey(command: RankCommand): Promise<void> {
    if (this.#over || this.#group === undefined || this.#options === undefined) return;
    switch (command.type) {
      case "connect": {
        const addresses = command.addresses.map(addressBytes);
        const connection = await this.#group.connect(addresses, command.timeout_ms);
        this.#say({ type: "connected", ...connection });
        return;
      }
      case "measure": {
        const { roundTripUs, bandwidth } = this.#group.measure(command.most_ms);
        this.#say({ type: "measured", round_trip_us: roundTripUs, bandwidth });
        return;
      }
      case "load":
        await this.#load(command.load, this.#options.rank, this.#group);
        return;
      case "status": {
        const stats = this.#engine?.stats();
        const { exchangeNs = 0, computeNs = 0 } = stats ?? {};
        this.#say({
          type: "status",
          rank: this.#options.rank,
          exchange_ns: exchangeNs,
          compute_ns: computeNs,
          peak_resident_bytes: peakResidentBytes(),
        });
        return;
      }
      case "shutdown":
        return;
    }
  }

  async #load(load: RankLoad, rank: number, group: RankGroup): Promise<void> {
    if (this.#engine !== undefined)
      throw new CaravanError("internal_error", "the rank has loaded its shard already");
    const engine = await Follower.load(await shardBytes(load, rank), group.pointer, (bytes) =>
      this.#say({ type: "loading", bytes }),
    );
    this.#engine = engine;
    engine.ended.then((error) => (error === undefined ? this.end(0) : this.fail(error)));
    const stats = engine.stats();
    this.#say({
      type: "ready",
      memory: {
        weights_mapped: stats.weightsMapped,
        weights_copied: stats.weightsCopied,
        kv: stats.kvBytes,
        scratch: stats.scratchBytes,
      },
      threads: stats.threads,
      cpu: cpuName(stats.cpuLevel),
    });
  }

  #say(message: RankMessage): void {
    this.#writer.add(message);
    this.#writer.flush();
  }
}

/** The rank's load plan, encoded. */
async function shardBytes(load: RankLoad, rank: number): Promise<Uint8Array> {
  const { modelDir, shares, sizes, threads, device, cpuLevel } = load;
  const config = readModelConfig(modelDir);
  const plan = makeLoadPlan(config, await openCheckpoint(modelDir));
  return encodePlan(shardPlan(plan, shares, rank), {
    ...sizes,
    threads,
    device: device ?? "cpu",
    cpuLevel: cpuLevel ?? 0,
  });
}

function parse<T>(schema: v.GenericSchema<unknown, T>, line: string): T {
  const result = v.safeParse(schema, JSON.parse(line));
  if (result.success) return result.output;
  const { message, path } = result.issues[0];
  const where = path?.map((item) => String(item.key)).join(".");
  throw new CaravanError("internal_error", `the rank got a line that it does not understand: ${message}`, {
    ...(where === undefined ? {} : { where }),
  });
}
