// What the API needs of this node's part in a cluster, as a structural type: the node process fills it in, tests script it.

import type { PlacementRequest } from "../../cluster/types.ts";
import type { CaravanError } from "../../errors.ts";

/** A request that another node may have to answer. */
export interface PassedRequest {
  id: string;
  /** As the client named it. */
  model: string;
  /** What it may take, roughly, for the balance between instances. */
  tokens: number;
  method: "GET" | "POST";
  /** With its query. */
  path: string;
  headers: Headers;
  body: Uint8Array;
  /** Aborts when the client leaves. */
  signal: AbortSignal;
  /** Bytes that end a stream of that reply whose node was lost; undefined: it cannot be ended in words. */
  onBroken: (error: CaravanError, reply: Response) => Uint8Array | undefined;
  /** The answer is complete or over. Called once, unless this node answers. */
  onEnd: () => void;
}

export interface ClusterService {
  /** JSON of GET /cluster/state. */
  state(): Record<string, unknown>;
  /** Calls back at every change of the state; returns what ends that. */
  watch(onChange: () => void): () => void;
  /** Lets a new node in by the code that it shows; its name. */
  accept(code: string): Promise<string>;
  /** Removes a node by name, or an id's beginning; its name, nodes that know of it, and those that will when they are back. */
  removeNode(called: string): Promise<{ name: string; told: string[]; away: string[] }>;
  /** JSON of GET /cluster/plan. */
  plan(model: string, asked: PlacementRequest): Promise<unknown>;
  /** Id of the new instance. Rejects with model_not_found. */
  createInstance(model: string, asked: PlacementRequest): Promise<string>;
  /** False: there is none with this id. */
  stopInstance(id: string): Promise<boolean>;
  /** Drops fetched parts of models that no rank here reads, of one model or of all; the bytes that come free. */
  cleanParts(model: string | undefined): Promise<number>;
  /** Whether any request could be another node's to answer: otherwise bodies are not looked at. */
  mayPass(): boolean;
  /** The other node's answer, or AnswersHere where this node is to answer. Rejects where the one that should cannot. */
  pass(request: PassedRequest): Promise<Response | AnswersHere>;
}

/** The request counts for the balance between instances until it is released, which is due once the engine has it. */
export interface AnswersHere {
  release: () => void;
}
