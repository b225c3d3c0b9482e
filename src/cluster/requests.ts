// Requests that this node has passed on to instances, its own or other nodes': every one of them ends exactly once, with its
// answer or with an error that can be tried again. What would leave one hanging is found here: an owner that is gone or
// silent, an instance that began a new epoch, ranks that failed. No I/O.

import { CaravanError } from "../errors.ts";
import { chooseInstance, Outstanding } from "./balance.ts";
import type { Member } from "./membership.ts";
import type { NodeId } from "./types.ts";

/** An owner sends tokens or a sign of life every half second; without any for so long its requests end. With a turn's
 * time the limit of 3 s holds. */
export const SILENT_MS = 2000;
/** Signs of life of a running request. */
export const ALIVE_MS = 500;
/** Turns come every half second: after a longer pause this node itself stood still, and what was sent to it is not read yet. */
const PAUSE_MS = 1000;

export interface RunningRequest {
  id: string;
  model: string;
  instance: string;
  epoch: number;
  owner: NodeId;
  /** Tokens that it may take, for the balance. */
  tokens: number;
  heardAt: number;
}

export interface RequestsOptions {
  /** Monotonic milliseconds. */
  now: () => number;
  /** Outstanding tokens of this node's own instance by now; 0: it is another node's. */
  own?: (instance: string) => number;
  /** The request is over without its answer. The stream to the client ends with the error. */
  fail: (request: RunningRequest, error: CaravanError) => void;
}

export class Requests {
  readonly #options: RequestsOptions;
  readonly #running = new Map<string, RunningRequest>();
  readonly #outstanding = new Outstanding();
  #steppedAt: number;

  constructor(options: RequestsOptions) {
    this.#options = options;
    this.#steppedAt = options.now();
  }

  get running(): ReadonlyMap<string, RunningRequest> {
    return this.#running;
  }

  /** Chooses an instance and counts the request. Throws model_loading where none is ready, model_not_found where no
   * instance of the model is known. */
  start(id: string, model: string, tokens: number, members: readonly Member[]): RunningRequest {
    const choice = chooseInstance(model, members, this.#outstanding, this.#options.own);
    if (choice === undefined) throw notReady(model, members);
    const request = { id, model, tokens, ...choice, heardAt: this.#options.now() };
    this.#running.set(id, request);
    this.#outstanding.add(choice.instance, tokens);
    return request;
  }

  /** A token or a sign of life came. False: the request is over already and what comes is to be thrown away. */
  heard(id: string): boolean {
    const request = this.#running.get(id);
    if (request === undefined) return false;
    request.heardAt = this.#options.now();
    return true;
  }

  /** Its answer is complete, or its client went. False: it was over already. */
  finish(id: string): boolean {
    const request = this.#running.get(id);
    if (request === undefined) return false;
    this.#running.delete(id);
    this.#outstanding.remove(request.instance, request.tokens);
    return true;
  }

  /** The owner ended it. */
  failed(id: string, error: CaravanError): void {
    const request = this.#running.get(id);
    if (request !== undefined) this.#fail(request, error);
  }

  /** Ends what this node's own instance ran in that epoch. */
  endEpoch(instance: string, epoch: number, error: CaravanError): void {
    for (const request of this.#running.values())
      if (request.instance === instance && request.epoch === epoch) this.#fail(request, error);
  }

  /** Ends what cannot be answered any more. */
  step(members: readonly Member[]): void {
    const now = this.#options.now();
    const pause = now - this.#steppedAt;
    this.#steppedAt = now;
    if (pause > PAUSE_MS)
      for (const request of this.#running.values()) request.heardAt = Math.min(now, request.heardAt + pause);
    for (const request of this.#running.values()) {
      const fault = this.#fault(request, members);
      if (fault !== undefined) this.#fail(request, interrupted(request.model, fault));
    }
  }

  #fault(request: RunningRequest, members: readonly Member[]): string | undefined {
    const owner = members.find(({ record }) => record.info.id === request.owner);
    if (owner === undefined || !owner.direct) return "the node that computed it is gone";
    if (this.#options.now() - request.heardAt > SILENT_MS) return "the node that computed it is silent";
    const state = owner.record.info.instances.find(({ spec }) => spec.id === request.instance);
    if (state === undefined) return "the instance is gone";
    if (state.epoch !== request.epoch || !["ready", "stopping"].includes(state.phase))
      return state.reason || "its nodes lost each other";
    return undefined;
  }

  #fail(request: RunningRequest, error: CaravanError): void {
    if (this.finish(request.id)) this.#options.fail(request, error);
  }
}

function interrupted(model: string, reason: string): CaravanError {
  return new CaravanError("cluster_degraded", `${model}: ${reason}`, {
    hint: "Send the request again in a few seconds.",
    retryAfterSeconds: 2,
  });
}

function notReady(model: string, members: readonly Member[]): CaravanError {
  const states = members
    .flatMap(({ record }) => record.info.instances)
    .filter(({ spec, phase }) => spec.model === model && phase !== "gone");
  const state = states.find(({ phase }) => phase !== "failed") ?? states[0];
  if (state === undefined)
    return new CaravanError("model_not_found", `no node of the cluster runs ${model}`, {
      hint: `\`caravan plan ${model}\` shows where it would fit.`,
    });
  if (state.phase === "failed")
    return new CaravanError("cluster_degraded", `${model} cannot run: ${state.reason}`, {
      retryAfterSeconds: 10,
    });
  const percent = Math.floor(state.progress * 100);
  return new CaravanError(
    "model_loading",
    `${model} is ${state.phase}: ${percent} % done${state.reason === "" ? "" : ` (${state.reason})`}`,
    { hint: "Send the request again in a few seconds.", retryAfterSeconds: 5 },
  );
}
