// One run of the simulation: a few nodes of unlike hardware, clients, a user who starts and stops models, a minute or two of
// faults, and then peace. While it runs and at its end it must hold what invariants.ts says. A seed is a run.

import { DRAIN_MS, RETURN_MS } from "../../src/cluster/instance-limits.ts";
import { GONE_MS } from "../../src/cluster/membership.ts";
import { checkAlways, checkPeace, checkSettled, type Ended } from "./invariants.ts";
import { MODELS, placer } from "./models.ts";
import { Network } from "./network.ts";
import { type ClientRequest, type Hardware, SimulatedNode, type Surroundings } from "./simulated-node.ts";
import { Violation } from "./violation.ts";
import { Dice, VirtualTime } from "./virtual-time.ts";

export interface RunResult {
  seed: number;
  violation: string | undefined;
  /** What happened, for a person; only when asked for. */
  story: string[];
  nodes: number;
  requests: { answer: number; error: number; gone: number };
  messages: number;
  faults: number;
}

const FAULTS_MS = 60_000;
/** Views of the membership agree so soon after the last fault. */
const VIEWS_MS = 10_000;
/** Instances are settled: views, taking over, placing, loading with its pauses, and the move back to nodes that returned. */
const SETTLED_MS = GONE_MS + 60_000 + RETURN_MS + DRAIN_MS + 60_000;
const CHECK_MS = 100;

export function runSeed(seed: number, tell = false): RunResult {
  const world = new World(seed, tell);
  let violation: string | undefined;
  try {
    world.run();
  } catch (thrown) {
    violation =
      thrown instanceof Violation
        ? thrown.message
        : `threw ${thrown instanceof Error ? thrown.stack : thrown}`;
  }
  const count = (end: ClientRequest["end"]) =>
    [...world.requests.values()].filter((request) => request.end === end).length;
  return {
    seed,
    violation:
      violation === undefined ? undefined : `at ${(world.time.now / 1000).toFixed(2)} s: ${violation}`,
    story: world.story,
    nodes: world.hardware.length,
    requests: { answer: count("answer"), error: count("error"), gone: count("gone") },
    messages: world.network.sent,
    faults: world.faults,
  };
}

export class World implements Surroundings {
  readonly time = new VirtualTime();
  readonly dice: Dice;
  readonly network: Network;
  readonly placer = placer;
  readonly loadFaults = { memory: 0, files: 0, process: 0 };
  readonly requests = new Map<string, ClientRequest>();
  readonly open = new Map<string, ClientRequest>();
  readonly hardware: Hardware[];
  readonly story: string[] = [];
  /** Instances that a user stopped, and how sure it is that everybody can know. */
  readonly ended: Ended[] = [];
  faults = 0;
  /** Loading was made to fail at some time. */
  loadsFailed = false;
  /** Nodes that are down on purpose: since when. */
  readonly downSince = new Map<string, number>();
  /** No fault from here on. */
  peaceSince: number | undefined;
  readonly #nodes = new Map<string, SimulatedNode>();
  readonly #all: SimulatedNode[] = [];
  readonly #tell: boolean;
  readonly #told = new Map<string, string>();
  #nextInstance = 1;
  #nextRequest = 1;

  constructor(seed: number, tell: boolean) {
    this.dice = new Dice(seed);
    this.#tell = tell;
    this.network = new Network(this.time, this.dice);
    const { dice } = this;
    this.hardware = Array.from({ length: 2 + dice.below(4) }, (_, i) => ({
      id: `node-${String.fromCharCode(97 + i)}`,
      // From too small for anything to room for several models.
      capacity: dice.pick([4e6, 9e6, 16e6, 30e6, 60e6]),
      bandwidth: dice.pick([2e9, 5e9, 20e9]),
    }));
  }

  nodeOf(id: string): SimulatedNode | undefined {
    return this.#nodes.get(id);
  }

  /** The latest run of every node. */
  get nodes(): SimulatedNode[] {
    return [...this.#nodes.values()];
  }

  get living(): SimulatedNode[] {
    return this.nodes.filter(({ alive }) => alive);
  }

  check(node: SimulatedNode): void {
    let bytes = 0;
    for (const process of node.processes.values()) bytes += process.bytes;
    if (bytes > node.ledger.planned)
      throw new Violation(`${node.id} runs ${bytes} bytes of ranks, ${node.ledger.planned} are planned`);
  }

  run(): void {
    const { dice, time } = this;
    const calm = dice.chance(0.1);
    for (const hardware of this.hardware) time.after(dice.between(0, 3000), () => this.#start(hardware, 1));
    time.every(CHECK_MS, () => {
      if (this.#tell) this.#noteInstances();
      checkAlways(this);
      return true;
    });
    this.#clients();
    time.after(3000, () => {
      for (let i = 0; i <= dice.below(3); i++) this.#create();
    });
    time.runUntil(8000);
    if (!calm) {
      this.network.loss = dice.pick([0, 0, 0.02, 0.1]);
      this.network.doubled = dice.pick([0, 0, 0.05, 0.3]);
      this.network.delayMs = dice.pick([
        [0.2, 5],
        [0.2, 50],
        [1, 400],
      ] as const) as [number, number];
      while (time.now < 8000 + FAULTS_MS) {
        time.runUntil(time.now + dice.between(200, 8000));
        this.#fault();
      }
    }
    this.#peace();
    time.runUntil(time.now + VIEWS_MS);
    checkPeace(this);
    time.runUntil(time.now + SETTLED_MS - VIEWS_MS);
    checkSettled(this);
  }

  #note(text: string): void {
    if (this.#tell) this.story.push(`${(this.time.now / 1000).toFixed(2).padStart(8)} s  ${text}`);
  }

  /** What changed of every instance since the last look. */
  #noteInstances(): void {
    for (const node of this.living)
      for (const { spec, phase, epoch, reason } of node.logic.instances.states()) {
        const where = spec.ranks.map((rank) => rank.node.replace("node-", "")).join("");
        const text = `${spec.id} of ${node.id}: ${phase} epoch ${epoch} on [${where}] ${reason}`;
        const key = `${spec.id} ${node.id}`;
        if (this.#told.get(key) === text) continue;
        this.#told.set(key, text);
        this.#note(`  ${text}`);
      }
  }

  #start(hardware: Hardware, incarnation: number): void {
    const node = new SimulatedNode(this, hardware, incarnation);
    this.#nodes.set(hardware.id, node);
    this.#all.push(node);
    this.downSince.delete(hardware.id);
    this.#note(`${hardware.id} starts (${incarnation})`);
  }

  #clients(): void {
    const { dice, time } = this;
    const pause = dice.pick([100, 300, 1000]);
    const again = () => {
      const living = this.living.filter(({ paused }) => !paused);
      if (living.length > 0 && time.now > 4000) {
        const tokens = 1 + dice.below(dice.chance(0.1) ? 300 : 60);
        dice.pick(living).request(`r${this.#nextRequest++}`, dice.pick(MODELS), tokens);
      }
      time.after(pause * dice.between(0.5, 1.5), again);
    };
    again();
  }

  /** As POST /cluster/instances does: any node plans, the node of rank 0 owns. */
  #create(): void {
    const { dice } = this;
    const at = dice.pick(this.living.filter(({ paused }) => !paused));
    if (at === undefined) return;
    const model = dice.pick(MODELS);
    const asked = {
      context: dice.pick([128, 256]),
      ...(dice.chance(0.6) ? dice.pick([{ tensor: 2 }, { pipeline: 2 }, { tensor: 3 }]) : {}),
    };
    const members = at.logic.members.filter(({ direct }) => direct);
    const result = placer.place(model, asked, members, {});
    const owner = result.kind === "placed" ? this.nodeOf(result.placement.ranks[0]?.node ?? "") : at;
    if (owner?.alive !== true || owner.paused) return;
    const id = `instance-${this.#nextInstance++}`;
    this.#note(`${owner.id} is to run ${id}: ${model} ${JSON.stringify(asked)}`);
    owner.logic.instances.create(id, model, asked);
    owner.logic.turn();
  }

  #stop(): void {
    const owners = this.living.filter(
      (node) => !node.paused && node.logic.instances.states().some(({ phase }) => phase !== "gone"),
    );
    if (owners.length === 0) return;
    const owner = this.dice.pick(owners);
    const { spec } = this.dice.pick(owner.logic.instances.states().filter(({ phase }) => phase !== "gone"));
    this.#note(`${spec.id} is stopped at ${owner.id}`);
    owner.logic.instances.stop(spec.id);
    this.ended.push({ id: spec.id, at: this.time.now, owner });
    owner.logic.turn();
  }

  #fault(): void {
    const { dice } = this;
    this.faults++;
    const living = this.living;
    const node = living.length > 0 ? dice.pick(living) : undefined;
    const kind = dice.below(15);
    if (kind <= 2 && node !== undefined) this.#crash(node);
    else if (kind === 3 && node !== undefined) {
      // Restarted before anybody misses it.
      this.#crash(node);
      this.#revive(node.hardware);
    } else if (kind === 4) for (const hardware of this.hardware) this.#revive(hardware);
    else if (kind === 5) this.#partition();
    else if (kind === 6) {
      this.#note("the network is whole again");
      this.network.mendAll();
    } else if (kind === 7) {
      const [a, b] = [dice.pick(this.hardware).id, dice.pick(this.hardware).id];
      this.#note(`${a} and ${b} are cut off from each other`);
      if (a !== b) this.network.cut(a, b);
    } else if (kind === 8 && node !== undefined && !node.paused) {
      const ms = dice.between(300, 15_000);
      this.#note(`${node.id} is stopped for ${(ms / 1000).toFixed(1)} s`);
      node.pause(ms);
    } else if (kind === 9 && node !== undefined) {
      node.slow = dice.pick([1, 3, 10]);
      this.#note(`${node.id} is ${node.slow} times slower`);
    } else if (kind === 10 && node !== undefined) this.#pressure(node);
    else if (kind === 11) {
      const cause = dice.pick(["memory", "files", "process"] as const);
      this.loadFaults[cause] = dice.pick([0, 0.2, 0.6]);
      this.loadsFailed ||= this.loadFaults[cause] > 0;
      this.#note(`loading fails for ${cause}: ${this.loadFaults[cause]}`);
    } else if (kind === 12) this.#stop();
    else if (kind === 13) this.#create();
    else if (kind === 14 && node !== undefined) this.#killProcess(node);
  }

  #crash(node: SimulatedNode): void {
    this.#note(`${node.id} crashes`);
    node.crash();
    this.downSince.set(node.id, this.time.now);
    if (this.dice.chance(0.5)) this.network.reset(node.id);
  }

  #revive(hardware: Hardware): void {
    const before = this.#nodes.get(hardware.id);
    if (before !== undefined && !before.alive) this.#start(hardware, before.incarnation + 1);
  }

  #partition(): void {
    const side = new Set(this.hardware.filter(() => this.dice.chance(0.5)).map(({ id }) => id));
    this.#note(`partition: ${[...side].join(", ")} and the rest`);
    for (const a of this.hardware)
      for (const b of this.hardware) if (side.has(a.id) && !side.has(b.id)) this.network.cut(a.id, b.id);
  }

  #pressure(node: SimulatedNode): void {
    const share = this.dice.pick([0.4, 0.7, 1]);
    this.#note(`${node.id} has ${share} of its memory`);
    node.ledger.setCapacity(node.hardware.capacity * share);
    node.logic.turn();
  }

  #killProcess(node: SimulatedNode): void {
    const process = [...node.processes.values()].find(({ ended }) => !ended);
    if (process === undefined || node.paused) return;
    const { spec, epoch } = process.order;
    this.#note(`the runner of ${spec.id} on ${node.id} is killed`);
    process.ended = true;
    node.processes.delete(spec.id);
    node.logic.ranks.failed(spec.id, epoch, "process", "the runner was killed");
    node.logic.turn();
  }

  #peace(): void {
    this.#note("no faults from here on");
    this.network.loss = 0;
    this.network.doubled = 0;
    this.network.delayMs = [0.2, 5];
    this.network.mendAll();
    Object.assign(this.loadFaults, { memory: 0, files: 0, process: 0 });
    for (const hardware of this.hardware) this.#revive(hardware);
    for (const node of this.living) {
      if (node.paused) node.pausedUntil = this.time.now;
      node.resume();
      node.slow = 1;
      node.ledger.setCapacity(node.hardware.capacity);
      node.logic.turn();
    }
    this.peaceSince = this.time.now;
  }
}
