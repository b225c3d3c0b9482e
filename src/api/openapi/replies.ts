// The replies of the API as schemas, for /openapi.json. Tests hold real replies against them; nothing is checked while
// serving. Loose objects may have more fields than are named here.

import * as v from "valibot";

const count = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const text = v.string();
const list = <Item extends v.GenericSchema>(item: Item) =>
  v.looseObject({ object: v.literal("list"), data: v.array(item) });

const usage = v.looseObject({
  prompt_tokens: count,
  completion_tokens: count,
  total_tokens: count,
  prompt_tokens_details: v.looseObject({ cached_tokens: count }),
  completion_tokens_details: v.looseObject({ reasoning_tokens: count }),
});
const replyHead = { id: text, created: count, model: text, system_fingerprint: text };
const toolCall = v.looseObject({
  id: text,
  type: v.literal("function"),
  function: v.looseObject({ name: text, arguments: text }),
});

const chatReply = v.looseObject({
  ...replyHead,
  object: v.literal("chat.completion"),
  choices: v.array(
    v.looseObject({
      index: count,
      message: v.looseObject({
        role: v.literal("assistant"),
        content: v.nullable(text),
        refusal: v.null(),
        tool_calls: v.optional(v.array(toolCall)),
      }),
      logprobs: v.nullable(v.looseObject({})),
      finish_reason: v.picklist(["stop", "length", "tool_calls"]),
    }),
  ),
  usage,
});

const rate = v.nullable(v.pipe(v.number(), v.minValue(0)));
const measure = v.pipe(v.number(), v.minValue(0));

const benchReply = v.looseObject({
  ...chatReply.entries,
  generation_stats: v.looseObject({
    prompt_tokens: count,
    cached_tokens: count,
    generation_tokens: count,
    prompt_tps: rate,
    generation_tps: rate,
    queue_ms: measure,
    prefill_ms: measure,
    decode_ms: measure,
    ttft_ms: rate,
    itl_ms: v.looseObject({ p50: rate, p90: rate, p99: rate, max: rate }),
    peak_memory_bytes: rate,
    rank_peak_memory_bytes: v.array(rate),
  }),
});

const completionReply = v.looseObject({
  ...replyHead,
  object: v.literal("text_completion"),
  choices: v.array(
    v.looseObject({
      index: count,
      text,
      logprobs: v.nullable(v.looseObject({})),
      finish_reason: v.picklist(["stop", "length"]),
    }),
  ),
  usage,
});

const responseReply = v.looseObject({
  id: text,
  object: v.literal("response"),
  created_at: count,
  model: text,
  status: v.picklist(["completed", "incomplete"]),
  output: v.array(v.looseObject({ type: v.picklist(["message", "function_call"]), id: text })),
  usage: v.looseObject({ input_tokens: count, output_tokens: count, total_tokens: count }),
});

const model = v.looseObject({
  id: text,
  object: v.literal("model"),
  created: count,
  owned_by: text,
  state: v.picklist(["available", "loading", "ready", "failed"]),
  context_length: v.optional(count),
  progress: v.optional(v.pipe(v.number(), v.minValue(0), v.maxValue(1))),
  error: v.optional(text),
});

const anthropicMessage = v.looseObject({
  id: text,
  type: v.literal("message"),
  role: v.literal("assistant"),
  model: text,
  content: v.array(v.looseObject({ type: v.picklist(["text", "tool_use"]) })),
  stop_reason: v.picklist(["end_turn", "max_tokens", "stop_sequence", "tool_use"]),
  stop_sequence: v.nullable(text),
  usage: v.looseObject({ input_tokens: count, output_tokens: count }),
});

const ollamaHead = { model: text, created_at: text, done: v.literal(true), done_reason: text };
const ollamaModel = v.looseObject({ name: text, model: text, modified_at: text });

const phase = v.looseObject({ name: text, start_ms: v.number(), ms: v.number() });
const trace = v.looseObject({
  id: text,
  path: text,
  stream: v.boolean(),
  received_at: text,
  state: v.picklist(["running", "complete", "failed", "cancelled"]),
  model: v.optional(text),
  phases: v.array(phase),
  usage: v.looseObject({ prompt_tokens: count, cached_tokens: count, completion_tokens: count }),
  choices: v.array(v.looseObject({ index: count, tokens: count, finish_reason: v.nullable(text) })),
});

export const replies = {
  chat: chatReply,
  bench: benchReply,
  completion: completionReply,
  response: responseReply,
  models: list(model),
  model,
  tokens: v.looseObject({ tokens: v.array(count), count, max_model_len: count }),
  prompt: v.looseObject({ prompt: text }),
  message: anthropicMessage,
  tokenCount: v.looseObject({ input_tokens: count }),
  ollamaChat: v.looseObject({
    ...ollamaHead,
    message: v.looseObject({ role: v.literal("assistant"), content: text }),
  }),
  ollamaGenerate: v.looseObject({ ...ollamaHead, response: text }),
  ollamaModels: v.looseObject({ models: v.array(ollamaModel) }),
  ollamaShow: v.looseObject({
    modified_at: text,
    model_info: v.looseObject({}),
    capabilities: v.array(text),
  }),
  version: v.looseObject({ version: text }),
  health: v.looseObject({ status: v.literal("ok") }),
  ready: v.looseObject({ status: v.literal("ready"), running: count }),
  login: v.looseObject({
    key_required: v.boolean(),
    scope: v.nullable(v.picklist(["inference", "administration"])),
  }),
  loaded: v.looseObject({ model: text, state: v.literal("ready"), context_length: count }),
  unloaded: v.looseObject({ model: text, state: v.literal("available"), was_loaded: v.boolean() }),
  deleted: v.looseObject({ model: text, deleted: v.literal(true), freed_bytes: count }),
  requests: list(trace),
  history: v.looseObject({
    object: v.literal("history"),
    piece_seconds: count,
    pieces: count,
    data: v.array(
      v.looseObject({
        at: count,
        tokens: count,
        prompt_tokens: count,
        inter_token_ms: rate,
        first_token_ms: rate,
        requests: count,
        failures: count,
        running: count,
      }),
    ),
  }),
  request: trace,
  document: v.looseObject({ openapi: text, paths: v.looseObject({}) }),
} satisfies Record<string, v.GenericSchema>;

/** The forms of errors, by API family. */
export const errorReplies = {
  openai: v.looseObject({
    error: v.looseObject({
      message: text,
      type: text,
      param: v.nullable(text),
      code: v.nullable(text),
    }),
  }),
  anthropic: v.looseObject({
    type: v.literal("error"),
    error: v.looseObject({ type: text, message: text }),
  }),
  ollama: v.looseObject({ error: text }),
};
