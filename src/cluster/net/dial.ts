// Opens a connection to another node: TCP, TLS 1.3, hello, each within its limit.

import { isIP } from "node:net";
import { connect } from "node:tls";
import { CaravanError } from "../../errors.ts";
import type { NodeId } from "../types.ts";
import { Channel } from "./channel.ts";
import { callerHello, type HelloSettings, type Peer, type Purpose } from "./hello.ts";
import type { Identity } from "./identity.ts";

export interface DialOptions {
  identity: Identity;
  settings: HelloSettings;
  /** host:port; IPv6 in brackets, with a zone (`%eth0`) where it is link-local. */
  address: string;
  purpose: Purpose;
  /** The node that must answer there: its key is pinned. */
  expected?: NodeId;
  /** For TCP and TLS together. */
  limitMs?: number;
  signal?: AbortSignal;
}

const CONNECT_LIMIT_MS = 3000;

/** Splits host:port. Throws invalid_argument. */
export function splitAddress(address: string): { host: string; port: number } {
  const match = /^(?:\[([^\]]+)\]|([^:\s]+)):(\d{1,5})$/.exec(address);
  const port = Number(match?.[3]);
  const host = match?.[1] ?? match?.[2];
  if (host === undefined || port < 1 || port > 65535) {
    throw new CaravanError("invalid_argument", "this is not an address of the form HOST:PORT", {
      where: address,
    });
  }
  return { host, port };
}

export function joinAddress(host: string, port: number): string {
  return isIP(host.replace(/%.*$/, "")) === 6 ? `[${host}]:${port}` : `${host}:${port}`;
}

/** Rejects with why there is no connection; nothing is left open then. */
export async function dial(options: DialOptions): Promise<{ channel: Channel; peer: Peer }> {
  const channel = new Channel(await connected(options));
  const stop = () => channel.close();
  options.signal?.addEventListener("abort", stop, { once: true });
  try {
    const peer = await callerHello(channel, options.settings, options.purpose, options.expected);
    return { channel, peer };
  } finally {
    options.signal?.removeEventListener("abort", stop);
  }
}

function connected(options: DialOptions) {
  const { host, port } = splitAddress(options.address);
  const { identity, limitMs = CONNECT_LIMIT_MS, signal } = options;
  return new Promise<ReturnType<typeof connect>>((resolve, reject) => {
    const socket = connect({
      host,
      port,
      cert: identity.certificate,
      key: identity.privateKey,
      minVersion: "TLSv1.3",
      rejectUnauthorized: false,
    });
    const fail = (reason: string) => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", aborted);
      socket.destroy();
      reject(
        new CaravanError("cluster_degraded", `cannot reach the node: ${reason}`, {
          where: options.address,
          retryAfterSeconds: 2,
        }),
      );
    };
    const aborted = () => fail("given up");
    const timer = setTimeout(() => fail(`no answer within ${limitMs} ms`), limitMs);
    signal?.addEventListener("abort", aborted, { once: true });
    socket.on("error", (error) => fail(error.message));
    socket.once("close", () => fail("the connection was closed"));
    socket.once("secureConnect", () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", aborted);
      socket.removeAllListeners("close");
      socket.removeAllListeners("error");
      resolve(socket);
    });
  });
}
