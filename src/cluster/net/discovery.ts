// Finds nodes without configuration: sends beacons by multicast on every network of this machine, IPv4 and IPv6, and
// listens for those of others. Networks may come and go; one that does not carry multicast is met through --peer.

import { createSocket, type Socket } from "node:dgram";
import { networkInterfaces } from "node:os";
import type { Logger } from "../../log.ts";
import {
  type Beacon,
  type BeaconCluster,
  decodeBeacon,
  encodeBeacon,
  type Heard,
  ReplayFilter,
} from "./beacon.ts";
import { joinAddress } from "./dial.ts";

/** Site-local, administratively scoped (RFC 2365); not forwarded with TTL 1. */
const GROUP_V4 = "239.255.117.12";
/** Link-local scope, transient (RFC 4291 section 2.7). */
const GROUP_V6 = "ff12::ca7a:7a17";
export const DISCOVERY_PORT = 11712;

const BEACON_PAUSE_MS = 1000;
/** Datagrams read in a second; more are an attack and are dropped. */
const MAX_DATAGRAMS_PER_SECOND = 2000;

export interface DiscoveryOptions {
  /** Read for every beacon; undefined: listen only. `secret` signs. */
  announce: () => { beacon: Omit<Beacon, "count">; secret: string } | undefined;
  /** The cluster whose beacons count as members'. */
  cluster: () => BeaconCluster | undefined;
  /** A beacon, and where its node's control plane is: host:port. */
  onHeard: (heard: Exclude<Heard, { kind: "garbage" }>, address: string) => void;
  log: Logger;
  /** UDP port; replaced in tests. */
  port?: number;
  pauseMs?: number;
}

export interface DiscoveryStatus {
  /** Networks (interface and family) that beacons leave through. */
  networks: string[];
  sent: number;
  heard: number;
  /** Dropped: not a beacon, replayed, or too many. */
  dropped: number;
  /** Why a family is not used, or a network does not take beacons. */
  problems: Map<string, string>;
}

export class Discovery {
  readonly status: DiscoveryStatus = { networks: [], sent: 0, heard: 0, dropped: 0, problems: new Map() };
  readonly #options: DiscoveryOptions;
  readonly #sockets: { family: 4 | 6; socket: Socket; joined: Set<string> }[] = [];
  /** Of beacons under `#secret`. Begun anew with every secret: the counts of before may come from a node that was removed. */
  #filter = new ReplayFilter();
  #secret: string | undefined;
  readonly #port: number;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #count = 0;
  #stopped = false;
  #window = { second: 0, count: 0 };

  constructor(options: DiscoveryOptions) {
    this.#options = options;
    this.#port = options.port ?? DISCOVERY_PORT;
  }

  /** Opens the sockets and begins. Resolves also where no family works; `status.problems` says why. */
  async start(): Promise<void> {
    await Promise.all([this.#open(4), this.#open(6)]);
    if (!this.#stopped) this.#turn();
  }

  stop(): void {
    this.#stopped = true;
    clearTimeout(this.#timer);
    for (const { socket } of this.#sockets) socket.close();
    this.#sockets.length = 0;
  }

  #open(family: 4 | 6): Promise<void> {
    return new Promise((resolve) => {
      const problem = (error: Error) => {
        this.status.problems.set(`IPv${family}`, error.message);
        resolve();
      };
      let socket: Socket;
      try {
        socket = createSocket({
          type: family === 4 ? "udp4" : "udp6",
          // Several nodes on one machine all hear the group.
          reuseAddr: true,
          ...(family === 6 ? { ipv6Only: true } : {}),
        });
      } catch (thrown) {
        problem(thrown instanceof Error ? thrown : new Error(String(thrown)));
        return;
      }
      socket.on("error", problem);
      socket.on("message", (datagram, from) => this.#hear(datagram, from.address));
      socket.bind({ port: this.#port }, () => {
        if (this.#stopped) socket.close();
        else {
          try {
            socket.setMulticastTTL(1);
            socket.setMulticastLoopback(true);
          } catch (thrown) {
            problem(thrown instanceof Error ? thrown : new Error(String(thrown)));
          }
          this.#sockets.push({ family, socket, joined: new Set() });
        }
        resolve();
      });
    });
  }

  #turn(): void {
    this.#beat()
      .catch((thrown) => this.#options.log.warn("beacons fail", { reason: String(thrown) }))
      .finally(() => {
        if (this.#stopped) return;
        this.#timer = setTimeout(() => this.#turn(), this.#options.pauseMs ?? BEACON_PAUSE_MS);
      });
  }

  /** Joins the group on networks that are new, and sends one beacon through each. */
  async #beat(): Promise<void> {
    const said = this.#options.announce();
    this.#count++;
    const datagram =
      said === undefined ? undefined : encodeBeacon({ ...said.beacon, count: this.#count }, said.secret);
    const networks: string[] = [];
    for (const entry of this.#sockets) {
      for (const { key, local } of localNetworks(entry.family)) {
        if (this.#stopped) return;
        try {
          this.#join(entry, key, local);
          if (datagram !== undefined) await this.#send(entry, datagram, local);
          this.status.problems.delete(key);
          networks.push(key);
        } catch (thrown) {
          // A network that is down, or without multicast: the next turn tries again.
          this.status.problems.set(key, thrown instanceof Error ? thrown.message : String(thrown));
          entry.joined.delete(key);
        }
      }
    }
    this.status.networks = networks;
  }

  #join(entry: { family: 4 | 6; socket: Socket; joined: Set<string> }, key: string, local: string): void {
    if (entry.joined.has(key)) return;
    try {
      entry.socket.addMembership(entry.family === 4 ? GROUP_V4 : GROUP_V6, local);
    } catch (thrown) {
      // Joined before, by an address that the interface had then.
      const code = thrown instanceof Error && "code" in thrown ? thrown.code : undefined;
      if (code !== "EADDRINUSE") throw thrown;
    }
    entry.joined.add(key);
  }

  /** One at a time: the outgoing interface is a property of the socket. */
  #send(
    { family, socket }: { family: 4 | 6; socket: Socket },
    datagram: Buffer,
    local: string,
  ): Promise<void> {
    return new Promise((resolve, reject) => {
      socket.setMulticastInterface(local);
      const to = family === 4 ? GROUP_V4 : `${GROUP_V6}${local.replace("::", "")}`;
      socket.send(datagram, this.#port, to, (error) => {
        if (error) {
          reject(error);
          return;
        }
        this.status.sent++;
        resolve();
      });
    });
  }

  #hear(datagram: Uint8Array, from: string): void {
    const second = Math.floor(performance.now() / 1000);
    if (this.#window.second !== second) this.#window = { second, count: 0 };
    if (++this.#window.count > MAX_DATAGRAMS_PER_SECOND) {
      this.status.dropped++;
      return;
    }
    const ours = this.#options.cluster();
    if (ours?.secret !== this.#secret) {
      this.#secret = ours?.secret;
      this.#filter = new ReplayFilter();
    }
    const heard = decodeBeacon(datagram, ours);
    const said = this.#options.announce()?.beacon;
    if ("beacon" in heard && heard.beacon.id === said?.id) return; // our own
    // Counts of an earlier secret say nothing, and none may silence a node: what such a beacon may do is bounded where it is used.
    const replayed = heard.kind === "member" && !heard.earlier && !this.#filter.accept(heard.beacon, from);
    if (heard.kind === "garbage" || replayed) {
      this.status.dropped++;
      return;
    }
    this.status.heard++;
    this.#options.onHeard(heard, heard.kind === "version" ? from : joinAddress(from, heard.beacon.port));
  }
}

/** This machine's networks of a family: the interface's name, and what selects it in socket options. */
function localNetworks(family: 4 | 6): { key: string; local: string }[] {
  const found = new Map<string, string>();
  for (const [name, addresses] of Object.entries(networkInterfaces())) {
    for (const { family: kind, address } of addresses ?? []) {
      if (kind !== `IPv${family}`) continue;
      // The kernel has no route for link-local IPv6 multicast on the loopback interface; IPv4 covers it.
      if (family === 6 && address === "::1") continue;
      if (!found.has(name)) found.set(name, family === 4 ? address : `::%${name}`);
    }
  }
  return [...found].map(([name, local]) => ({ key: `${name} IPv${family}`, local }));
}
