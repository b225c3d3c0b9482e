// A card for a model that has none, made from its config and the headers of its weights. What only its makers could know
// (its base, say) is left out.

import type { SamplingDefaults } from "./card.ts";
import { type ModelConfig, readModelConfig } from "./config.ts";
import { type LoadPlan, makeLoadPlan } from "./load-plan.ts";
import { openCheckpoint } from "./safetensors.ts";

/**
 * The text of the card, in TOML, for the model in `folder` whose hub repository is `id`. `sampling`: what its
 * generation_config.json says.
 * Throws bad_file or unsupported_model where the model could not be loaded either.
 */
export async function makeCard(folder: string, id: string, sampling: SamplingDefaults = {}): Promise<string> {
  const config = readModelConfig(folder);
  const checkpoint = await openCheckpoint(folder);
  const plan = makeLoadPlan(config, checkpoint);
  const lines = [
    `# Made by caravan from the config and the headers of ${id}.`,
    `model_id = ${JSON.stringify(id)}`,
    `n_layers = ${config.layers.length}`,
    `hidden_size = ${config.hiddenSize}`,
    `num_key_value_heads = ${config.kvHeads}`,
    "supports_tensor = true",
    'tasks = ["TextGeneration"]',
    'family = "llama"',
    `quantization = ${JSON.stringify(quantizationOf(plan))}`,
    'capabilities = ["text"]',
    `context_length = ${config.contextLength}`,
    "",
    "[storage_size]",
    `in_bytes = ${checkpoint.sizeBytes}`,
    ...samplingLines(sampling),
  ];
  return `${lines.join("\n")}\n`;
}

/** In a line for people: `30 layers of 576, 4bit, context 8192`. */
export async function describeModel(folder: string): Promise<string> {
  const config: ModelConfig = readModelConfig(folder);
  const plan = makeLoadPlan(config, await openCheckpoint(folder));
  const experts = config.experts > 1 ? `, ${config.experts} experts` : "";
  return `${config.layers.length} layers of ${config.hiddenSize}${experts}, ${quantizationOf(plan)}, context ${config.contextLength} tokens`;
}

/** The format that most weights have, as the hub's names write it: 4bit, bf16, mxfp4. */
function quantizationOf(plan: LoadPlan): string {
  const elements = new Map<string, number>();
  for (const { format, bits, experts, rows, cols } of plan.tensors) {
    const name = format === "affine" ? `${bits}bit` : format;
    elements.set(name, (elements.get(name) ?? 0) + experts * rows * cols);
  }
  return [...elements].sort(([, a], [, b]) => b - a)[0]?.[0] ?? "";
}

function samplingLines({ temperature, top_p, top_k, min_p, repetition_penalty }: SamplingDefaults): string[] {
  const known = Object.entries({ temperature, top_p, top_k, min_p, repetition_penalty }).filter(
    ([, value]) => value !== undefined,
  );
  if (known.length === 0) return [];
  return ["", "[sampling_defaults]", ...known.map(([name, value]) => `${name} = ${value}`)];
}
