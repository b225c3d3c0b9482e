// The address under which the other ranks of an instance reach this machine.

import type { TLSSocket } from "node:tls";
import { localAddresses } from "./node-info.ts";

/** The local end of a connection between two of the nodes. A link-local IPv6 address means nothing without this machine's own
 * name of the interface, so another address of the machine stands in for it where there is one. */
export function groupHost(socket: Pick<TLSSocket, "localAddress">): string {
  const local = (socket.localAddress ?? "127.0.0.1").replace(/^::ffff:/, "");
  if (!local.startsWith("fe80:")) return local;
  return localAddresses().find((address) => !address.includes(":")) ?? localAddresses()[0] ?? local;
}
