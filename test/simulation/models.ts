// Two small models for the simulation, with real profiles: real placement over real tensor sizes, in kilobytes.

import { type ModelSource, ProfilePlacer } from "../../src/cluster/instance-placer.ts";
import { type ModelProfile, profileModel } from "../../src/cluster/model-profile.ts";
import { type MixedModel, mixedPlan } from "../tools/mixed-shapes.ts";

const SMALL: MixedModel = {
  architecture: "llama",
  ...{ layers: 3, kvHeads: 4, queriesPerKey: 2, headDim: 32, hidden: 64, dense: 384, expert: 128 },
  ...{ experts: 1, vocab: 300, tied: false, biases: false, fusedExperts: false, formats: [] },
};

const LARGE: MixedModel = {
  ...SMALL,
  architecture: "llama4",
  layers: 5,
  dense: 640,
  expert: 256,
  experts: 4,
};

const PROFILES: ReadonlyMap<string, ModelProfile> = new Map([
  ["small", profileModel(mixedPlan(SMALL))],
  ["large", profileModel(mixedPlan(LARGE))],
]);

export const MODELS = [...PROFILES.keys()];

const source: ModelSource = (model) => {
  const profile = PROFILES.get(model);
  return profile === undefined
    ? { kind: "refused", reason: `there is no model ${model}` }
    : { kind: "known", terms: { profile, kvType: "bf16", threads: 1 } };
};

export const placer = new ProfilePlacer(source);
