// The node's TLS port: takes connections, lets members (and people who ask to join) through the hello, and counts
// everything that it turns away. Strangers cost it a bounded number of sockets for a few seconds.

import type { Server as NetServer, Socket } from "node:net";
import { createServer, type TLSSocket } from "node:tls";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import { Channel } from "./channel.ts";
import { calleeHello, HELLO_LIMIT_MS, type HelloSettings, type Peer, type Purpose } from "./hello.ts";
import type { Identity } from "./identity.ts";

/** Connections that have not proved membership, at one time. */
const MAX_STRANGERS = 32;
/** All connections; forwarded calls are one each. */
const MAX_CONNECTIONS = 2048;

export interface ListenerCounters {
  accepted: number;
  /** Connections turned away, by reason. */
  tooMany: number;
  noTls: number;
  refused: number;
  malformed: number;
}

export interface ListenerOptions {
  identity: Identity;
  /** Read anew for every connection: name and secret may change. */
  settings: () => HelloSettings;
  host: string;
  /** 0 = any free one. */
  port: number;
  log: Logger;
  /** Owns the channel from now on. */
  onPeer: (channel: Channel, peer: Peer, purpose: Purpose) => void;
}

export interface Listener {
  readonly port: number;
  readonly counters: Readonly<ListenerCounters>;
  close(): Promise<void>;
}

/** Rejects with invalid_argument when the port cannot be had. */
export async function listen(options: ListenerOptions): Promise<Listener> {
  const { log } = options;
  const counters: ListenerCounters = { accepted: 0, tooMany: 0, noTls: 0, refused: 0, malformed: 0 };
  const all = new Set<Socket>();
  const strangers = new Set<Socket>();

  const server = createServer({
    cert: options.identity.certificate,
    key: options.identity.privateKey,
    minVersion: "TLSv1.3",
    requestCert: true,
    // Certificates are self-signed; the hello checks whose they are.
    rejectUnauthorized: false,
  });
  server.on("connection", (socket: Socket) => {
    if (all.size >= MAX_CONNECTIONS || strangers.size >= MAX_STRANGERS) {
      counters.tooMany++;
      socket.destroy();
      return;
    }
    all.add(socket);
    strangers.add(socket);
    // The TLS handshake has no limit of its own.
    const timer = setTimeout(() => {
      if (!strangers.has(socket)) return;
      counters.noTls++;
      socket.destroy();
    }, 2 * HELLO_LIMIT_MS);
    socket.on("error", () => socket.destroy());
    socket.on("close", () => {
      clearTimeout(timer);
      all.delete(socket);
      strangers.delete(socket);
    });
  });
  server.on("tlsClientError", (error: Error, socket: TLSSocket) => {
    counters.noTls++;
    log.debug("a connection to the cluster port is not TLS 1.3", { reason: error.message });
    socket.destroy();
  });
  server.on("secureConnection", (socket: TLSSocket) => {
    const channel = new Channel(socket, {
      onMalformed: (reason) => {
        counters.malformed++;
        log.warn("dropped a cluster connection", { from: socket.remoteAddress, reason });
      },
    });
    calleeHello(channel, options.settings()).then(
      ({ peer, purpose }) => {
        strangers.delete(socket);
        counters.accepted++;
        options.onPeer(channel, peer, purpose);
      },
      (thrown) => {
        counters.refused++;
        log.info("refused a cluster connection", {
          from: socket.remoteAddress,
          reason: asCaravanError(thrown).message,
        });
      },
    );
  });

  await bind(server, options);
  const address = server.address();
  return {
    port: typeof address === "object" && address !== null ? address.port : options.port,
    counters,
    close: () => {
      const closed = new Promise<void>((resolve) => server.close(() => resolve()));
      for (const socket of all) socket.destroy();
      return closed;
    },
  };
}

function bind(server: NetServer, { host, port }: ListenerOptions): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", (cause: Error & { code?: string }) => {
      const taken = cause.code === "EADDRINUSE";
      reject(
        new CaravanError(
          "invalid_argument",
          taken ? `Port ${port} is already in use by another program.` : `cannot listen: ${cause.message}`,
          {
            where: `${host}:${port}`,
            param: "--cluster-port",
            hint: "Choose another with `--cluster-port`.",
            cause,
          },
        ),
      );
    });
    server.listen({ host, port }, () => resolve());
  });
}
