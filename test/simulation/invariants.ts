// What must hold in every run: always, soon after the last fault, and once all has settled.

import { isNewer } from "../../src/cluster/rank-host.ts";
import type { InstanceState } from "../../src/cluster/types.ts";
import { groupWorks, type SimulatedNode } from "./simulated-node.ts";
import { Violation } from "./violation.ts";
import type { World } from "./world.ts";

/** An instance that was stopped on purpose. */
export interface Ended {
  id: string;
  at: number;
  owner: SimulatedNode;
}

/** The stated limits, and what this simulation's own grain adds (turns of 500 ms, checks of 100 ms, clocks off by 1 %). */
const GONE_LIMIT_MS = 10_000;
const REQUEST_LIMIT_MS = 3000;
const GRAIN_MS = 200;

/** Since when a running request has not been computed, and since when a ready instance has not, by their names. */
const broken = new WeakMap<World, Map<string, number>>();

/** Nodes that an owner's instances ran on, by instance, since it owns them without a break: what gave way to the same instance of
 * another owner takes its past with it. */
const everUsed = new WeakMap<SimulatedNode["logic"], Map<string, string[]>>();

function noteUse(world: World): void {
  for (const { logic } of world.living) {
    const used = everUsed.get(logic) ?? new Map<string, string[]>();
    everUsed.set(logic, used);
    const owned = new Set(logic.instances.states().map(({ spec }) => spec.id));
    for (const id of used.keys()) if (!owned.has(id)) used.delete(id);
    for (const { spec, phase } of logic.instances.states())
      if (phase === "ready")
        used.set(spec.id, [
          ...new Set([...(used.get(spec.id) ?? []), ...spec.ranks.map(({ node }) => node)]),
        ]);
  }
}

export function checkAlways(world: World): void {
  noteUse(world);
  checkRanks(world);
  checkReady(world);
  checkGone(world);
  checkRequests(world);
}

/** No two owners of a rank, no rank of an instance twice in one node, memory never above the plan. */
function checkRanks(world: World): void {
  const ranks = new Map<string, string>();
  for (const node of world.living) {
    let reserved = 0;
    for (const [instance, { order, bytes }] of node.processes) {
      reserved += bytes;
      const { spec, epoch, owner, rank } = order;
      const place = `${instance} epoch ${epoch} of ${owner} rank ${rank}`;
      const other = ranks.get(place);
      if (other !== undefined) throw new Violation(`${place} is computed by ${other} and ${node.id}`);
      ranks.set(place, node.id);
      if (spec.ranks[rank]?.node !== node.id)
        throw new Violation(`${node.id} computes ${place}, which is not its own`);
    }
    if (reserved > node.ledger.reserved)
      throw new Violation(`${node.id} runs ${reserved} bytes, its ledger knows of ${node.ledger.reserved}`);
    const running = node.logic.ranks.running();
    if (new Set(running.map(({ instance }) => instance)).size < running.length)
      throw new Violation(`${node.id} computes two ranks of one instance`);
  }
  for (const node of world.living)
    for (const state of node.logic.instances.states())
      if (state.phase === "ready" && state.spec.ranks[0]?.node !== node.id)
        throw new Violation(`${node.id} owns ${state.spec.id}, but ${state.spec.ranks[0]?.node} has rank 0`);
}

/** What is called ready computes, or is found out within the limit. */
function checkReady(world: World): void {
  const since = broken.get(world) ?? new Map<string, number>();
  broken.set(world, since);
  for (const node of world.living) {
    for (const { instance, epoch, phase } of node.logic.ranks.states()) {
      if (phase !== "ready") continue;
      const process = node.processes.get(instance);
      if (process?.order.epoch !== epoch || !process.ready)
        throw new Violation(`${node.id} calls its rank of ${instance} epoch ${epoch} ready, which it is not`);
    }
    for (const { spec, epoch, phase } of node.logic.instances.states()) {
      const key = `${spec.id} epoch ${epoch} of ${node.boot}`;
      if (phase !== "ready" || node.paused || groupWorks(world, spec.id, epoch, node.id)) {
        since.delete(key);
        continue;
      }
      const at = since.get(key) ?? world.time.now;
      since.set(key, at);
      if (world.time.now - Math.max(at, node.pausedUntil) > REQUEST_LIMIT_MS + GRAIN_MS)
        throw new Violation(
          `${key} is called ready, but has not computed for ${Math.round(world.time.now - at)} ms`,
        );
    }
  }
}

/** A node that is gone is gone from every view. One that slept itself needs a turn to notice. */
function checkGone(world: World): void {
  for (const [id, since] of world.downSince) {
    if (world.time.now - since <= GONE_LIMIT_MS) continue;
    for (const viewer of world.living) {
      if (viewer.paused || world.time.now - viewer.pausedUntil < GONE_LIMIT_MS) continue;
      if (viewer.logic.members.some(({ record }) => record.info.id === id))
        throw new Violation(`${viewer.id} still sees ${id}, gone for ${world.time.now - since} ms`);
    }
  }
}

/** A request whose ranks do not compute any more ends within its limit, and none is forgotten. */
function checkRequests(world: World): void {
  const since = broken.get(world) ?? new Map<string, number>();
  broken.set(world, since);
  for (const node of world.living) {
    if (node.paused || world.time.now - node.pausedUntil < REQUEST_LIMIT_MS) continue;
    const { running } = node.logic.requests;
    for (const { id, instance, epoch, owner } of running.values()) {
      if (world.requests.get(id)?.end !== undefined) throw new Violation(`request ${id} runs after its end`);
      const works =
        (owner === node.id || world.network.connected(node.id, owner)) &&
        groupWorks(world, instance, epoch, owner) &&
        world.nodeOf(owner)?.serves(id) === true;
      if (works) {
        since.delete(id);
        continue;
      }
      const at = since.get(id) ?? Math.max(world.time.now, node.pausedUntil);
      since.set(id, at);
      if (world.time.now - at > REQUEST_LIMIT_MS + GRAIN_MS)
        throw new Violation(
          `request ${id} at ${node.id} hangs: ${instance} epoch ${epoch} of ${owner} has not computed it for ${Math.round(world.time.now - at)} ms`,
        );
    }
    for (const request of world.open.values())
      if (request.node === node && !running.has(request.id))
        throw new Violation(`request ${request.id} has no end and is not running at ${node.id}`);
  }
}

/** Every error that a client gets can be tried again. */
function checkEnds(world: World): void {
  for (const { id, end, errorCode } of world.requests.values())
    if (end === "error" && !RETRYABLE.includes(errorCode ?? ""))
      throw new Violation(`request ${id} ended with ${errorCode}, which is not to be tried again`);
}

/** model_not_found: there is no instance of that model at all. */
const RETRYABLE = ["cluster_degraded", "model_loading", "model_not_found", "shutting_down"];

/** Shortly after the last fault every node sees every node, in the latest run. */
export function checkPeace(world: World): void {
  const expected = world.living.map(({ id, boot }) => `${id} ${boot}`).sort();
  for (const node of world.living) {
    const seen = node.logic.members.map(({ record }) => `${record.info.id} ${record.boot}`).sort();
    if (seen.join() !== expected.join())
      throw new Violation(`${node.id} sees [${seen.join(", ")}], there are [${expected.join(", ")}]`);
  }
}

/** In the end all views are one, every instance has one owner and is ready or cannot be, and nothing is left over. */
export function checkSettled(world: World): void {
  checkPeace(world);
  checkEnds(world);
  const owned = new Map<string, { node: SimulatedNode; state: InstanceState }>();
  for (const node of world.living)
    for (const state of node.logic.instances.states()) {
      if (state.phase === "gone") continue;
      const other = owned.get(state.spec.id);
      if (other !== undefined)
        throw new Violation(`${state.spec.id} is owned by ${other.node.id} and ${node.id}`);
      owned.set(state.spec.id, { node, state });
    }
  checkInstances(world, owned);
  const views = world.living.map((node) =>
    JSON.stringify(
      node.logic.members
        .map(({ record }) => record)
        .sort((a, b) => (a.info.id < b.info.id ? -1 : 1))
        .map(({ info, version }) => [info.id, version]),
    ),
  );
  // Versions still rise while requests run; what they say of instances must agree.
  if (new Set(world.living.map((node) => instancesSeen(node))).size > 1)
    throw new Violation(
      `views of the instances differ: ${world.living.map(instancesSeen).join(" | ")} (${views[0]})`,
    );
  for (const node of world.living) checkLeftovers(node, owned);
}

function checkInstances(
  world: World,
  owned: Map<string, { node: SimulatedNode; state: InstanceState }>,
): void {
  for (const [id, { node, state }] of owned) {
    const ended = world.ended.find((each) => each.id === id);
    if (ended?.owner.alive)
      throw new Violation(`${id} was stopped at ${ended.at} ms and is ${state.phase} on ${node.id}`);
    if (state.phase === "failed") {
      if (state.reason === "") throw new Violation(`${id} failed without a reason`);
      const result = world.placer.place(state.spec.model, state.spec.asked, node.logic.members, {
        first: node.id,
      });
      // Loading that failed so often is not tried again until the cluster changes or somebody asks.
      const givenUp = world.loadsFailed && state.reason.startsWith("given up after");
      if (result.kind === "placed" && !givenUp)
        throw new Violation(`${id} fits but is given up: ${state.reason}`);
    } else if (state.phase !== "ready" && state.phase !== "stopping")
      throw new Violation(`${id} is still ${state.phase} on ${node.id}: ${state.reason}`);
    if (state.phase === "ready" && !groupWorks(world, id, state.epoch, node.id))
      throw new Violation(`${id} is called ready, but its ranks do not compute`);
    if (state.phase === "ready") checkUse(world, node, state);
  }
}

/** A node that was lost is used again where that pays. */
function checkUse({ placer }: World, { id: first, logic }: SimulatedNode, state: InstanceState): void {
  const { spec } = state;
  const used = everUsed.get(logic)?.get(spec.id) ?? [];
  const best = placer.place(spec.model, spec.asked, logic.members, { first, freed: [state] });
  if (best.kind !== "placed" || best.speed < 1.15 * placer.speed(spec, logic.members)) return;
  const back = best.placement.ranks.find(
    ({ node }) => used.includes(node) && !spec.ranks.some((r) => r.node === node),
  );
  if (back !== undefined) throw new Violation(`${spec.id} does not use ${back.node} again, which is back`);
}

function instancesSeen(node: SimulatedNode): string {
  return node.logic.members
    .flatMap(({ record }) =>
      record.info.instances.map(({ spec, phase, epoch }) => `${spec.id}/${phase}/${epoch}@${record.info.id}`),
    )
    .sort()
    .join();
}

/** No process, no reservation and no orphan without its instance. */
function checkLeftovers(
  node: SimulatedNode,
  owned: Map<string, { node: SimulatedNode; state: InstanceState }>,
): void {
  const { orphans, ranks } = node.logic.membership.own.info;
  if (orphans.length > 0) throw new Violation(`${node.id} still has the orphan ${orphans[0]?.spec.id}`);
  for (const { key } of node.ledger.entries())
    if (!owned.has(key)) throw new Violation(`${node.id} holds memory for ${key}, which nobody owns`);
  for (const [instance, { order }] of node.processes) {
    const entry = owned.get(instance);
    if (entry === undefined) throw new Violation(`${node.id} computes ${instance}, which nobody owns`);
    const claim = { epoch: entry.state.epoch, owner: entry.node.id };
    if (isNewer(claim, order) || isNewer(order, claim))
      throw new Violation(
        `${node.id} computes epoch ${order.epoch} of ${order.owner}, ${instance} has ${claim.epoch} of ${claim.owner}`,
      );
  }
  for (const { instance } of ranks)
    if (!owned.has(instance))
      throw new Violation(`${node.id} tells of a rank of ${instance}, which nobody owns`);
}
