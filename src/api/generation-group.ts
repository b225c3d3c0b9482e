// Several sequences generated at once for one request (`n`, several prompts), merged into one stream. They succeed or
// fail together: the first failure cancels the others.

import type { Sampling } from "../engine/protocol.ts";
import { CaravanError } from "../errors.ts";
import { type GenerationEvent, type GenerationOptions, generate } from "./generation.ts";
import type { LoadedModel } from "./model-directory.ts";

/** openai-node refuses choice indexes from 128 on. */
export const MAX_CHOICES = 128;

export interface SequencePlan {
  promptIds: number[];
  sampling: Sampling;
  maxTokens: number;
}

/** Hears of the sequences' progress as it happens, before the reply does. */
export interface GroupObserver {
  token(index: number): void;
  finish(index: number, end: Extract<GenerationEvent, { type: "finish" }>): void;
}

/** An event of the sequence at `index` of the plan. */
export interface GroupEvent {
  index: number;
  event: GenerationEvent;
}

/**
 * Generates all sequences in parallel. Each is read at most one event ahead of the consumer. Throws the first error
 * of any of them; leaving the iteration cancels all.
 */
export async function* generateGroup(
  model: LoadedModel,
  plans: SequencePlan[],
  {
    observer,
    ...options
  }: Omit<GenerationOptions, "sampling" | "maxTokens" | "onToken"> & { observer?: GroupObserver },
): AsyncGenerator<GroupEvent, void, void> {
  const watch = (index: number) => (observer === undefined ? {} : { onToken: () => observer.token(index) });
  const [only] = plans;
  if (plans.length === 1 && only !== undefined) {
    for await (const event of generate(model, only.promptIds, { ...options, ...only, ...watch(0) })) {
      if (event.type === "finish") observer?.finish(0, event);
      yield { index: 0, event };
    }
    return;
  }
  const siblings = new AbortController();
  const outer = options.signal;
  const abort = () => siblings.abort(outer?.reason);
  if (outer?.aborted) abort();
  outer?.addEventListener("abort", abort, { once: true });
  const sources = plans.map((plan, index) =>
    generate(model, plan.promptIds, { ...options, ...plan, ...watch(index), signal: siblings.signal }),
  );
  try {
    for await (const grouped of merge(sources)) {
      if (grouped.event.type === "finish") observer?.finish(grouped.index, grouped.event);
      yield grouped;
    }
  } finally {
    outer?.removeEventListener("abort", abort);
    siblings.abort(new CaravanError("cancelled", "Another answer to the same request failed."));
    // The abort has ended those that were in the middle of a step; this ends those that wait to be read.
    for (const source of sources) source.return().catch(() => undefined);
  }
}

type Arrival = { index: number; result: IteratorResult<GenerationEvent, void> } | { thrown: unknown };

/** Interleaves in order of arrival. After a failure some sources may still be pending; the caller ends them. */
async function* merge(sources: AsyncGenerator<GenerationEvent, void, void>[]): AsyncGenerator<GroupEvent> {
  const arrivals: Arrival[] = [];
  let wake: () => void = () => undefined;
  const arrived = (arrival: Arrival) => {
    arrivals.push(arrival);
    wake();
  };
  const advance = (index: number) => {
    sources[index]?.next().then(
      (result) => arrived({ index, result }),
      (thrown) => arrived({ thrown }),
    );
  };
  let live = sources.length;
  for (let index = 0; index < sources.length; index += 1) advance(index);
  while (live > 0) {
    const arrival = arrivals.shift();
    if (arrival === undefined) {
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
    } else if ("thrown" in arrival) {
      throw arrival.thrown;
    } else if (arrival.result.done) {
      live -= 1;
    } else {
      advance(arrival.index);
      yield { index: arrival.index, event: arrival.result.value };
    }
  }
}
