// What two members of one cluster say to each other when one of them has missed a change of its secret: all that they know of it.
// On a connection of purpose "control", after a hello that proved a secret which both have (hello.ts).

import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import type { Channel } from "./channel.ts";
import { type ClusterCredentials, CredentialsSchema } from "./cluster-file.ts";

const LIMIT_MS = 5000;
const Frame = v.object({ credentials: CredentialsSchema });

/** Sends this node's and resolves with the other's. The connection is over then. Rejects with permission_denied where the other
 * side does not keep to this. */
export async function exchangeCredentials(
  channel: Channel,
  own: ClusterCredentials,
): Promise<ClusterCredentials> {
  try {
    channel.send({ credentials: own });
    const parsed = v.safeParse(Frame, await channel.readJson(LIMIT_MS));
    if (parsed.success) return parsed.output.credentials;
    throw new CaravanError("permission_denied", "the other node does not say what it knows of the cluster");
  } finally {
    channel.finish();
  }
}
