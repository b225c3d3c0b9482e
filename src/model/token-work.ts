// What a token costs by the load plan alone: bytes of weights that a decode step reads, and multiply-adds of a prompt
// token. The cache, activations and attention are not counted. Pure.

import { type LoadPlan, type PlannedTensor, tensorMemory } from "./load-plan.ts";
import { SLOT } from "./tensor-names.ts";

/** Bytes of weights that one step reads with `rows` tokens, one of each of as many unrelated sequences. The embedding
 * table is not read as a whole. Experts are expected values: each row picks its own, evenly, so a step touches
 * E·(1 - (1 - k/E)^rows) of E. */
export function weightBytesOfStep(plan: LoadPlan, rows: number): number {
  const { experts, expertsPerToken } = plan.config;
  const touched = experts === 0 ? 0 : 1 - (1 - expertsPerToken / experts) ** rows;
  let bytes = 0;
  for (const tensor of plan.tensors) {
    if (tensor.slot === SLOT.embed) continue;
    const { mapped, copied } = tensorMemory(tensor);
    bytes += (mapped + copied) * (isExpert(tensor) ? touched : 1);
  }
  return bytes;
}

/** Multiply-adds of the matrices that every prompt token passes; the head, which only the last one needs, is left out. */
export function multiplyAddsOfPromptToken(plan: LoadPlan): number {
  const { experts, expertsPerToken } = plan.config;
  let products = 0;
  for (const tensor of plan.tensors) {
    if (tensor.slot === SLOT.embed || tensor.slot === SLOT.head || tensor.rows === 1) continue;
    const all = tensor.experts * tensor.rows * tensor.cols;
    products += isExpert(tensor) ? (all * expertsPerToken) / experts : all;
  }
  return products;
}

/** Its matrices belong to one expert each. */
function isExpert(tensor: PlannedTensor): boolean {
  return tensor.experts > 1;
}
