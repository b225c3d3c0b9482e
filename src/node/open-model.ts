// Opens one model on this node: a runner process for the arithmetic, a text worker for tokenizer and template, and
// what the model says about how to sample it. The result is what the API and the terminal chat generate with.

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { TextService as ApiText, LoadedModel } from "../api/model-directory.ts";
import { samplingFromGenerationConfig } from "../api/sampling-defaults.ts";
import { Detokenizer } from "../chat/detokenizer.ts";
import { StopMatcher } from "../chat/stop.ts";
import { TextService } from "../chat/text-service.ts";
import { bytesOf } from "../chat/token-table.ts";
import type { RankOptions } from "../engine/load-options.ts";
import type { Engine } from "../engine/protocol.ts";
import { RunnerClient, type RunnerClientOptions } from "../engine/runner-client.ts";
import { CaravanError } from "../errors.ts";
import type { InstalledModel } from "../model/store.ts";

/** How a model is run; absent = chosen by the runner from the machine and the model. */
export interface RunOptions extends RankOptions {
  context?: number;
  threads?: number;
  /** "auto" (also when absent): the GPU where there is one that can run the model. */
  device?: "auto" | "cpu" | "metal";
  maxQueue?: number;
  /** "sequential" or "batched" instead of what the policy chooses. */
  scheduling?: "sequential" | "batched";
  /** Bits of the cache's elements. */
  kvBits?: 8 | 16;
  /** False: every prompt is computed whole. */
  prefixCache?: boolean;
  /** False: one token at a time, no drafts. */
  speculate?: boolean;
}

export interface OpenOptions
  extends RunOptions,
    Pick<RunnerClientOptions, "instance" | "streams" | "onAddress" | "onConnected"> {
  /** 0 to 1, and what is being done. */
  onProgress?: (fraction: number, detail: string) => void;
  /** Gives up loading; the promise then rejects with its reason. */
  signal?: AbortSignal;
  /** The runner, as soon as it starts: the ranks of an instance are connected before it is ready. */
  onEngine?: (engine: RunnerClient) => void;
}

export interface OpenModel extends LoadedModel {
  readonly engine: Engine;
  /** Every request ends with `error`, those to come too: it is about to be closed. */
  endRequests(error: CaravanError): void;
  close(): Promise<void>;
}

/** Starts the runner and the text worker together and waits for both. On failure nothing is left running. */
export async function openModel(model: InstalledModel, options: OpenOptions): Promise<OpenModel> {
  const { signal, onEngine, ...load } = options;
  signal?.throwIfAborted();
  const engine = new RunnerClient({ model: model.name, modelDir: model.path, ...load });
  onEngine?.(engine);
  const text = TextService.start(model.path);
  const aborted = Promise.withResolvers<never>();
  const onAbort = () => aborted.reject(signal?.reason);
  signal?.addEventListener("abort", onAbort, { once: true });
  try {
    await Promise.race([Promise.all([text, engine.ready()]), aborted.promise]);
    return assemble(model, engine, await text);
  } catch (thrown) {
    // Whichever failed first is the reason; the other one is not waited for.
    text.then(
      (service) => service.close(),
      () => undefined,
    );
    await engine.close();
    throw thrown;
  } finally {
    signal?.removeEventListener("abort", onAbort);
  }
}

function assemble(model: InstalledModel, engine: RunnerClient, text: TextService): OpenModel {
  const status = engine.status();
  const { table, vocabSize, beginIds, eosIds } = text.info;
  const decoder = new TextDecoder();
  const apiText: ApiText = {
    renderChat: ({ messages, addGenerationPrompt, tools }, options) =>
      text.renderChat(
        {
          messages: [...messages],
          add_generation_prompt: addGenerationPrompt,
          ...(tools === undefined ? {} : { tools: [...tools] }),
        },
        options,
      ),
    encode: (value, options) => text.encode(value, options),
    decode: (ids) => {
      const detokenizer = new Detokenizer(table);
      return ids.map((id) => detokenizer.push(id)).join("") + detokenizer.flush();
    },
    tokenBytes: (id) => bytesOf(table, id),
  };
  const samplingPath = join(model.path, "generation_config.json");
  return {
    id: model.name,
    created: model.created,
    ownedBy: model.hubId?.split("/")[0] ?? "local",
    contextLength: status.context ?? 0,
    vocabSize,
    fingerprint: `fp_${Bun.hash(`${model.path} ${model.commit ?? model.created} ${status.cpu ?? ""}`).toString(36)}`,
    engine,
    text: apiText,
    beginIds,
    eosIds,
    defaults: {
      generationConfig: existsSync(samplingPath)
        ? samplingFromGenerationConfig(readJson(samplingPath, decoder), samplingPath)
        : {},
      card: model.card?.sampling_defaults ?? {},
    },
    ...(status.policy === undefined ? {} : { policy: status.policy }),
    newDetokenizer: (options) => new Detokenizer(table, options),
    newStopMatcher: (stops) => new StopMatcher([...stops]),
    endRequests(error) {
      engine.endRequests(error);
      text.close(error);
    },
    async close() {
      text.close();
      await engine.close();
    },
  };
}

function readJson(path: string, decoder: TextDecoder): unknown {
  try {
    return JSON.parse(decoder.decode(readFileSync(path)));
  } catch (thrown) {
    throw new CaravanError("bad_file", `is not JSON: ${thrown instanceof Error ? thrown.message : thrown}`, {
      where: path,
    });
  }
}
