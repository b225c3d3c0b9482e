// The network between simulated nodes: every message may be lost, doubled, late and overtaken; pairs of nodes may be cut off.
// Links come up and go down as the control plane's do: dialled again every now and then, given up after 1.5 s of silence.

import type { Dice, VirtualTime } from "./virtual-time.ts";

const CHECK_MS = 250;
const SILENCE_MS = 1500;

export interface Station {
  readonly id: string;
  /** Unchanged for one run of the node. */
  readonly boot: string;
  readonly alive: boolean;
  /** Stopped, but not ended: it neither sends nor answers. */
  readonly paused: boolean;
  deliver(from: string, message: unknown): void;
  peerUp(id: string): void;
  peerDown(id: string): void;
}

interface LinkEnd {
  /** Of the run that it connects to. */
  boot: string;
  silentSince: number | undefined;
}

export class Network {
  loss = 0;
  doubled = 0;
  delayMs: [low: number, high: number] = [0.2, 5];
  readonly #time: VirtualTime;
  readonly #dice: Dice;
  readonly #stations = new Map<string, Station>();
  readonly #cut = new Set<string>();
  /** What each run of a node thinks it is connected to. */
  readonly #links = new Map<string, Map<string, LinkEnd>>();
  readonly #texts = new WeakMap<object, string>();
  sent = 0;

  constructor(time: VirtualTime, dice: Dice) {
    this.#time = time;
    this.#dice = dice;
    time.every(CHECK_MS, () => {
      this.#check();
      return true;
    });
  }

  attach(station: Station): void {
    this.#stations.set(station.id, station);
    this.#links.set(station.boot, new Map());
  }

  /** A killed process on a living host: its connections are reset at once. */
  reset(id: string): void {
    for (const station of this.#stations.values()) this.#drop(station, id);
  }

  cut(a: string, b: string): void {
    this.#cut.add(pair(a, b));
  }

  mend(a: string, b: string): void {
    this.#cut.delete(pair(a, b));
  }

  mendAll(): void {
    this.#cut.clear();
  }

  /** Whether bytes get from one to the other now. */
  connected(a: string, b: string): boolean {
    const [x, y] = [this.#stations.get(a), this.#stations.get(b)];
    if (x === undefined || y === undefined) return false;
    return x.alive && y.alive && !x.paused && !y.paused && !this.#cut.has(pair(a, b));
  }

  send(from: Station, to: string, message: object): void {
    this.sent++;
    if (this.#stations.get(from.id) !== from || this.#cut.has(pair(from.id, to))) return;
    if (this.#dice.chance(this.loss)) return;
    const text = this.#textOf(message);
    const copies = this.#dice.chance(this.doubled) ? 2 : 1;
    for (let i = 0; i < copies; i++)
      this.#time.after(this.#dice.between(...this.delayMs), () => {
        const station = this.#stations.get(to);
        if (station?.alive === true && !this.#cut.has(pair(from.id, to)))
          station.deliver(from.id, JSON.parse(text));
      });
  }

  /** The same message goes to several nodes. */
  #textOf(message: object): string {
    const known = this.#texts.get(message);
    if (known !== undefined) return known;
    const text = JSON.stringify(message);
    this.#texts.set(message, text);
    return text;
  }

  #check(): void {
    const stations = [...this.#stations.values()].filter(({ alive, paused }) => alive && !paused);
    for (const station of stations) {
      const links = this.#links.get(station.boot);
      if (links === undefined) continue;
      for (const other of this.#stations.values()) {
        if (other === station) continue;
        const end = links.get(other.id);
        if (this.connected(station.id, other.id)) {
          if (end?.boot === other.boot) {
            end.silentSince = undefined;
            continue;
          }
          if (end !== undefined) this.#drop(station, other.id);
          if (this.#dice.chance(0.7)) {
            links.set(other.id, { boot: other.boot, silentSince: undefined });
            station.peerUp(other.id);
          }
        } else if (end !== undefined) {
          end.silentSince ??= this.#time.now;
          if (this.#time.now - end.silentSince >= SILENCE_MS) this.#drop(station, other.id);
        }
      }
    }
  }

  #drop(station: Station, id: string): void {
    if (this.#links.get(station.boot)?.delete(id) === true) station.peerDown(id);
  }
}

function pair(a: string, b: string): string {
  return a < b ? `${a} ${b}` : `${b} ${a}`;
}
