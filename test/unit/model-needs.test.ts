// What a node tells of models that only other nodes have.

import { describe, expect, test } from "bun:test";
import type { ModelSource, ModelTerms } from "../../src/cluster/instance-placer.ts";
import { modelNeed } from "../../src/cluster/model-need.ts";
import { ModelNeeds, type ModelNeedsOptions } from "../../src/cluster/net/model-needs.ts";
import type { ModelPresence } from "../../src/cluster/types.ts";
import { createLogger } from "../../src/log.ts";
import { llama4Profile } from "../tools/published-clusters.ts";
import { until } from "../tools/until.ts";

const scout: ModelTerms = { profile: llama4Profile("scout", 4), kvType: "bf16", threads: 4 };
const present = (model: string, total = 9): ModelPresence => ({ model, bytes: total, total });
const source: ModelSource = (model) =>
  model === "unread" ? { kind: "pending", reason: "being read" } : { kind: "known", terms: scout };

function needsOf(options: Partial<ModelNeedsOptions>): ModelNeeds {
  return new ModelNeeds({
    own: () => [],
    others: () => [],
    source,
    holders: () => ["holder"],
    ask: () => Promise.reject(new Error("nobody was to be asked")),
    onChange: () => undefined,
    log: createLogger({ level: "silent" }),
    ...options,
  });
}

describe("the models that ledgers tell of", () => {
  test("are this node's own, and those of other nodes once one of these has said what they need", async () => {
    const holder = needsOf({ own: () => [present("scout")] });
    const asked: unknown[] = [];
    let changed = 0;
    const here = needsOf({
      own: () => [present("mine"), present("unread")],
      others: () => [present("scout"), present("mine"), present("scout")],
      // As over a wire.
      ask: async (node, method, params) => {
        asked.push([node, params]);
        return JSON.parse(JSON.stringify(await holder.onCall(method, params)));
      },
      onChange: () => changed++,
    });
    expect([...here.all().keys()]).toEqual(["mine"]);
    await until(() => changed > 0, "the answer");
    expect([...here.all()]).toEqual([
      ["mine", modelNeed(scout)],
      ["scout", modelNeed(scout)],
    ]);
    expect(asked).toEqual([["holder", { model: "scout" }]]);
  });

  test("are asked for again where another checkpoint has the name, not where nobody answered just now", async () => {
    let total = 9;
    let asked = 0;
    const here = needsOf({
      others: () => [present("scout", total)],
      ask: async () => {
        asked++;
        throw new Error("gone");
      },
    });
    for (let i = 0; i < 3; i++) here.all();
    expect(asked).toBe(1);
    total = 10;
    here.all();
    expect(asked).toBe(2);
  });

  test("are at most 32, whatever the others say they have", () => {
    let asked = 0;
    const many = Array.from({ length: 100 }, (_, i) => present(`m${i}`));
    const here = needsOf({
      own: () => [present("mine")],
      others: () => many,
      ask: () => {
        asked++;
        return new Promise(() => undefined);
      },
    });
    here.all();
    here.all();
    expect(asked).toBe(31);
  });

  test("are told of only where they are on this node, and an answer that makes no sense counts for nothing", async () => {
    const here = needsOf({ own: () => [present("scout"), present("unread")] });
    expect(await here.onCall("model.need", { model: "other" })).toBeNull();
    expect(await here.onCall("model.need", { model: "unread" })).toBeNull();
    expect(here.onCall("plan", {})).toBeUndefined();
    expect(() => here.onCall("model.need", { model: 3 })).toThrow();
    let answered = false;
    const fooled = needsOf({
      others: () => [present("scout")],
      ask: async () => {
        answered = true;
        return { ...modelNeed(scout), pageTokens: 0 };
      },
    });
    fooled.all();
    await until(() => answered, "the answer");
    await Promise.resolve();
    expect(fooled.all().size).toBe(0);
  });
});
