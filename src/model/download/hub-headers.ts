// What a model of the hub is made of, without downloading it: its configuration, and the headers of its weight files by ranges. Enough
// to plan where it would go. A few hundred kilobytes of a model of hundreds of gigabytes.

import { asCaravanError, CaravanError } from "../../errors.ts";
import type { Environment } from "../../paths.ts";
import { type ModelConfig, parseModelConfig } from "../config.ts";
import {
  type Checkpoint,
  INDEX_FILE,
  MAX_HEADER_BYTES,
  mergeHeaders,
  parseIndex,
  parseSafetensorsHeader,
  type SafetensorsHeader,
  SINGLE_FILE,
} from "../safetensors.ts";
import { fetchCommit, fetchTree, type HubApiOptions } from "./hub-api.ts";
import { hubEnvironment } from "./hub-environment.ts";
import { type PlannedFile, planDownload } from "./plan.ts";
import { hubIdOf } from "./pull.ts";
import { PassingFault, RETRY_LIMITS, RetryBudget, type RetryLimits } from "./retry.ts";
import { openTransfer } from "./transfer.ts";

/** Headers of shards are mostly shorter; what is longer costs a second request. */
const FIRST_BYTES = 32 * 1024;
const CONNECTIONS = 4;
const STALL_MS = 15_000;
const MAX_TEXT_BYTES = 64 * 1024 * 1024;

export interface HubHeadersOptions {
  env?: Environment;
  signal?: AbortSignal;
  retry?: Partial<RetryLimits>;
}

export interface HubModel {
  /** org/name */
  id: string;
  commit: string;
  config: ModelConfig;
  checkpoint: Checkpoint;
  /** Bytes of its weight files, and bytes of files that were read for this. */
  totalBytes: number;
  readBytes: number;
}

/**
 * A card's name or a hub id, with @revision if one is meant. Throws CaravanError: model_not_found, permission_denied, unsupported_model, bad_file,
 * download_failed, cancelled, invalid_argument.
 */
export async function readHubModel(model: string, options: HubHeadersOptions = {}): Promise<HubModel> {
  const env = options.env ?? process.env;
  const { id, named } = hubIdOf(model, env);
  const { endpoint, token, offline } = hubEnvironment(env);
  if (offline)
    throw new CaravanError("download_failed", "HF_HUB_OFFLINE is set and the model is not here", {
      where: id,
    });
  const signal = options.signal ?? new AbortController().signal;
  const api: HubApiOptions = {
    ...{ endpoint, token, stallMs: STALL_MS, signal },
    retry: { ...RETRY_LIMITS, failures: 3, ...options.retry },
  };
  try {
    const { commit } = await fetchCommit(id, named ?? "main", api);
    const files = planDownload(id, await fetchTree(id, commit, api));
    return await new HubReader(id, commit, files, api).read();
  } catch (thrown) {
    if (signal.aborted)
      throw new CaravanError("cancelled", "reading the model's headers was stopped", { where: id });
    throw asCaravanError(thrown);
  }
}

class HubReader {
  #bytes = 0;

  constructor(
    private readonly id: string,
    private readonly commit: string,
    private readonly files: readonly PlannedFile[],
    private readonly api: HubApiOptions,
  ) {}

  async read(): Promise<HubModel> {
    const { id, commit } = this;
    const configFile = this.#file("config.json");
    const config = await this.#json(configFile);
    const generation = this.files.some(({ path }) => path === "generation_config.json")
      ? await this.#json(this.#file("generation_config.json"))
      : undefined;
    const weights = await this.#weightFiles();
    const headers = await this.#headers(weights);
    const where = `${id}/${configFile.path}`;
    return {
      ...{ id, commit, config: parseModelConfig(config, where, generation) },
      checkpoint: mergeHeaders(id, headers),
      totalBytes: weights.reduce((sum, { size }) => sum + size, 0),
      readBytes: this.#bytes,
    };
  }

  #file(path: string): PlannedFile {
    const file = this.files.find((each) => each.path === path);
    if (file === undefined)
      throw new CaravanError("bad_file", "is promised by the index, but not in the repository", {
        where: `${this.id}/${path}`,
      });
    return file;
  }

  /** Those of the index, else all shards. */
  async #weightFiles(): Promise<PlannedFile[]> {
    if (this.files.some(({ path }) => path === INDEX_FILE)) {
      const where = `${this.id}/${INDEX_FILE}`;
      const names = new Set(Object.values(parseIndex(await this.#text(this.#file(INDEX_FILE)), where)));
      return [...names].sort().map((name) => this.#file(name));
    }
    const single = this.files.find(({ path }) => path === SINGLE_FILE);
    return single === undefined ? this.files.filter(({ path }) => path.endsWith(".safetensors")) : [single];
  }

  async #headers(files: readonly PlannedFile[]): Promise<SafetensorsHeader[]> {
    const out: SafetensorsHeader[] = [];
    let next = 0;
    const work = async () => {
      for (let i = next++; i < files.length; i = next++) {
        const file = files[i];
        if (file !== undefined) out[i] = await this.#header(file);
      }
    };
    await Promise.all(Array.from({ length: Math.min(CONNECTIONS, files.length) }, work));
    return out;
  }

  async #header(file: PlannedFile): Promise<SafetensorsHeader> {
    const path = `${this.id}/${file.path}`;
    const wrong = (message: string) => new CaravanError("bad_file", message, { where: path });
    if (file.size < 8) throw wrong(`is ${file.size} bytes long: too short for a safetensors file`);
    const first = await this.#range(file, 0, Math.min(FIRST_BYTES, file.size));
    const length = new DataView(first.buffer, first.byteOffset, 8).getBigUint64(0, true);
    if (length > BigInt(Math.min(MAX_HEADER_BYTES, file.size - 8)))
      throw wrong(`header length ${length} is over the limit, or longer than the file`);
    const dataStart = 8 + Number(length);
    const rest =
      dataStart <= first.length ? new Uint8Array(0) : await this.#range(file, first.length, dataStart);
    const bytes = Buffer.concat([first, rest]).subarray(8, dataStart);
    return parseSafetensorsHeader(bytes, { path, sizeBytes: file.size, dataStart });
  }

  async #json(file: PlannedFile): Promise<unknown> {
    try {
      return JSON.parse(await this.#text(file));
    } catch (cause) {
      if (!(cause instanceof SyntaxError)) throw cause;
      throw new CaravanError("bad_file", "is not valid JSON", { where: `${this.id}/${file.path}`, cause });
    }
  }

  async #text(file: PlannedFile): Promise<string> {
    if (file.size > MAX_TEXT_BYTES)
      throw new CaravanError("bad_file", `is ${file.size} bytes long: no text file of a model is`, {
        where: `${this.id}/${file.path}`,
      });
    return new TextDecoder().decode(await this.#range(file, 0, file.size));
  }

  /** Bytes from start to before end, tried again where the connection fails. */
  async #range(file: PlannedFile, start: number, end: number): Promise<Uint8Array> {
    const path = file.path.split("/").map(encodeURIComponent).join("/");
    const url = `${this.api.endpoint}/${this.id}/resolve/${this.commit}/${path}`;
    const budget = new RetryBudget(url, this.api.retry, this.api.signal);
    for (;;) {
      try {
        return await this.#once(url, start, end);
      } catch (fault) {
        if (!(fault instanceof PassingFault)) throw fault;
        await budget.failed(fault);
      }
    }
  }

  async #once(url: string, start: number, end: number): Promise<Uint8Array> {
    if (end === start) return new Uint8Array(0);
    const transfer = await openTransfer(url, { start, end }, this.api);
    // A server that knows no ranges sends the file from its beginning; what is behind the end is not waited for.
    let skip = transfer.status === 206 ? 0 : start;
    const out = new Uint8Array(end - start);
    let got = 0;
    try {
      for await (const part of transfer.body) {
        this.#bytes += part.byteLength;
        const dropped = Math.min(skip, part.byteLength);
        skip -= dropped;
        const piece = part.subarray(dropped, dropped + out.length - got);
        out.set(piece, got);
        got += piece.byteLength;
        if (got === out.length) return out;
      }
    } finally {
      transfer.close();
    }
    throw new PassingFault(`the hub sent ${got} of ${out.length} bytes`);
  }
}
