// Tries which RDMA device of this node reaches which of another one: for each likely pair both nodes start a process that is one of two
// ranks, connect them over these devices, and measure. A process, because the system's library may hang. The node with the lower
// id leads, on a connection of purpose "rdma":
//
//   leader                              other node
//   try: devices, session key     →
//                                 ←     address, or failed with the reason
//   connect: both addresses       →
//                                 ←     measured, or failed with the reason
//   … further tries …
//   done: which pair it is, if any

import { randomBytes } from "node:crypto";
import * as v from "valibot";
import { queuePairs } from "../../engine/local-ranks.ts";
import { within } from "../../engine/patience.ts";
import { RankProcess } from "../../engine/rank-process.ts";
import {
  addressBytes,
  addressText,
  type GroupOptions,
  type LinkMeasure,
} from "../../engine/rank-protocol.ts";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { DevicePair } from "../rdma-candidates.ts";
import type { Channel } from "./channel.ts";
import { groupHost } from "./group-host.ts";

/** Of connecting; the library itself gets 4 s of it, a first heartbeat 2 s. */
const CONNECT_MS = 8000;
/** How long bursts are sent. */
const MEASURE_MS = 200;
/** A process's start on a busy machine, or connecting and measuring; then it is killed. */
const TRY_LIMIT_MS = 25_000;
/** For a process that is told to go; it takes its queue pairs down, which a killed one would leave behind. One that hangs in the kernel stays. */
const LEAVE_LIMIT_MS = 3000;

const device = v.pipe(v.string(), v.minLength(1), v.maxLength(60));
const address = v.pipe(v.string(), v.base64(), v.maxLength(8192));
const reason = v.pipe(v.string(), v.maxLength(1000));
const amount = v.pipe(v.number(), v.finite(), v.minValue(0));
const hex = (bytes: number) => v.pipe(v.string(), v.regex(new RegExp(`^[0-9a-f]{${2 * bytes}}$`)));

const measured = { round_trip_us: amount, bandwidth: amount };

const LeaderFrameSchema = v.variant("type", [
  v.object({ type: v.literal("try"), own: device, theirs: device, key: hex(32), instance: hex(16) }),
  v.object({ type: v.literal("connect"), address }),
  /** Devices from the leader's view; null: no pair works. */
  v.object({
    type: v.literal("done"),
    pair: v.nullable(v.tuple([device, device])),
    ...measured,
    reason,
  }),
]);
type LeaderFrame = v.InferOutput<typeof LeaderFrameSchema>;

const AnswerFrameSchema = v.variant("type", [
  v.object({ type: v.literal("address"), address }),
  v.object({ type: v.literal("measured"), ...measured }),
  /** late: it was time that ran out. */
  v.object({ type: v.literal("failed"), reason, late: v.exactOptional(v.boolean()) }),
]);
type AnswerFrame = v.InferOutput<typeof AnswerFrameSchema>;

/** Why a try came to nothing. late: time ran out, as on a machine that is busy, so it says little about the cable. */
export interface TrialFailure {
  reason: string;
  late: boolean;
}

/** Devices from this node's view. */
export type TrialResult = { pair: DevicePair; measure: LinkMeasure } | ({ pair: undefined } & TrialFailure);

/** What a trial needs of a connection. */
export type TrialChannel = Pick<Channel, "send" | "readJson" | "finish" | "close"> & {
  socket: Pick<Channel["socket"], "localAddress">;
};

export interface TrialOptions {
  channel: TrialChannel;
  /** Command line of a rank process; replaced in tests. */
  command?: readonly string[];
}

/** Leads: tries the pairs in order until one works. Rejects when the connection or this node's own processes fail. */
export async function leadTrials(
  { channel, command }: TrialOptions,
  pairs: readonly DevicePair[],
): Promise<TrialResult> {
  let why = "neither node has a device with a cable in it";
  let late = false;
  for (const pair of pairs) {
    const [own, theirs] = pair;
    const key = randomBytes(32).toString("hex");
    const instance = randomBytes(16).toString("hex");
    say(channel, { type: "try", own, theirs, key, instance });
    const outcome = await leadOne(channel, rankOptions(channel, 0, own, key, instance), command);
    if ("reason" in outcome) {
      why = outcome.reason;
      late ||= outcome.late;
      continue;
    }
    say(channel, {
      type: "done",
      pair: [own, theirs],
      round_trip_us: outcome.roundTripUs,
      bandwidth: outcome.bandwidth,
      reason: "",
    });
    return { pair, measure: outcome };
  }
  say(channel, { type: "done", pair: null, round_trip_us: 0, bandwidth: 0, reason: why.slice(0, 1000) });
  return { pair: undefined, reason: why, late };
}

async function leadOne(
  channel: TrialChannel,
  group: GroupOptions,
  command: readonly string[] | undefined,
): Promise<LinkMeasure | TrialFailure> {
  const rank = startRank(group, command);
  try {
    const [own, answer] = await Promise.all([settle(rank.address), readAnswer(channel)]);
    if (answer.type !== "address") return failureOf(answer);
    if ("reason" in own) {
      // The other side waits for the connection that does not come; it hears of it with the next try.
      return own;
    }
    say(channel, { type: "connect", address: addressText(own.value) });
    const [mine, theirs] = await Promise.all([
      settle(connectAndMeasure(rank, [own.value, addressBytes(answer.address)])),
      readAnswer(channel),
    ]);
    if ("reason" in mine) return mine;
    return theirs.type === "measured" ? mine.value : failureOf(theirs);
  } finally {
    await end(rank);
  }
}

/** The other side: answers tries until the leader is done. `allowed`: this node's devices that may be used. Rejects when the
 * connection fails or makes no sense. */
export async function answerTrials(
  { channel, command }: TrialOptions,
  allowed: (device: string) => boolean,
): Promise<TrialResult> {
  let rank: RankProcess | undefined;
  try {
    for (;;) {
      const frame = v.parse(LeaderFrameSchema, await channel.readJson(2 * TRY_LIMIT_MS));
      if (frame.type === "done") {
        // Who leads decides when it is tried again.
        if (frame.pair === null) return { pair: undefined, reason: frame.reason, late: false };
        const { round_trip_us: roundTripUs, bandwidth } = frame;
        return { pair: [frame.pair[1], frame.pair[0]], measure: { roundTripUs, bandwidth } };
      }
      if (frame.type === "try") {
        if (rank !== undefined) await end(rank);
        rank = undefined;
        const { theirs: own, key, instance } = frame;
        if (!allowed(own)) {
          say(channel, { type: "failed", reason: `${own} is no device that may be used` });
          continue;
        }
        rank = startRank(rankOptions(channel, 1, own, key, instance), command);
        const found = await settle(rank.address);
        say(
          channel,
          "reason" in found
            ? { type: "failed", ...found }
            : { type: "address", address: addressText(found.value) },
        );
        continue;
      }
      if (rank === undefined) throw new CaravanError("cluster_degraded", "a connection without a try");
      const found = await settle(connectAndMeasure(rank, [addressBytes(frame.address), await rank.address]));
      if ("reason" in found) say(channel, { type: "failed", ...found });
      else
        say(channel, {
          type: "measured",
          round_trip_us: found.value.roundTripUs,
          bandwidth: found.value.bandwidth,
        });
    }
  } finally {
    if (rank !== undefined) await end(rank);
    channel.finish();
  }
}

function rankOptions(
  channel: TrialChannel,
  rank: number,
  rdmaDevice: string,
  key: string,
  instance: string,
): GroupOptions {
  return {
    ...{ rank, size: 2, transport: "rdma", epoch: 1, key, instance, rdmaDevice },
    host: groupHost(channel.socket),
    ...queuePairs(process.env.CARAVAN_RDMA_QUEUE_PAIRS),
  };
}

function startRank(group: GroupOptions, command: readonly string[] | undefined): RankProcess {
  return new RankProcess({
    group,
    // What goes wrong is in the reason.
    onLog: () => undefined,
    ...(command === undefined ? {} : { command }),
  });
}

async function connectAndMeasure(rank: RankProcess, addresses: readonly Uint8Array[]): Promise<LinkMeasure> {
  await rank.connect(addresses, CONNECT_MS);
  return await rank.measure(MEASURE_MS);
}

async function end(rank: RankProcess): Promise<void> {
  await within(rank.close(), LEAVE_LIMIT_MS);
}

/** The value in time, or why not. */
async function settle<T>(promise: Promise<T>): Promise<{ value: T } | TrialFailure> {
  try {
    const value = await within(
      promise.then((value) => ({ value })),
      TRY_LIMIT_MS,
    );
    return value ?? { reason: `no answer within ${TRY_LIMIT_MS / 1000} s: a port may be wedged`, late: true };
  } catch (thrown) {
    const { message, code } = asCaravanError(thrown);
    return { reason: message, late: code === "deadline_exceeded" };
  }
}

async function readAnswer(channel: TrialChannel): Promise<AnswerFrame> {
  return v.parse(AnswerFrameSchema, await channel.readJson(2 * TRY_LIMIT_MS));
}

function failureOf(answer: AnswerFrame): TrialFailure {
  return answer.type === "failed"
    ? { reason: answer.reason, late: answer.late === true }
    : { reason: "the other node does not keep to the rules", late: false };
}

function say(channel: TrialChannel, frame: LeaderFrame | AnswerFrame): void {
  channel.send(frame);
}
