// The runner process (`caravan runner`, started by RunnerClient): loads one model and generates with it. One JSON
// object a line: load options and then RunnerCommands on stdin, RunnerMessages on stdout, the log on stderr. It ends
// when stdin does, so it never outlives the node that started it.

import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import { peakResidentBytes } from "../model/machine-memory.ts";
import { choosePolicy } from "../scheduler/policy.ts";
import { PromptLookup } from "../scheduler/prompt-lookup.ts";
import { Scheduler } from "../scheduler/scheduler.ts";
import { StepLoop } from "../scheduler/step-loop.ts";
import { errorRecord } from "./error-record.ts";
import { GrammarGate } from "./grammar-gate.ts";
import { LineSplitter } from "./line-splitter.ts";
import { type LoadedEngine, loadModel } from "./load-model.ts";
import { type LoadOptions, LoadOptionsSchema } from "./load-options.ts";
import { MessageWriter } from "./message-writer.ts";
import type { EngineStatus, RunnerCommand } from "./protocol.ts";
import { addressBytes, addressText, type Instance } from "./rank-protocol.ts";
import { RemoteRanks } from "./remote-ranks.ts";
import { RunnerCommandSchema } from "./runner-commands.ts";

/** Steps in flight: the next decode step is queued while one is computed. */
const PIPELINE_DEPTH = 2;
const DEFAULT_MAX_QUEUE = 256;
/** Between two status messages that nobody asked for. */
const STATUS_PAUSE_MS = 100;

/** Runs until stdin ends or a shutdown command comes; gives the exit code. */
export async function runRunner(): Promise<number> {
  // An interrupt in the terminal reaches the whole group; the node decides when its runners end.
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => {});
  const writer = new MessageWriter(process.stdout);
  const lines = new LineSplitter();
  let runner: Runner | undefined;
  let options: LoadOptions | undefined;
  let remote: RemoteRanks | undefined;
  try {
    for await (const chunk of Bun.stdin.stream())
      for (const line of lines.push(chunk)) {
        if (options === undefined) {
          options = parse(LoadOptionsSchema, line);
          if (options.instance !== undefined) remote = listen(options.instance, writer);
          else runner = await Runner.load(options, writer);
          continue;
        }
        const command = parse(RunnerCommandSchema, line);
        if (command.type === "shutdown") return await end(runner, writer, 0);
        if (command.type === "lost") remote?.report(CaravanError.fromJSON(command.error));
        else if (runner !== undefined) runner.obey(command);
        else if (remote !== undefined && command.type === "connect") {
          await connect(remote, command, writer);
          runner = await Runner.load(options, writer, remote);
        }
      }
    return await end(runner, writer, 0);
  } catch (thrown) {
    const error = errorRecord(thrown);
    remote?.group.abort(error.message);
    writer.add({ type: "fatal", error });
    return await end(runner, writer, 1);
  }
}

/** Rank 0's end of the ranks that nodes start. */
function listen({ group, shares }: Instance, writer: MessageWriter): RemoteRanks {
  const pipeline = (shares.at(-1)?.stage ?? 0) + 1;
  const remote = RemoteRanks.open(group, { tensor: shares.length / pipeline, pipeline });
  writer.add({ type: "address", address: addressText(remote.group.address) });
  writer.flush();
  return remote;
}

async function connect(
  remote: RemoteRanks,
  { addresses, timeout_ms }: { addresses: string[]; timeout_ms: number },
  writer: MessageWriter,
): Promise<void> {
  const connection = await remote.connect(addresses.map(addressBytes), timeout_ms);
  writer.add({ type: "connected", ...connection });
  writer.flush();
}

async function end(runner: Runner | undefined, writer: MessageWriter, code: number): Promise<number> {
  await runner?.close();
  await writer.end();
  return code;
}

function parse<T>(schema: v.GenericSchema<unknown, T>, line: string): T {
  const result = v.safeParse(schema, JSON.parse(line));
  if (result.success) return result.output;
  const { message, path } = result.issues[0];
  const where = path?.map((item) => String(item.key)).join(".");
  throw new CaravanError("internal_error", `the runner got a line that it does not understand: ${message}`, {
    ...(where === undefined ? {} : { where }),
  });
}

class Runner {
  readonly #options: LoadOptions;
  readonly #model: LoadedEngine;
  readonly #writer: MessageWriter;
  readonly #policy: { mode: "sequential" | "batched"; reason: string };
  readonly #scheduler: Scheduler;
  readonly #loop: StepLoop;
  readonly #gate: GrammarGate;
  #told = { running: 0, waiting: 0, atMs: 0 };
  /** Of ranks > 0, in order, as far as they have said. */
  #otherPeaks: number[] = [];
  #dying = false;

  private constructor(options: LoadOptions, model: LoadedEngine, writer: MessageWriter) {
    this.#options = options;
    this.#model = model;
    this.#writer = writer;
    this.#policy = choosePolicy({
      cacheKinds: model.cacheKinds,
      backend: model.backend,
      requested: options.scheduling ?? "auto",
    });
    this.#scheduler = new Scheduler({
      geometry: model.geometry,
      limits: model.limits,
      contextTokens: model.contextTokens,
      mode: this.#policy.mode,
      maxWaiting: options.maxQueue ?? DEFAULT_MAX_QUEUE,
      prefixCache: options.prefixCache ?? true,
      ...(options.speculate === false ? {} : { drafter: new PromptLookup() }),
      now: () => performance.now(),
      emit: (event) => writer.add(event),
    });
    this.#loop = new StepLoop({
      scheduler: this.#scheduler,
      engine: model.engine,
      depth: PIPELINE_DEPTH,
      onFatal: (error) => this.#die(error),
      onTurn: () => this.#endTurn(),
      onEvents: () => {
        if (model.engine.failed === undefined) writer.flush();
      },
    });
    this.#gate = new GrammarGate({
      dir: options.modelDir,
      vocab: model.limits.vocab,
      pass: (request, grammar) => this.#loop.add(request, grammar),
      emit: (event) => writer.add(event),
      onTurn: () => this.#endTurn(),
    });
    // With a rank lost the model cannot go on, even while nothing runs.
    model.ranks?.lost.then((error) => {
      this.#loop.stop(error);
      this.#die(error);
    });
    this.#askRanks();
  }

  static async load(options: LoadOptions, writer: MessageWriter, remote?: RemoteRanks): Promise<Runner> {
    const onProgress = (progress: number, detail: string) => {
      writer.add({ type: "loading", progress, detail });
      writer.flush();
    };
    const model = await loadModel(options, onProgress, remote);
    const runner = new Runner(options, model, writer);
    writer.add({ type: "ready", status: runner.#status() });
    writer.flush();
    runner.#gate.prepare();
    return runner;
  }

  obey(command: RunnerCommand): void {
    switch (command.type) {
      case "generate":
        if (command.request.grammar === undefined) this.#loop.add(command.request);
        else this.#gate.add(command.request);
        // Whether it was accepted must not wait for the end of a step.
        this.#writer.flush();
        return;
      case "cancel":
        if (!this.#gate.cancel(command.id)) this.#loop.cancel(command.id);
        return;
      case "status":
        this.#writer.add({ type: "status", status: this.#status() });
        this.#writer.flush();
        return;
      // Before the model is loaded, or for nobody here.
      case "connect":
      case "lost":
      case "shutdown":
        return;
    }
  }

  async close(): Promise<void> {
    this.#gate.close();
    this.#loop.stop(
      new CaravanError("shutting_down", "the model is being unloaded", { retryAfterSeconds: 5 }),
    );
    await this.#model.close();
  }

  /** Sends what the turn produced, and the counts of requests when they changed, but not for every short request. */
  #endTurn(): void {
    // The requests' errors go out in one write with the last message: whoever reads them knows that this runner is ending.
    if (this.#model.engine.failed !== undefined) return;
    const now = performance.now();
    const { running, waiting } = this.#scheduler;
    const changed = running !== this.#told.running || waiting !== this.#told.waiting;
    if (changed && now - this.#told.atMs >= STATUS_PAUSE_MS) {
      this.#told = { running, waiting, atMs: now };
      this.#askRanks();
      this.#writer.add({ type: "status", status: this.#status() });
    }
    this.#writer.flush();
  }

  /** The engine is gone: every request has its error, the node starts another runner. */
  #die(error: CaravanError): void {
    if (this.#dying) return;
    this.#dying = true;
    this.#writer.add({ type: "fatal", error: errorRecord(error) });
    // A rank that is stopped would not leave by itself.
    this.#model.ranks?.kill();
    this.#writer.end().then(() => process.exit(1));
  }

  /** What the ranks have used by the time of the next status. A rank that cannot say is lost, and that is reported. */
  #askRanks(): void {
    this.#model.ranks?.times().then(
      (times) => {
        this.#otherPeaks = times.map(({ peakResidentBytes: peak }) => peak);
      },
      () => undefined,
    );
  }

  #rankPeaks({ tensor, pipeline }: { tensor: number; pipeline: number }): (number | null)[] {
    const others = Array.from({ length: tensor * pipeline - 1 }, (_, i) => this.#otherPeaks[i] ?? null);
    return [peakResidentBytes(), ...others];
  }

  #prefixStatus(): NonNullable<EngineStatus["prefix_cache"]> {
    const { enabled, statistics } = this.#scheduler.prefixes;
    const { lookups, hits, tokens, cachedTokens } = statistics;
    return { enabled, lookups, hits, tokens, cached_tokens: cachedTokens };
  }

  #status(): EngineStatus {
    const { full, chunked } = this.#scheduler.pools;
    const { memory, cpu, device, deviceReason, threads, ranks } = this.#model;
    return {
      model: this.#options.model,
      state: "ready",
      progress: 1,
      policy: this.#policy,
      device,
      device_reason: deviceReason,
      threads,
      cpu,
      ...(ranks === undefined
        ? {}
        : { ranks: { ...ranks.grid, transport: ranks.connection.transport, note: ranks.connection.note } }),
      context: this.#scheduler.contextTokens,
      running: this.#scheduler.running,
      waiting: this.#scheduler.waiting,
      pages: {
        full: { total: full.capacity, free: full.available },
        chunked: { total: chunked.capacity, free: chunked.available },
      },
      prefix_cache: this.#prefixStatus(),
      speculation: {
        enabled: this.#scheduler.speculation.enabled,
        ...this.#scheduler.speculation.statistics,
      },
      memory,
      peak_resident_bytes: peakResidentBytes(),
      ...(ranks === undefined ? {} : { rank_peak_resident_bytes: this.#rankPeaks(ranks.grid) }),
      ...(this.#model.plan.unused.length === 0 ? {} : { unused_tensors: unusedTensors(this.#model) }),
    };
  }
}

const UNUSED_NAMED = 5;

function unusedTensors({ plan }: LoadedEngine): NonNullable<EngineStatus["unused_tensors"]> {
  return { count: plan.unused.length, first: plan.unused.slice(0, UNUSED_NAMED) };
}
