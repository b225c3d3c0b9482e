// One node of the simulation: the real ClusterLogic with a clock of its own, and in place of processes and sockets a model of
// them. Runners take time to load, wait for each other, fail, and notice lost ranks as the transports promise to.

import { ClusterLogic } from "../../src/cluster/cluster-logic.ts";
import type { Placer } from "../../src/cluster/instance-placer.ts";
import { MemoryLedger } from "../../src/cluster/memory-ledger.ts";
import type { RankOrder } from "../../src/cluster/rank-host.ts";
import { ALIVE_MS } from "../../src/cluster/requests.ts";
import type { Exchange, Link, NodeInfo } from "../../src/cluster/types.ts";
import { asCaravanError, CaravanError } from "../../src/errors.ts";
import { MODELS } from "./models.ts";
import type { Network, Station } from "./network.ts";
import { Violation } from "./violation.ts";
import type { Dice, VirtualTime } from "./virtual-time.ts";

export interface Hardware {
  id: string;
  /** Bytes that models may have. */
  capacity: number;
  bandwidth: number;
}

/** What the world keeps of a client's request. */
export interface ClientRequest {
  id: string;
  model: string;
  node: SimulatedNode;
  /** answer: complete; error: ended with one that can be tried again; gone: its node died, and the client's connection. */
  end: "answer" | "error" | "gone" | undefined;
  errorCode: string | undefined;
}

/** A rank's process. */
export interface Process {
  order: RankOrder;
  bytes: number;
  loaded: boolean;
  ready: boolean;
  ended: boolean;
}

/** Between gateways and owners, beside the membership's exchange. */
type Parcel =
  | (Exchange & { kind?: never })
  | { kind: "request"; id: string; instance: string; epoch: number; tokens: number }
  | { kind: "alive"; id: string }
  | { kind: "answer"; id: string }
  | { kind: "failure"; id: string; error: Record<string, unknown> };

export interface Surroundings {
  time: VirtualTime;
  dice: Dice;
  network: Network;
  placer: Placer;
  /** Chance that a load fails, for each cause. */
  loadFaults: { memory: number; files: number; process: number };
  nodeOf(id: string): SimulatedNode | undefined;
  /** Called when a process begins or memory is taken. */
  check(node: SimulatedNode): void;
  requests: Map<string, ClientRequest>;
  /** Those without an end. */
  open: Map<string, ClientRequest>;
}

const CONNECT_LIMIT_MS = 20_000;
/** The transports' promise: 1 s while computing, 2 s idle. */
const DETECT_MS = 1000;
const TOKEN_MS = 20;

export class SimulatedNode implements Station {
  readonly id: string;
  readonly boot: string;
  readonly hardware: Hardware;
  readonly ledger: MemoryLedger;
  readonly logic: ClusterLogic;
  readonly processes = new Map<string, Process>();
  readonly incarnation: number;
  alive = true;
  paused = false;
  pausedUntil = 0;
  /** How much slower it loads and computes. */
  slow = 1;
  readonly #epochs = new Map<string, number>();
  readonly #world: Surroundings;
  readonly #clockStart: number;
  readonly #clockRate: number;
  /** What comes while it is paused. */
  #inbox: (() => void)[] = [];
  /** Requests that it computes as the owner: gateway and instance by id. */
  readonly #serving = new Map<
    string,
    { gateway: string; instance: string; epoch: number; tokens: number; left: number }
  >();

  constructor(world: Surroundings, hardware: Hardware, incarnation: number, cluster = "sim") {
    this.#world = world;
    this.hardware = hardware;
    this.id = hardware.id;
    this.incarnation = incarnation;
    const { dice, time } = world;
    this.boot = `${hardware.id}-${incarnation}-${Math.floor(dice.between(0, 1e9))}`;
    // A clock of its own: it starts anywhere and runs a little fast or slow.
    this.#clockStart = dice.between(0, 1e7) - time.now;
    this.#clockRate = dice.between(0.99, 1.01);
    this.ledger = new MemoryLedger(hardware.capacity);
    this.logic = new ClusterLogic({
      cluster,
      protocol: 1,
      boot: this.boot,
      info: this.#info(),
      ledger: this.ledger,
      placer: world.placer,
      runner: {
        start: (order) => this.#start(order),
        stop: (instance, epoch) => this.#stop(instance, epoch),
      },
      now: () => (time.now + this.#clockStart) * this.#clockRate,
      send: (to, exchange) => this.#send(to, exchange),
      failRequest: ({ id }, error) => this.#end(id, "error", error),
      endRequests: (instance, epoch, error) => this.#endServing(instance, epoch, error),
    });
    world.network.attach(this);
    time.after(dice.between(0, 500), () => this.#beat());
  }

  deliver(from: string, message: unknown): void {
    this.#run(() => this.#receive(from, message as Parcel));
  }

  peerUp(id: string): void {
    const { dice } = this.#world;
    this.#run(() => {
      const links: Link[] = this.logic.membership.own.links.filter(({ to }) => to !== id);
      links.push({ from: this.id, to: id, kind: "tcp", latencyUs: dice.between(50, 300), bandwidth: 1e9 });
      this.logic.membership.update({}, links);
      this.logic.membership.peerUp(id);
    });
  }

  peerDown(id: string): void {
    this.#run(() => this.logic.membership.peerDown(id, false));
  }

  /** kill -9, or the host's power. */
  crash(): void {
    this.alive = false;
    this.#inbox = [];
    for (const [id, request] of this.#world.open)
      if (request.node === this) {
        request.end = "gone";
        this.#world.open.delete(id);
      }
  }

  pause(ms: number): void {
    this.paused = true;
    this.pausedUntil = this.#world.time.now + ms;
    this.#world.time.after(ms, () => this.resume());
  }

  resume(): void {
    if (!this.paused || this.#world.time.now < this.pausedUntil) return;
    this.paused = false;
    const inbox = this.#inbox;
    this.#inbox = [];
    for (const event of inbox) if (this.alive) event();
  }

  /** One client's request at this node. */
  request(id: string, model: string, tokens: number): void {
    const { requests, open } = this.#world;
    const entry: ClientRequest = { id, model, node: this, end: undefined, errorCode: undefined };
    requests.set(id, entry);
    open.set(id, entry);
    this.#run(() => {
      try {
        const { instance, epoch, owner } = this.logic.requests.start(id, model, tokens, this.logic.members);
        const parcel: Parcel = { kind: "request", id, instance, epoch, tokens };
        if (owner === this.id) this.#receive(this.id, parcel);
        else this.#send(owner, parcel);
      } catch (thrown) {
        this.#end(id, "error", asCaravanError(thrown));
      }
    });
  }

  #info(): NodeInfo {
    const { id, capacity, bandwidth } = this.hardware;
    return {
      ...{ id, name: id, protocol: 1, version: "0", incarnation: this.incarnation, addresses: [] },
      ...{ os: "sim", chip: "sim", device: "cpu", memory: { total: capacity, available: capacity } },
      ...{ bandwidth, speed: null, rdma: { reason: "sim" } },
      models: MODELS.map((model) => ({ model, bytes: 1, total: 1 })),
      ...{ instances: [], ranks: [], orphans: [], ended: [] },
    };
  }

  #beat(): void {
    if (!this.alive) return;
    this.#run(() => this.logic.tick());
    this.#world.time.after(500 * this.#world.dice.between(0.9, 1.1), () => this.#beat());
  }

  /** Now, or when it goes on. */
  #run(event: () => void): void {
    if (!this.alive) return;
    if (this.paused) this.#inbox.push(event);
    else event();
  }

  #send(to: string, parcel: Parcel): void {
    this.#world.network.send(this, to, parcel);
  }

  #receive(from: string, parcel: Parcel): void {
    switch (parcel.kind) {
      case undefined:
        this.logic.membership.receive(from, parcel);
        break;
      case "request":
        this.#serve(from, parcel);
        break;
      case "alive":
        this.logic.requests.heard(parcel.id);
        break;
      case "answer":
        if (this.logic.requests.finish(parcel.id)) this.#end(parcel.id, "answer");
        break;
      case "failure":
        this.logic.requests.failed(parcel.id, CaravanError.fromJSON(parcel.error));
    }
  }

  #end(id: string, end: "answer" | "error", error?: CaravanError): void {
    const request = this.#world.requests.get(id);
    if (request === undefined) return;
    if (request.end !== undefined) throw new Error(`request ${id} ended twice: ${request.end}, then ${end}`);
    Object.assign(request, { end, errorCode: error?.code });
    this.#world.open.delete(id);
  }

  serves(id: string): boolean {
    return this.#serving.has(id);
  }

  // ---- owner of an instance

  #serve(gateway: string, { id, instance, epoch, tokens }: Extract<Parcel, { kind: "request" }>): void {
    if (this.#serving.has(id)) return;
    const state = this.logic.instances.states().find(({ spec }) => spec.id === instance);
    if (state?.epoch !== epoch || state.phase !== "ready") {
      const error = new CaravanError("model_loading", "the instance is not ready", { retryAfterSeconds: 1 });
      this.#reply(gateway, { kind: "failure", id, error: error.toJSON() });
      return;
    }
    this.#serving.set(id, { gateway, instance, epoch, tokens, left: tokens });
    this.#load(instance);
    this.#work(id);
  }

  #work(id: string): void {
    const job = this.#serving.get(id);
    if (job === undefined || !this.alive) return;
    const tokens = Math.min(job.left, Math.floor(ALIVE_MS / TOKEN_MS));
    this.#world.time.after(tokens * TOKEN_MS * this.slow, () =>
      this.#run(() => {
        // A group that is broken makes no more tokens; who notices is another matter.
        const still = this.#serving.get(id);
        if (still === undefined || !groupWorks(this.#world, still.instance, still.epoch, this.id)) return;
        still.left -= tokens;
        if (still.left > 0) {
          this.#reply(still.gateway, { kind: "alive", id });
          this.#work(id);
          return;
        }
        this.#serving.delete(id);
        this.#load(still.instance);
        this.#reply(still.gateway, { kind: "answer", id });
      }),
    );
  }

  #reply(gateway: string, parcel: Parcel): void {
    if (gateway === this.id) this.#receive(this.id, parcel);
    else this.#send(gateway, parcel);
  }

  #load(instance: string): void {
    let tokens = 0;
    for (const job of this.#serving.values()) if (job.instance === instance) tokens += job.left;
    this.logic.instances.load(instance, tokens, this.#world.time.now);
  }

  #endServing(instance: string, epoch: number, error: CaravanError): void {
    for (const [id, job] of this.#serving)
      if (job.instance === instance && job.epoch === epoch) {
        this.#serving.delete(id);
        if (job.gateway !== this.id) this.#send(job.gateway, { kind: "failure", id, error: error.toJSON() });
      }
    this.#load(instance);
  }

  // ---- runners

  #start(order: RankOrder): void {
    const { time, dice, loadFaults, check } = this.#world;
    const { spec, epoch } = order;
    if (this.processes.has(spec.id)) throw new Error(`${this.id} starts a second process of ${spec.id}`);
    const process: Process = {
      ...{ order, bytes: spec.bytes[order.rank] ?? 0, loaded: false, ready: false, ended: false },
    };
    this.processes.set(spec.id, process);
    check(this);
    this.#checkOrder(order);
    const fetch = dice.chance(0.3) ? dice.between(100, 3000) : 0;
    const load = dice.between(200, 3000) * this.slow;
    const fault = (["memory", "files", "process"] as const).find((cause) => dice.chance(loadFaults[cause]));
    this.#later(process, fetch, () => {
      this.logic.ranks.progress(spec.id, epoch, "loading", 0.1);
      this.logic.turn();
      this.#later(process, load, () => {
        if (fault !== undefined) {
          this.#fail(process, fault, `simulated failure of ${fault}`);
          return;
        }
        process.loaded = true;
        this.#connect(process, time.now + CONNECT_LIMIT_MS);
      });
    });
  }

  /** No run of an owner goes back to an earlier epoch, so no node may be told to. */
  #checkOrder({ spec, epoch, owner }: RankOrder): void {
    const key = `${spec.id} of ${this.#world.nodeOf(owner)?.boot}`;
    const before = this.#epochs.get(key) ?? 0;
    if (epoch <= before) throw new Violation(`${this.id} starts epoch ${epoch} of ${key} after ${before}`);
    this.#epochs.set(key, epoch);
  }

  /** Waits for the other ranks, then is ready and keeps an eye on them. */
  #connect(process: Process, deadline: number): void {
    const { time } = this.#world;
    const { spec, epoch, owner } = process.order;
    if (spec.ranks.every(({ node }) => this.#partner(process, node)?.loaded === true)) {
      process.ready = true;
      this.logic.ranks.ready(spec.id, epoch);
      this.logic.turn();
      this.#watch(process);
      return;
    }
    if (time.now > deadline) {
      this.#fail(process, "group", `the ranks of ${owner} did not find each other`);
      return;
    }
    this.#later(process, 100, () => this.#connect(process, deadline));
  }

  #watch(process: Process, brokenAt?: number): void {
    const { time } = this.#world;
    const { spec, epoch, owner } = process.order;
    const broken = spec.ranks.find(({ node }) => this.#partner(process, node) === undefined);
    if (broken === undefined) {
      this.#later(process, 100, () => this.#watch(process));
      return;
    }
    const since = brokenAt ?? time.now;
    if (time.now - since < DETECT_MS - 100) {
      this.#later(process, 100, () => this.#watch(process, since));
      return;
    }
    const reason = `rank ${broken.rank} does not answer`;
    this.#fail(process, "group", reason);
    if (owner === this.id) {
      this.logic.instances.engineFailed(spec.id, epoch, reason);
      this.logic.turn();
    }
  }

  /** The process of the same group on another node, as far as it can be reached. */
  #partner(process: Process, node: string): Process | undefined {
    if (node === this.id) return process;
    return partnerOn(this.#world, process.order, node, this.id);
  }

  #later(process: Process, ms: number, event: () => void): void {
    this.#world.time.after(ms, () => {
      this.#run(() => {
        if (!process.ended) event();
      });
    });
  }

  #fail(process: Process, cause: "memory" | "files" | "process" | "group", reason: string): void {
    const { spec, epoch } = process.order;
    process.ended = true;
    if (this.processes.get(spec.id) === process) this.processes.delete(spec.id);
    this.logic.ranks.failed(spec.id, epoch, cause, reason);
    this.logic.turn();
  }

  #stop(instance: string, epoch: number): void {
    const process = this.processes.get(instance);
    const { time, dice } = this.#world;
    const over = () =>
      this.#run(() => {
        if (process !== undefined && this.processes.get(instance) === process)
          this.processes.delete(instance);
        this.logic.ranks.stopped(instance, epoch);
        this.logic.turn();
      });
    // What it said before it died may be read late.
    if (dice.chance(0.5))
      time.after(dice.between(0, 1500), () => this.#run(() => this.logic.ranks.ready(instance, epoch)));
    if (process !== undefined) process.ended = true;
    time.after(dice.between(20, 500), over);
  }
}

function partnerOn(world: Surroundings, order: RankOrder, node: string, from: string): Process | undefined {
  const other = world.nodeOf(node);
  if (other === undefined || (node !== from && !world.network.connected(from, node))) return undefined;
  const process = other.processes.get(order.spec.id);
  if (process === undefined || process.ended) return undefined;
  return process.order.epoch === order.epoch && process.order.owner === order.owner ? process : undefined;
}

/** Whether all ranks of an owner's epoch compute together. */
export function groupWorks(world: Surroundings, instance: string, epoch: number, owner: string): boolean {
  const own = world.nodeOf(owner)?.processes.get(instance);
  if (own === undefined || own.ended || own.order.epoch !== epoch || own.order.owner !== owner) return false;
  return own.order.spec.ranks.every(
    ({ node }) => node === owner || partnerOn(world, own.order, node, owner)?.ready === true,
  );
}
