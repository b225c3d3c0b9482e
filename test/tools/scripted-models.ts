// A model directory with one scripted model, for tests of the API.

import type { LoadedModel, ModelDirectory, ModelInfo } from "../../src/api/model-directory.ts";
import { StopMatcher } from "../../src/chat/stop.ts";
import { CaravanError } from "../../src/errors.ts";
import { BEGIN, bytesOf, byteText, END, newByteDetokenizer, VOCABULARY } from "./byte-text.ts";
import { type Script, ScriptedEngine } from "./scripted-engine.ts";

export const MODEL = "test/scripted";

export interface ScriptedModels extends ModelDirectory {
  readonly engine: ScriptedEngine;
  readonly model: LoadedModel;
  readonly info: ModelInfo;
  /** Thrown by the next find() calls, first to last. */
  readonly failures: CaravanError[];
}

/** Answers with the text's bytes and then the end token. */
export function sayScript(text: string): Script {
  return { answer: () => [...bytesOf(text), END] };
}

export function scriptedModels(script: Script, changes: Partial<LoadedModel> = {}): ScriptedModels {
  const engine = new ScriptedEngine(script);
  const model: LoadedModel = {
    id: MODEL,
    created: 1_700_000_000,
    ownedBy: "test",
    contextLength: 4096,
    vocabSize: VOCABULARY,
    fingerprint: "fp_test",
    engine,
    text: { ...byteText },
    beginIds: [BEGIN],
    eosIds: [END],
    defaults: { generationConfig: {}, card: {} },
    newDetokenizer: newByteDetokenizer,
    newStopMatcher: (stops) => new StopMatcher(stops),
    ...changes,
  };
  const info: ModelInfo = {
    id: MODEL,
    aliases: ["scripted"],
    created: model.created,
    ownedBy: model.ownedBy,
    contextLength: model.contextLength,
    state: "ready",
    policy: { mode: "batched", reason: "every cache of the model is paged" },
  };
  const failures: CaravanError[] = [];
  return {
    engine,
    model,
    info,
    failures,
    list: () => [info],
    statuses: () => [{ ...engine.status(), model: MODEL }],
    async unload(name) {
      if (name !== MODEL && name !== "scripted") throw notFound(name);
      const was = info.state === "ready";
      info.state = "available";
      return was;
    },
    async find(name) {
      const failure = failures.shift();
      if (failure !== undefined) throw failure;
      if (name === MODEL || name === "scripted") return model;
      throw notFound(name);
    },
  };
}

function notFound(name: string): CaravanError {
  return new CaravanError("model_not_found", `There is no model ${JSON.stringify(name)} here.`, {
    param: "model",
    hint: `Run \`caravan pull ${name}\`.`,
  });
}
