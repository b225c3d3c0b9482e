// GET /metrics for Prometheus. Where a number means the same as one of vLLM's it has vLLM's name, labels and buckets,
// so that dashboards work; what is caravan's own begins with caravan_. docs/api.md lists them.

import type { EngineStatus, Timing, Usage } from "../../engine/protocol.ts";
import type { CaravanError } from "../../errors.ts";
import { availableMemory } from "../../model/machine-memory.ts";
import { VERSION } from "../../version.ts";
import type { ApiDependencies } from "../serve-generation.ts";
import { Counter, gauge, Histogram, type HistogramSeries } from "./prometheus.ts";

const FIRST_TOKEN_SECONDS = [
  0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
  2560,
];
const TOKEN_SECONDS = [
  0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
];
const REQUEST_SECONDS = [
  0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
];
/** 1, 2, 5, 10 … up to Llama 4 Scout's context. */
const TOKENS = Array.from({ length: 8 }, (_, exponent) => [1, 2, 5].map((x) => x * 10 ** exponent))
  .flat()
  .filter((bound) => bound <= 10_485_760);

const MODEL_LABELS = ["model_name", "engine"];
/** One engine a model: what other servers number. */
const ENGINE = "0";

const modelHistogram = (name: string, help: string, bounds: readonly number[]): Histogram =>
  new Histogram({ name: `vllm:${name}`, help, labels: MODEL_LABELS }, bounds);
const modelCounter = (name: string, help: string, more: readonly string[] = []): Counter =>
  new Counter({ name: `vllm:${name}`, help, labels: [...MODEL_LABELS, ...more] });

export class ServingMetrics {
  readonly #firstToken = modelHistogram(
    "time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    FIRST_TOKEN_SECONDS,
  );
  readonly #nextToken = modelHistogram(
    "inter_token_latency_seconds",
    "Between two tokens of one answer.",
    TOKEN_SECONDS,
  );
  readonly #perToken = modelHistogram(
    "request_time_per_output_token_seconds",
    "Decoding time of an answer over its tokens after the first.",
    TOKEN_SECONDS,
  );
  readonly #latency = modelHistogram(
    "e2e_request_latency_seconds",
    "From a request's arrival to the end of its reply.",
    REQUEST_SECONDS,
  );
  readonly #queue = modelHistogram(
    "request_queue_time_seconds",
    "How long a sequence waited for a place in the batch.",
    REQUEST_SECONDS,
  );
  readonly #prefill = modelHistogram(
    "request_prefill_time_seconds",
    "From a sequence's first step to its first token.",
    REQUEST_SECONDS,
  );
  readonly #decode = modelHistogram(
    "request_decode_time_seconds",
    "From a sequence's first token to its last.",
    REQUEST_SECONDS,
  );
  readonly #inference = modelHistogram(
    "request_inference_time_seconds",
    "From a sequence's first step to its last token.",
    REQUEST_SECONDS,
  );
  readonly #promptSize = modelHistogram("request_prompt_tokens", "Tokens of a sequence's prompt.", TOKENS);
  readonly #answerSize = modelHistogram(
    "request_generation_tokens",
    "Tokens of a sequence's answer.",
    TOKENS,
  );
  readonly #answers = modelHistogram("request_params_n", "Sequences of a request.", [1, 2, 5, 10, 20]);
  readonly #limits = modelHistogram(
    "request_params_max_tokens",
    "Most tokens that a request's answers may have.",
    TOKENS,
  );
  readonly #promptTokens = modelCounter("prompt_tokens", "Prompt tokens, cached ones included.");
  readonly #generationTokens = modelCounter("generation_tokens", "Tokens of answers.");
  readonly #success = modelCounter(
    "request_success",
    "Sequences that ended, by reason (stop, length, abort: the client left).",
    ["finished_reason"],
  );
  readonly #failures = new Counter({
    name: "caravan_request_failures",
    help: "Generation requests that ended with an error, by its code.",
    labels: ["model_name", "code"],
  });
  readonly #requests = new Counter({
    name: "caravan_http_requests",
    help: "Requests answered (a stream: begun to be answered), by route and status.",
    labels: ["route", "method", "status"],
  });

  firstToken(model: string, ms: number): void {
    this.#firstToken.observe([model, ENGINE], ms / 1000);
  }

  /** Where the times between a model's tokens go, in seconds. */
  nextTokens(model: string): HistogramSeries {
    return this.#nextToken.of([model, ENGINE]);
  }

  /** A sequence came to its end. */
  finished(model: string, end: { reason: string; usage: Usage; timing: Timing | undefined }): void {
    const labels = [model, ENGINE];
    const { prompt_tokens: prompt, completion_tokens: completion } = end.usage;
    this.#success.add([...labels, end.reason]);
    this.#promptTokens.add(labels, prompt);
    this.#generationTokens.add(labels, completion);
    this.#promptSize.observe(labels, prompt);
    this.#answerSize.observe(labels, completion);
    if (end.timing === undefined) return;
    const { queue_ms: queue, prefill_ms: prefill, decode_ms: decode } = end.timing;
    this.#queue.observe(labels, queue / 1000);
    this.#prefill.observe(labels, prefill / 1000);
    this.#decode.observe(labels, decode / 1000);
    this.#inference.observe(labels, (prefill + decode) / 1000);
    if (completion > 1) this.#perToken.observe(labels, decode / 1000 / (completion - 1));
  }

  /** A request's reply ended. */
  closed(
    model: string,
    { n, maxTokens }: { n: number; maxTokens: number },
    ms: number,
    error: CaravanError | undefined,
  ): void {
    const labels = [model, ENGINE];
    this.#answers.observe(labels, n);
    this.#limits.observe(labels, maxTokens);
    if (error === undefined) this.#latency.observe(labels, ms / 1000);
    else if (error.code === "cancelled") this.#success.add([...labels, "abort"]);
    else this.#failures.add([model, error.code]);
  }

  /** `route`: the path as it is registered; undefined where there is none: clients must not make up label values. */
  answered(route: string | undefined, method: string, status: number): void {
    const known = route === undefined ? ["other", "other"] : [route, method];
    this.#requests.add([...known, String(status)]);
  }

  text(): string {
    const all = [
      this.#firstToken,
      this.#nextToken,
      this.#perToken,
      this.#latency,
      this.#queue,
      this.#prefill,
      this.#decode,
      this.#inference,
      this.#promptSize,
      this.#answerSize,
      this.#answers,
      this.#limits,
      this.#promptTokens,
      this.#generationTokens,
      this.#success,
      this.#failures,
      this.#requests,
    ];
    return all.map((metric) => metric.text()).join("");
  }
}

/** One engine's number; undefined where the engine does not tell. */
type Reading = (status: EngineStatus) => number | undefined;

const ENGINE_GAUGES: [name: string, help: string, read: Reading][] = [
  ["vllm:num_requests_running", "Sequences in the batch.", (status) => status.running],
  ["vllm:num_requests_waiting", "Sequences that wait for a place in the batch.", (status) => status.waiting],
  ["vllm:kv_cache_usage_perc", "Share of the cache's pages that are in use, 0 to 1.", cacheUsage],
  [
    "caravan_model_memory_bytes",
    "Planned memory of a model: weights, cache and scratch.",
    ({ memory }) => memory && memory.weights_mapped + memory.weights_copied + memory.kv + memory.scratch,
  ],
  [
    "caravan_model_peak_resident_bytes",
    "Most memory that the model's process had resident.",
    (status) => status.peak_resident_bytes,
  ],
];

const ENGINE_COUNTERS: [name: string, help: string, read: Reading][] = [
  [
    "vllm:prefix_cache_queries",
    "Prompt tokens that were looked up in the cache.",
    (status) => status.prefix_cache?.tokens,
  ],
  [
    "vllm:prefix_cache_hits",
    "Prompt tokens that were found in the cache.",
    (status) => status.prefix_cache?.cached_tokens,
  ],
  ["vllm:spec_decode_num_drafts", "Rows of steps that carried drafts.", (status) => status.speculation?.rows],
  ["vllm:spec_decode_num_draft_tokens", "Drafted tokens.", (status) => status.speculation?.drafted],
  [
    "vllm:spec_decode_num_accepted_tokens",
    "Drafted tokens that were accepted.",
    (status) => status.speculation?.accepted,
  ],
];

function cacheUsage({ pages }: EngineStatus): number | undefined {
  if (pages === undefined) return undefined;
  const total = pages.full.total + pages.chunked.total;
  return total === 0 ? 0 : 1 - (pages.full.free + pages.chunked.free) / total;
}

function engineText(statuses: readonly EngineStatus[]): string {
  const rows = (read: Reading) =>
    statuses.flatMap((status) => {
      const value = read(status);
      return value === undefined ? [] : [{ labels: [status.model, ENGINE], value }];
    });
  const text = (type: "gauge" | "counter") =>
    (type === "gauge" ? ENGINE_GAUGES : ENGINE_COUNTERS)
      .map(([name, help, read]) => gauge({ name, help, labels: MODEL_LABELS }, rows(read), type))
      .join("");
  return text("gauge") + text("counter");
}

function processText(running: number): string {
  const one = (name: string, help: string, value: number, type?: "counter") =>
    gauge({ name, help, labels: [] }, [{ labels: [], value }], type);
  const { user, system } = process.cpuUsage();
  const memory = availableMemory();
  return [
    gauge({ name: "caravan_build_info", help: "Versions of caravan and Bun.", labels: ["version", "bun"] }, [
      { labels: [VERSION, Bun.version], value: 1 },
    ]),
    one("caravan_generations_running", "Generation requests that are being served.", running),
    one("caravan_machine_memory_bytes", "Memory of this machine.", memory.total),
    one(
      "caravan_machine_memory_available_bytes",
      "Memory that this machine can still give.",
      memory.available,
    ),
    one("process_resident_memory_bytes", "Resident memory of the node's process.", process.memoryUsage.rss()),
    one("process_cpu_seconds", "Processor time of the node's process.", (user + system) / 1e6, "counter"),
    one(
      "process_start_time_seconds",
      "When the node's process started, in seconds since 1970.",
      performance.timeOrigin / 1000,
    ),
  ].join("");
}

export function metricsRoute({ metrics, models, lifecycle }: ApiDependencies) {
  return (): Response =>
    new Response(metrics.text() + engineText(models.statuses()) + processText(lifecycle.running), {
      headers: { "content-type": "text/plain; version=0.0.4; charset=utf-8" },
    });
}
