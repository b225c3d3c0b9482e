// The standing connection to one other node: heartbeats that find a dead or stopped peer within its limit, round-trip
// times, messages of the membership, and calls with answers. It lives as long as one TLS connection; mesh.ts makes the
// next one.

import * as v from "valibot";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { Channel } from "./channel.ts";
import type { Peer } from "./hello.ts";

const BEAT_MS = 250;
/** A peer that has sent nothing for so long is taken for dead: the design's limit for an idle one is 2 s. */
const SILENCE_MS = 1500;
/** Round trips that the median is taken of. */
const SAMPLES = 15;
/** Calls of a peer that are worked on at one time. */
const MAX_CALLS = 64;
/** What a peer that reads nothing may make this node keep. */
const MAX_UNSENT_BYTES = 8 * 1024 * 1024;

const id = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const MessageSchema = v.variant("t", [
  v.object({ t: v.literal("beat"), at: v.number() }),
  v.object({ t: v.literal("echo"), at: v.number() }),
  v.object({ t: v.literal("say"), body: v.unknown() }),
  v.object({ t: v.literal("call"), id, method: v.pipe(v.string(), v.maxLength(64)), params: v.unknown() }),
  v.object({ t: v.literal("answer"), id, value: v.unknown() }),
  v.object({ t: v.literal("failure"), id, error: v.record(v.string(), v.unknown()) }),
  /** reason: why the peer does not want this link; without one it goes itself. */
  v.object({ t: v.literal("bye"), reason: v.exactOptional(v.pipe(v.string(), v.maxLength(500))) }),
]);
type Message = v.InferInput<typeof MessageSchema>;

/** Ends a connection that never became a link, and tells the peer why. */
export function decline(channel: Channel, reason: string): void {
  const bye: Message = { t: "bye", reason };
  channel.send(bye);
  channel.finish();
}

export interface LinkOptions {
  channel: Channel;
  peer: Peer;
  /** Whether this node dialled. */
  dialled: boolean;
  /** A message of `say`. What it throws ends the connection: the peer sends what makes no sense. */
  onSay: (body: unknown) => void;
  /** A call of the peer; what it rejects with goes back. */
  onCall: (method: string, params: unknown) => Promise<unknown>;
  silenceMs?: number;
}

export class Link {
  readonly peer: Peer;
  readonly dialled: boolean;
  readonly channel: Channel;
  readonly sinceMs = performance.now();
  /** Resolves when the link is over, with why. */
  readonly ended: Promise<CaravanError>;
  readonly #options: LinkOptions;
  readonly #calls = new Map<
    number,
    { resolve: (value: unknown) => void; reject: (error: CaravanError) => void }
  >();
  readonly #roundTripsMs: number[] = [];
  #nextCall = 1;
  #serving = 0;
  #heardMs = performance.now();
  #byPeer = false;

  constructor(options: LinkOptions) {
    this.#options = options;
    this.channel = options.channel;
    this.peer = options.peer;
    this.dialled = options.dialled;
    this.ended = this.channel.closed;
    this.#beat();
    void this.#read();
    this.ended.then((why) => {
      for (const { reject } of this.#calls.values()) reject(why);
      this.#calls.clear();
    });
  }

  /** The peer said that it goes, so its end is no failure. */
  get saidGoodbye(): boolean {
    return this.#byPeer;
  }

  /** Median round trip in microseconds; undefined before the first. */
  get roundTripUs(): number | undefined {
    const sorted = this.#roundTripsMs.toSorted((a, b) => a - b);
    const median = sorted[Math.floor(sorted.length / 2)];
    return median === undefined ? undefined : Math.round(median * 1000);
  }

  say(body: unknown): void {
    this.#send({ t: "say", body });
  }

  /** Asks the peer. Rejects with its error, after `limitMs` with deadline_exceeded, or when the link ends. */
  call(method: string, params: unknown, limitMs: number): Promise<unknown> {
    if (!this.channel.open) return this.ended.then((why) => Promise.reject(why));
    const number = this.#nextCall++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#calls.delete(number);
        reject(
          new CaravanError("deadline_exceeded", `${this.peer.name} did not answer within ${limitMs} ms`, {
            where: method,
          }),
        );
      }, limitMs);
      this.#calls.set(number, {
        resolve: (value) => {
          clearTimeout(timer);
          resolve(value);
        },
        reject: (error) => {
          clearTimeout(timer);
          reject(error);
        },
      });
      this.#send({ t: "call", id: number, method, params });
    });
  }

  /** Ends the link in order: the peer knows at once that this node goes. */
  goodbye(): void {
    this.#send({ t: "bye" });
    this.channel.finish();
  }

  /** Ends the link and tells the peer why it is not wanted. */
  dismiss(reason: string): void {
    decline(this.channel, reason);
  }

  close(why: CaravanError): void {
    this.channel.close(why);
  }

  #send(message: Message): void {
    if (this.channel.unsentBytes > MAX_UNSENT_BYTES) {
      this.close(new CaravanError("cluster_degraded", `${this.peer.name} reads nothing`));
      return;
    }
    this.channel.send(message);
  }

  /** Sends a beat and looks at the silence, until the link ends. */
  #beat(): void {
    const limit = this.#options.silenceMs ?? SILENCE_MS;
    let last = performance.now();
    const timer = setInterval(() => {
      const now = performance.now();
      // This process was stopped itself, or a laptop slept: for the peer no time has passed.
      if (now - last > 3 * BEAT_MS) this.#heardMs = now;
      last = now;
      if (now - this.#heardMs > limit) {
        this.close(
          new CaravanError("cluster_degraded", `${this.peer.name} has said nothing for ${limit} ms`, {
            retryAfterSeconds: 2,
          }),
        );
        return;
      }
      this.#send({ t: "beat", at: now });
    }, BEAT_MS);
    this.#send({ t: "beat", at: performance.now() });
    this.ended.then(() => clearInterval(timer));
  }

  async #read(): Promise<void> {
    try {
      for (;;) {
        const frame = await this.channel.read();
        if (frame === undefined) return;
        this.#heardMs = performance.now();
        const parsed = v.safeParse(MessageSchema, frame.kind === "json" ? frame.value : undefined);
        if (!parsed.success) throw new CaravanError("cluster_degraded", "a message that makes no sense");
        this.#receive(parsed.output);
      }
    } catch (thrown) {
      const error = asCaravanError(thrown);
      this.close(new CaravanError("cluster_degraded", `link with ${this.peer.name}: ${error.message}`));
    }
  }

  #receive(message: v.InferOutput<typeof MessageSchema>): void {
    switch (message.t) {
      case "beat":
        this.#send({ t: "echo", at: message.at });
        return;
      case "echo": {
        const ms = performance.now() - message.at;
        // The value comes from the peer: only what can be true counts.
        if (!(ms >= 0 && ms < 60_000)) return;
        this.#roundTripsMs.push(ms);
        if (this.#roundTripsMs.length > SAMPLES) this.#roundTripsMs.shift();
        return;
      }
      case "say":
        this.#options.onSay(message.body);
        return;
      case "call":
        void this.#serve(message.id, message.method, message.params);
        return;
      case "answer":
        this.#calls.get(message.id)?.resolve(message.value);
        this.#calls.delete(message.id);
        return;
      case "failure":
        this.#calls.get(message.id)?.reject(CaravanError.fromJSON(message.error));
        this.#calls.delete(message.id);
        return;
      case "bye":
        if (message.reason !== undefined) {
          this.close(new CaravanError("permission_denied", message.reason));
          return;
        }
        this.#byPeer = true;
        this.channel.finish();
        return;
    }
  }

  async #serve(number: number, method: string, params: unknown): Promise<void> {
    if (this.#serving >= MAX_CALLS) {
      const busy = new CaravanError("queue_full", "too many calls at one time", { retryAfterSeconds: 1 });
      this.#send({ t: "failure", id: number, error: busy.toJSON() });
      return;
    }
    this.#serving++;
    try {
      const value = await this.#options.onCall(method, params);
      this.#send({ t: "answer", id: number, value: value ?? null });
    } catch (thrown) {
      this.#send({ t: "failure", id: number, error: asCaravanError(thrown).toJSON() });
    } finally {
      this.#serving--;
    }
  }
}
