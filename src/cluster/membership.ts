// Who is in the cluster, as this node sees it: an exchange of last values. Every node writes its own record and repeats what
// it knows of others; there is no leader, no election and no log. A node lives as long as its beat rises somewhere, seen
// directly or told by others with its age; one whose beat stands still is gone from every view within GONE_MS and a little.
// Times are this process's monotonic clock; no other clock is ever compared. No I/O: messages go to `send`.

import { sameCluster } from "./admission.ts";
import { Graves } from "./graves.ts";
import { compareRuns, type Run, runOf } from "./run.ts";
import type { Digest, Exchange, Link, NodeId, NodeInfo, NodeRecord } from "./types.ts";

/** Every node tells every peer that often that it lives. Two of three may be lost in GONE_MS without harm many times over. */
export const BEAT_MS = 500;
/** A beat that has not risen for so long is a node that is gone. With a beat's and a message's time the limit of 10 s holds. */
export const GONE_MS = 6000;
/** A turn that comes so late means that this process slept: it heard nobody because of that, and what it hears first on
 * waking has waited for nobody knows how long of it. */
const SLEPT_MS = 2000;
/** Most nodes that are kept; discovery is bounded below that. */
const MOST_NODES = 256;

export interface MembershipOptions {
  cluster: string;
  protocol: number;
  /** Random, new at every start. */
  boot: string;
  info: NodeInfo;
  /** Monotonic milliseconds. */
  now: () => number;
  /** May be lost. Called with nodes that peerUp named. */
  send: (to: NodeId, message: Exchange) => void;
  /** The view changed: a node came or went, or a record did. */
  onChange?: () => void;
}

export interface Member {
  record: NodeRecord;
  self: boolean;
  /** There is a link to it. */
  direct: boolean;
  /** Since its beat rose. */
  ageMs: number;
  /** In this view without a break. */
  sinceMs: number;
}

interface Known {
  run: Run;
  beat: number;
  /** When its beat rose, by this clock. */
  heardAt: number;
  /** When it came into the view. */
  since: number;
  record: NodeRecord | undefined;
}

export class Membership {
  readonly #options: MembershipOptions;
  readonly #known = new Map<NodeId, Known>();
  readonly #peers = new Set<NodeId>();
  readonly #graves = new Graves();
  readonly #refused = new Map<NodeId, string>();
  #own: NodeRecord;
  #beat = 0;
  #lastTurn: number;
  /** The last sleep: how long, and when it ended. */
  #slept = { ms: 0, endedAt: Number.NEGATIVE_INFINITY };
  /** Another run of this node's own id, while its beat rises. */
  #double: { run: Run; beat: number; seenAt: number; rising: boolean; name?: string } | undefined;
  #left = false;
  /** Counts changes of the view. */
  #changes = 0;

  constructor(options: MembershipOptions) {
    this.#options = options;
    this.#own = { info: options.info, links: [], boot: options.boot, version: 1 };
    this.#lastTurn = options.now();
  }

  get id(): NodeId {
    return this.#own.info.id;
  }

  get own(): NodeRecord {
    return this.#own;
  }

  /** Why this node must not take part: a newer node has its id. undefined: all is well. */
  get conflict(): string | undefined {
    const double = this.#double;
    if (double === undefined || !double.rising || compareRuns(double.run, this.#run) < 0) return undefined;
    return `another running node has this node's identity (${double.name ?? "name unknown"}, start ${double.run.incarnation}; this one is start ${this.#run.incarnation}): its key file was copied; delete it on one of them`;
  }

  /** Nodes that spoke and were not let in, with the reason. */
  get refusals(): { id: NodeId; reason: string }[] {
    return [...this.#refused].map(([id, reason]) => ({ id, reason }));
  }

  /** This node first, the others by id. */
  members(): Member[] {
    const now = this.#options.now();
    const self = { record: this.#own, self: true, direct: true, ageMs: 0, sinceMs: Number.POSITIVE_INFINITY };
    if (this.conflict !== undefined) return [self];
    const others: Member[] = [];
    for (const [id, { record, heardAt, since }] of this.#known)
      if (record !== undefined)
        others.push({
          record,
          self: false,
          direct: this.#peers.has(id),
          ageMs: now - heardAt,
          sinceMs: now - since,
        });
    return [self, ...others.sort((a, b) => (a.record.info.id < b.record.info.id ? -1 : 1))];
  }

  /** Changes this node's own record and tells everybody at once. */
  update(change: Partial<NodeInfo>, links?: readonly Link[]): void {
    const { info, boot, version } = this.#own;
    this.#own = {
      info: { ...info, ...change, id: info.id, incarnation: info.incarnation },
      links: links === undefined ? this.#own.links : [...links],
      boot,
      version: version + 1,
    };
    this.#say([...this.#peers], [this.#ownDigest()], [this.#own]);
    this.#options.onChange?.();
  }

  peerUp(id: NodeId): void {
    if (id === this.id) return;
    this.#peers.add(id);
    this.#say([id], this.#digests(), [this.#own]);
  }

  /** goodbye: it said that it goes, so nobody has to wait until it is missed. */
  peerDown(id: NodeId, goodbye: boolean): void {
    this.#peers.delete(id);
    if (goodbye) this.#bury(id, true);
  }

  /** To be called every BEAT_MS or so. */
  tick(): void {
    const now = this.#options.now();
    const pause = now - this.#lastTurn;
    this.#lastTurn = now;
    if (pause > SLEPT_MS) this.#slept = { ms: pause, endedAt: now };
    let changed = false;
    // After a sleep the others have their time again to be heard; what is told of them keeps its true age.
    for (const [id, { heardAt }] of this.#known)
      if (now - Math.max(heardAt, this.#slept.endedAt) > GONE_MS) {
        this.#bury(id, false);
        changed = true;
      }
    const double = this.#double;
    if (double !== undefined && now - double.seenAt > GONE_MS) {
      this.#double = undefined;
      changed = true;
    }
    this.#beat++;
    this.#say([...this.#peers], this.#digests(), []);
    if (changed) this.#options.onChange?.();
  }

  /** Tells everybody that this node goes. */
  leave(): void {
    this.#left = true;
    for (const peer of this.#peers)
      this.#options.send(peer, { ...this.#message([this.#ownDigest()], [], []), leaving: true });
  }

  /** from: the node at the other end of the connection, whose key was checked. Anything may be lost, doubled or late. */
  receive(from: NodeId, message: Exchange): void {
    const { cluster, protocol } = this.#options;
    const refusal =
      message.from === from
        ? sameCluster({ cluster, protocol }, message)
        : `speaks for node ${message.from.slice(0, 8)}`;
    if (refusal !== undefined) {
      if (this.#refused.size < MOST_NODES) this.#refused.set(from, refusal);
      return;
    }
    this.#refused.delete(from);
    if (message.leaving) {
      this.#leaving(from, message);
      return;
    }
    const before = this.#changes;
    const wanted: NodeId[] = [];
    const waited = this.#waitedMs();
    for (const digest of message.digests)
      if (this.#hear(from, { ...digest, ageMs: digest.ageMs + waited })) wanted.push(digest.id);
    for (const record of message.records) this.#take(record);
    const missing = wanted.filter((id) => {
      const digest = message.digests.find((each) => each.id === id);
      return (this.#known.get(id)?.record?.version ?? 0) < (digest?.version ?? 0);
    });
    const answer = message.want.flatMap((id) => this.#recordOf(id) ?? []);
    if (missing.length > 0 || answer.length > 0)
      this.#options.send(
        from,
        this.#message(
          answer.flatMap(({ info }) => this.#digestOf(info.id) ?? []),
          answer,
          missing,
        ),
      );
    if (this.#changes !== before) this.#options.onChange?.();
  }

  /** How long a message that is read now may have lain here unread. */
  #waitedMs(): number {
    const now = this.#options.now();
    const late = now - this.#lastTurn;
    if (late > SLEPT_MS) return late;
    return now - this.#slept.endedAt < BEAT_MS ? this.#slept.ms : 0;
  }

  /** Takes note of a digest; true where its record is newer than what is here. */
  #hear(from: NodeId, digest: Digest): boolean {
    const run = runOf(digest);
    const now = this.#options.now();
    if (digest.id === this.id) {
      this.#hearOfSelf(digest, run);
      return this.conflict !== undefined && this.#double?.name === undefined;
    }
    if (digest.ageMs > GONE_MS || !this.#graves.allows(digest.id, run, digest.beat, from === digest.id))
      return false;
    const heardAt = now - digest.ageMs;
    const known = this.#known.get(digest.id);
    const order = known === undefined ? 1 : compareRuns(run, known.run);
    if (order < 0) return false;
    if (known === undefined || order > 0) {
      if (known === undefined && this.#known.size >= MOST_NODES) return false;
      // A restarted node replaces itself: what the run before said is void.
      this.#known.set(digest.id, { run, beat: digest.beat, heardAt, since: now, record: undefined });
      this.#changes++;
      return true;
    }
    if (digest.beat > known.beat) {
      known.beat = digest.beat;
      known.heardAt = Math.max(known.heardAt, heardAt);
    }
    return digest.version > (known.record?.version ?? 0);
  }

  #hearOfSelf({ beat, ageMs }: Digest, run: Run): void {
    if (compareRuns(run, this.#run) === 0) return;
    // What others still repeat of an earlier run stands still; a run that goes on is a second node.
    const now = this.#options.now();
    const known = this.#double;
    if (known === undefined || compareRuns(run, known.run) > 0) {
      this.#double = { run, beat, seenAt: now - ageMs, rising: false };
      return;
    }
    if (compareRuns(run, known.run) < 0 || beat <= known.beat) return;
    Object.assign(known, { beat, seenAt: now - ageMs, rising: true });
    this.#options.onChange?.();
  }

  #take(record: NodeRecord): void {
    const { id, name } = record.info;
    const run = runOf({ incarnation: record.info.incarnation, boot: record.boot });
    if (id === this.id) {
      if (this.#double !== undefined && compareRuns(run, this.#double.run) === 0) this.#double.name = name;
      return;
    }
    const known = this.#known.get(id);
    if (known === undefined || compareRuns(run, known.run) !== 0) return;
    if (record.version <= (known.record?.version ?? 0)) return;
    known.record = record;
    this.#changes++;
  }

  #leaving(from: NodeId, message: Exchange): void {
    const digest = message.digests.find(({ id }) => id === from);
    const known = this.#known.get(from);
    if (digest === undefined || (known !== undefined && compareRuns(runOf(digest), known.run) < 0)) return;
    this.#bury(from, true);
    this.#graves.dig(from, runOf(digest), Number.POSITIVE_INFINITY);
    this.#options.onChange?.();
  }

  #bury(id: NodeId, whole: boolean): void {
    const known = this.#known.get(id);
    if (known === undefined) return;
    this.#known.delete(id);
    this.#graves.dig(id, known.run, whole ? Number.POSITIVE_INFINITY : known.beat);
    if (whole) this.#options.onChange?.();
  }

  get #run(): Run {
    return { incarnation: this.#own.info.incarnation, boot: this.#own.boot };
  }

  #recordOf(id: NodeId): NodeRecord | undefined {
    return id === this.id ? this.#own : this.#known.get(id)?.record;
  }

  #ownDigest(): Digest {
    const { info, boot, version } = this.#own;
    return { id: info.id, incarnation: info.incarnation, boot, version, beat: this.#beat, ageMs: 0 };
  }

  #digestOf(id: NodeId): Digest | undefined {
    if (id === this.id) return this.#ownDigest();
    const known = this.#known.get(id);
    if (known === undefined) return undefined;
    const { run, beat, heardAt, record } = known;
    const ageMs = Math.max(0, this.#options.now() - heardAt);
    return { id, ...run, version: record?.version ?? 0, beat, ageMs };
  }

  #digests(): Digest[] {
    return [this.#ownDigest(), ...[...this.#known.keys()].flatMap((id) => this.#digestOf(id) ?? [])];
  }

  #message(digests: Digest[], records: NodeRecord[], want: NodeId[]): Exchange {
    const { cluster, protocol, boot } = this.#options;
    return { cluster, protocol, from: this.id, boot, digests, records, want, leaving: false };
  }

  /** The same message to all of them. */
  #say(peers: readonly NodeId[], digests: Digest[], records: NodeRecord[]): void {
    if (this.#left || this.conflict !== undefined) return;
    const message = this.#message(digests, records, []);
    for (const peer of peers) this.#options.send(peer, message);
  }
}
