// RDMA as this node knows it: its devices, looked at now and then, and for each other node the pair of devices that connects the two,
// found by trying (rdma-trial.ts) and kept until either node's devices change. Says how a rank of an instance is to use them.

import { queuePairs } from "../../engine/local-ranks.ts";
import type { GroupOptions, LinkMeasure } from "../../engine/rank-protocol.ts";
import { chosenDevices, listRdmaDevices, usableDevices } from "../../engine/rdma-devices.ts";
import { asCaravanError } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import { devicePairs } from "../rdma-candidates.ts";
import { reasonOf } from "../reason.ts";
import type { Link, NodeId, RdmaSurvey } from "../types.ts";
import type { Neighbour } from "../view-questions.ts";
import { answerTrials, leadTrials, type TrialChannel, type TrialResult } from "./rdma-trial.ts";

/** Devices are listed anew so often: cables come and go. Where the system has no library for them, or it hangs, more rarely. */
const LIST_MS = 30_000;
const NO_LIBRARY_MS = 120_000;
/** A pair of nodes that no cable connects is tried again after this, doubled each time: nothing says when a cable was moved. */
const AGAIN_MS = 60_000;
const MOST_AGAIN_MS = 1_800_000;
/** Where time ran out, as on machines that are busy, sooner, and doubled less far. */
const LATE_AGAIN_MS = 15_000;
const MOST_LATE_AGAIN_MS = 120_000;
/** Ranks wait so long for trials that run. */
const SETTLE_MS = 20_000;
const SETTLE_LOOK_MS = 50;
/** A link that was found shows in the other node's record by then; where it does not, that node has started anew. */
const MUTUAL_MS = 15_000;
/** A cable outlives a node that is out of sight for a moment, as on machines that are busy: ranks that are placed again at once need not wait for
 * a new try. One that has started anew knows of no link, and is tried again (MUTUAL_MS). */
const AWAY_MS = 30_000;
/** Tries that other nodes may lead here at one time. */
const MOST_ANSWERED = 4;

export interface RdmaLinksOptions {
  id: NodeId;
  /** Devices that may be used, by name; empty: all; "off": none. */
  wanted: readonly string[] | "off";
  /** Replaced in tests. */
  list?: () => Promise<RdmaSurvey>;
  /** Other nodes that this one talks to, with what they say of their devices. */
  others: () => Neighbour[];
  open: (node: NodeId) => Promise<TrialChannel>;
  /** The survey or a link changed. */
  onChange: () => void;
  log: Logger;
  /** Command line of a rank process; replaced in tests. */
  command?: readonly string[];
}

interface Pair {
  /** Devices of both nodes as they were. */
  stamp: string;
  /** When the state began, and when the other node was there last; monotonic milliseconds. */
  since: number;
  seenAt: number;
  state: "trying" | "found" | "none";
  own: string;
  theirs: string;
  measure: LinkMeasure | undefined;
  reason: string;
  failures: number;
  /** Monotonic milliseconds. */
  againAt: number;
}

export class RdmaLinks {
  readonly #options: RdmaLinksOptions;
  readonly #pairs = new Map<NodeId, Pair>();
  #survey: RdmaSurvey;
  #listed = false;
  #listing = false;
  #listAt = 0;
  #answered = 0;
  #leading = false;

  constructor(options: RdmaLinksOptions) {
    this.#options = options;
    this.#survey =
      options.wanted === "off"
        ? { reason: "RDMA is turned off (--rdma off)" }
        : { reason: "RDMA devices are being looked for" };
    this.#listed = options.wanted === "off";
  }

  /** For the node's record. */
  get survey(): RdmaSurvey {
    return this.#survey;
  }

  /** From this node to others. */
  links(): Link[] {
    return [...this.#pairs].flatMap(([to, { state, own, theirs, measure }]) =>
      state !== "found" || measure === undefined
        ? []
        : [
            {
              ...{ from: this.#options.id, to, kind: "rdma" as const, devices: [own, theirs] },
              ...{ latencyUs: measure.roundTripUs, bandwidth: measure.bandwidth },
            } satisfies Link,
          ],
    );
  }

  /** Looks at devices and nodes; starts what is due. Called every few seconds. */
  step(): void {
    void this.#list();
    const others = this.#options.others();
    const here = new Set(others.map(({ id }) => id));
    for (const [id, pair] of this.#pairs) {
      if (here.has(id)) pair.seenAt = performance.now();
      else if (pair.state !== "found" || performance.now() - pair.seenAt >= AWAY_MS) this.#pairs.delete(id);
    }
    for (const other of others) {
      const known = this.#pairs.get(other.id);
      if (known?.state === "found" && !this.#holds(known, other)) this.#pairs.delete(other.id);
      if (this.#due(other)) void this.#lead(other);
    }
  }

  /** A connection of purpose "rdma": another node leads. Owns the channel. */
  answer(channel: TrialChannel, from: NodeId): void {
    const other = this.#options.others().find(({ id }) => id === from);
    // Lower ids lead; and a node that has no usable device has nothing to answer.
    if (other === undefined || from >= this.#options.id || this.#answered >= MOST_ANSWERED) {
      channel.close();
      return;
    }
    const { command } = this.#options;
    const allowed = (name: string) => usableDevices(this.#survey).some((each) => each.name === name);
    this.#answered++;
    const pair = this.#begin(from, this.#stamp(other.rdma));
    answerTrials({ channel, ...(command === undefined ? {} : { command }) }, allowed)
      .then((result) => this.#took(other, pair, result))
      .catch((thrown) => this.#took(other, pair, brokenOff(thrown)))
      .finally(() => this.#answered--);
  }

  /** How rank `rank` of an instance uses RDMA; nodes: by rank. Waits for trials that run, at most 20 s. */
  async groupOptions(
    nodes: readonly NodeId[],
    rank: number,
  ): Promise<Pick<GroupOptions, "rdmaDevice" | "noRdma" | "rdmaQueuePairs">> {
    const others = nodes.filter((_, r) => r !== rank);
    const until = performance.now() + SETTLE_MS;
    while (performance.now() < until && this.#unsettled(others)) await Bun.sleep(SETTLE_LOOK_MS);
    if ("reason" in this.#survey) return { noRdma: this.#survey.reason.slice(0, 199) };
    const missing = others.find((id) => this.#pairs.get(id)?.state !== "found");
    if (missing !== undefined) return { noRdma: this.#whyNone(missing).slice(0, 199) };
    return {
      rdmaDevice: nodes.map((id, r) => (r === rank ? "" : (this.#pairs.get(id)?.own ?? ""))).join(","),
      ...queuePairs(process.env.CARAVAN_RDMA_QUEUE_PAIRS),
    };
  }

  /** Why there is no RDMA between this node and another one, as a sentence; undefined: there is. */
  why(other: NodeId): string | undefined {
    return this.#pairs.get(other)?.state === "found" ? undefined : this.#whyNone(other);
  }

  #whyNone(id: NodeId): string {
    if ("reason" in this.#survey) return this.#survey.reason;
    const other = this.#options.others().find((each) => each.id === id);
    const name = other?.name ?? `node ${id.slice(0, 8)}`;
    if (usableDevices(this.#survey).length === 0) return ownProblem(this.#survey);
    if (other !== undefined && usableDevices(other.rdma).length === 0)
      return `${name}: ${ownProblem(other.rdma)}`;
    const pair = this.#pairs.get(id);
    return pair?.state === "none"
      ? `no RDMA device here reaches ${name}: ${pair.reason}`
      : `RDMA between here and ${name} is not tried yet`;
  }

  #unsettled(nodes: readonly NodeId[]): boolean {
    if (!this.#listed) return true;
    const others = this.#options.others();
    return nodes.some((id) => {
      const other = others.find((each) => each.id === id);
      if (other === undefined || !this.#mayReach(other.rdma)) return false;
      const pair = this.#pairs.get(id);
      return pair === undefined || pair.state === "trying";
    });
  }

  #mayReach(theirs: RdmaSurvey): boolean {
    return usableDevices(this.#survey).length > 0 && usableDevices(theirs).length > 0;
  }

  async #list(): Promise<void> {
    const { wanted, list = listRdmaDevices, onChange } = this.#options;
    if (wanted === "off" || this.#listing || performance.now() < this.#listAt) return;
    this.#listing = true;
    const found = chosenDevices(await list(), wanted);
    this.#listing = false;
    this.#listed = true;
    this.#listAt = performance.now() + ("reason" in found ? NO_LIBRARY_MS : LIST_MS);
    if (JSON.stringify(found) === JSON.stringify(this.#survey)) return;
    this.#survey = found;
    onChange();
  }

  #stamp(theirs: RdmaSurvey): string {
    return JSON.stringify([usableDevices(this.#survey), usableDevices(theirs)]);
  }

  /** The cable that was found may still be there. */
  #holds({ own, theirs, since }: Pair, { id, rdma, linked }: Neighbour): boolean {
    const has = (survey: RdmaSurvey, name: string) =>
      usableDevices(survey).some((each) => each.name === name);
    if (!has(this.#survey, own) || ("devices" in rdma && !has(rdma, theirs))) return false;
    return id < this.#options.id || linked || performance.now() - since < MUTUAL_MS;
  }

  /** Whether this node is to try now. */
  #due({ id, rdma }: Neighbour): boolean {
    if (this.#leading || this.#options.id >= id || !this.#mayReach(rdma)) return false;
    const known = this.#pairs.get(id);
    if (known === undefined) return true;
    if (known.state !== "none") return false;
    return performance.now() >= known.againAt || known.stamp !== this.#stamp(rdma);
  }

  #begin(id: NodeId, stamp: string): Pair {
    const failures = this.#pairs.get(id)?.failures ?? 0;
    const pair: Pair = {
      ...{
        stamp,
        since: performance.now(),
        seenAt: performance.now(),
        state: "trying",
        own: "",
        theirs: "",
        measure: undefined,
        reason: "",
        failures,
        againAt: 0,
      },
    };
    this.#pairs.set(id, pair);
    return pair;
  }

  async #lead(other: Neighbour): Promise<void> {
    const { open, command } = this.#options;
    // One at a time: tries of one node would disturb each other's figures.
    this.#leading = true;
    const pair = this.#begin(other.id, this.#stamp(other.rdma));
    try {
      const channel = await open(other.id);
      try {
        const taken = new Set(
          [...this.#pairs.values()].flatMap(({ state, own }) => (state === "found" ? [own] : [])),
        );
        const pairs = devicePairs(usableDevices(this.#survey), usableDevices(other.rdma), taken);
        this.#took(
          other,
          pair,
          await leadTrials({ channel, ...(command === undefined ? {} : { command }) }, pairs),
        );
      } finally {
        channel.finish();
      }
    } catch (thrown) {
      this.#took(other, pair, brokenOff(thrown));
    } finally {
      this.#leading = false;
    }
  }

  #took(other: { name: string }, pair: Pair, result: TrialResult): void {
    const { log, onChange } = this.#options;
    pair.since = performance.now();
    if (result.pair === undefined) {
      const [least, most] = result.late ? [LATE_AGAIN_MS, MOST_LATE_AGAIN_MS] : [AGAIN_MS, MOST_AGAIN_MS];
      const wait = Math.min(most, least * 2 ** pair.failures);
      const againAt = performance.now() + wait;
      Object.assign(pair, {
        state: "none",
        reason: reasonOf(result.reason),
        failures: pair.failures + 1,
        againAt,
      });
      log.info("no RDMA to a node", { node: other.name, reason: result.reason });
    } else {
      const [own, theirs] = result.pair;
      Object.assign(pair, { state: "found", own, theirs, measure: result.measure, failures: 0 });
      const { roundTripUs, bandwidth } = result.measure;
      const figures = { round_trip_us: Math.round(roundTripUs), bandwidth: Math.round(bandwidth) };
      log.info("RDMA to a node", { node: other.name, device: own, their_device: theirs, ...figures });
    }
    onChange();
  }
}

/** The connection between the nodes was lost, or a process could not be started: that says nothing of the cable. */
function brokenOff(thrown: unknown): TrialResult {
  return { pair: undefined, reason: asCaravanError(thrown).message, late: true };
}

/** Of a survey without a usable device. */
function ownProblem(survey: RdmaSurvey): string {
  if ("reason" in survey) return survey.reason;
  if (survey.devices.length === 0) return "there is no RDMA device";
  return survey.devices.map(({ name, problem }) => problem || `${name} cannot be used`).join("; ");
}
