// How a new node gets the cluster's secret: the exchange that leads to the code which a person carries from the new node
// to a member (join-code.ts), and what both sides say after that. All of it on one TLS connection of purpose "join".
//
//   new node                                   member
//   commitment of nonce N            →
//                                    ←         nonce M
//   N                                →         both compute the code's first half
//   shows the code  ··· a person types it ···  finds the request by the first half
//                                    ←         proof of the second half
//   checks it, once; own proof       →
//                                    ←         cluster name, secret, known nodes

import * as v from "valibot";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { NodeId } from "../types.ts";
import type { Channel } from "./channel.ts";
import { type ClusterCredentials, CredentialsSchema, type KnownNode } from "./cluster-file.ts";
import { type Peer, sessionKey } from "./hello.ts";
import {
  checkHalf,
  codeProof,
  commitmentOf,
  formatCode,
  newNonce,
  newSecretHalf,
  parseCode,
} from "./join-code.ts";
import { sameMac } from "./same-mac.ts";

const STEP_LIMIT_MS = 5000;
/** How long a person has. */
export const JOIN_LIMIT_MS = 10 * 60_000;
/** Requests that wait for a person at one time. */
const MAX_WAITING = 8;
/** New requests: this many at once, then one in this time. It bounds the guesses of somebody in the middle. */
const BURST = 5;
const REFILL_MS = 3000;

const hex = v.pipe(v.string(), v.regex(/^[0-9a-f]{64}$/));
const Commitment = v.object({ commitment: hex });
const Nonce = v.object({ nonce: hex });
const Proof = v.object({ proof: hex });
const Declined = v.object({ declined: v.pipe(v.string(), v.maxLength(500)) });
const Credentials = v.object({ credentials: CredentialsSchema });

async function next<T>(channel: Channel, schema: v.GenericSchema<unknown, T>, limitMs: number): Promise<T> {
  const value = await channel.readJson(limitMs);
  const declined = v.safeParse(Declined, value);
  if (declined.success)
    throw new CaravanError("permission_denied", `the other node declines: ${declined.output.declined}`);
  const parsed = v.safeParse(schema, value);
  if (parsed.success) return parsed.output;
  throw new CaravanError("permission_denied", "the other node does not keep to the rules of joining");
}

/** Ends with the reason for the other side. */
function decline(channel: Channel, reason: string): void {
  if (!channel.open) return;
  channel.send({ declined: reason });
  channel.finish();
}

export interface AskOptions {
  /** After the hello. */
  channel: Channel;
  ownId: NodeId;
  member: Peer;
  /** Shows the code to the person. */
  onCode: (code: string) => void;
  limitMs?: number;
}

/** The new node's side: resolves with the cluster's credentials once a person has approved. */
export async function askToJoin(options: AskOptions): Promise<ClusterCredentials> {
  const { channel, ownId, member } = options;
  const nonce = newNonce();
  channel.send({ commitment: commitmentOf(nonce) });
  const answer = await next(channel, Nonce, STEP_LIMIT_MS);
  channel.send({ nonce });
  const secret = newSecretHalf();
  const check = checkHalf({ id: ownId, nonce }, { id: member.id, nonce: answer.nonce });
  options.onCode(formatCode(check, secret));

  const { proof } = await next(channel, Proof, options.limitMs ?? JOIN_LIMIT_MS);
  const session = sessionKey(channel.socket);
  if (!sameMac(proof, codeProof(secret, session, "member"))) {
    decline(channel, "the second half of the code is wrong");
    throw new CaravanError(
      "permission_denied",
      "the code that was typed is not this one, or somebody is between the two nodes",
      { hint: "Start `caravan join` again: a code is good for one try." },
    );
  }
  channel.send({ proof: codeProof(secret, session, "joiner") });
  // Now it is the member that the person meant.
  channel.trust();
  const { credentials } = await next(channel, Credentials, STEP_LIMIT_MS);
  channel.finish();
  return credentials;
}

interface Waiting {
  check: string;
  channel: Channel;
  peer: Peer;
  from: string;
  sinceMs: number;
}

/** A request as people see it; the code is not among it, they have to read it from the new node. */
export interface JoinRequest {
  name: string;
  from: string;
  waitingSeconds: number;
}

export interface JoinRequestsOptions {
  ownId: NodeId;
  /** What a new node gets. Throws when this node is in no cluster. */
  credentials: () => ClusterCredentials;
  now?: () => number;
  limitMs?: number;
}

/** The member's side: requests that wait for a person. */
export class JoinRequests {
  readonly #options: JoinRequestsOptions;
  readonly #waiting = new Set<Waiting>();
  #tokens = BURST;
  #refilledMs: number;
  /** Connections between hello and code. */
  #talking = 0;

  constructor(options: JoinRequestsOptions) {
    this.#options = options;
    this.#refilledMs = this.#now();
  }

  list(): JoinRequest[] {
    return [...this.#waiting].map(({ peer, from, sinceMs }) => ({
      name: peer.name,
      from,
      waitingSeconds: Math.round((this.#now() - sinceMs) / 1000),
    }));
  }

  /** Takes over a connection of purpose "join". Never rejects; resolves when the request waits or is turned away. */
  async add(channel: Channel, peer: Peer): Promise<void> {
    if (!this.#mayAsk()) {
      decline(channel, "too many nodes ask to join at the moment; try again in a minute");
      return;
    }
    this.#talking++;
    try {
      const { commitment } = await next(channel, Commitment, STEP_LIMIT_MS);
      const nonce = newNonce();
      channel.send({ nonce });
      const answer = await next(channel, Nonce, STEP_LIMIT_MS);
      if (commitmentOf(answer.nonce) !== commitment) {
        decline(channel, "the random number is not the one that was promised");
        return;
      }
      const check = checkHalf({ id: peer.id, nonce: answer.nonce }, { id: this.#options.ownId, nonce });
      this.#wait({ check, channel, peer, from: channel.socket.remoteAddress ?? "?", sinceMs: this.#now() });
    } catch (thrown) {
      decline(channel, asCaravanError(thrown).message);
    } finally {
      this.#talking--;
    }
  }

  #wait(request: Waiting): void {
    this.#waiting.add(request);
    const timer = setTimeout(
      () => decline(request.channel, "nobody approved the code in time"),
      this.#options.limitMs ?? JOIN_LIMIT_MS,
    );
    request.channel.closed.then(() => {
      clearTimeout(timer);
      this.#waiting.delete(request);
    });
  }

  /** Turns every request away: the node stops or leaves its cluster. */
  close(): void {
    for (const { channel } of this.#waiting) decline(channel, "this node is no longer in the cluster");
  }

  /** Whether a request that waits here has the code's first half. */
  has(code: string): boolean {
    const { check } = parseCode(code);
    return [...this.#waiting].some((request) => request.check === check);
  }

  /** Lets the node with this code in and says which it is. Rejects with permission_denied when no such request waits. */
  async accept(code: string): Promise<KnownNode> {
    const { check, secret } = parseCode(code);
    const found = [...this.#waiting].filter((request) => request.check === check);
    const [request] = found;
    if (request === undefined || found.length > 1) {
      throw new CaravanError("permission_denied", "no node waits with this code", {
        hint: "Compare it with what `caravan join` shows on the new node; a code is good for ten minutes and one try.",
      });
    }
    const { channel, peer } = request;
    this.#waiting.delete(request);
    const session = sessionKey(channel.socket);
    channel.send({ proof: codeProof(secret, session, "member") });
    try {
      const { proof } = await next(channel, Proof, STEP_LIMIT_MS);
      if (!sameMac(proof, codeProof(secret, session, "joiner")))
        throw new CaravanError("permission_denied", "the new node does not know its own code");
      channel.send({ credentials: this.#options.credentials() });
      channel.finish();
    } catch (thrown) {
      decline(channel, "the exchange failed");
      throw thrown;
    }
    return { id: peer.id, name: peer.name, addresses: [] };
  }

  #now(): number {
    return (this.#options.now ?? (() => performance.now()))();
  }

  #mayAsk(): boolean {
    const now = this.#now();
    const refill = Math.floor((now - this.#refilledMs) / REFILL_MS);
    if (refill > 0) {
      this.#tokens = Math.min(BURST, this.#tokens + refill);
      this.#refilledMs += refill * REFILL_MS;
    }
    if (this.#tokens === 0 || this.#waiting.size + this.#talking >= MAX_WAITING) return false;
    this.#tokens--;
    return true;
  }
}
