// Sockets that say when the system had their bytes (Linux, through bun:ffi): the moment of the sender's write on loopback, whenever
// the reader comes to read them. One blocking loop over all of them, for a process that does nothing else.

import { dlopen, ptr } from "bun:ffi";

export interface TimedBytes {
  /** Index of the socket. */
  socket: number;
  text: string;
  /** Microseconds since 1970 at which the system took the last of the bytes, and at which they were read. */
  sentUs: number;
  readUs: number;
}

const AF_INET = 2;
const SOCK_STREAM = 1;
const SOL_SOCKET = 1;
const SO_TIMESTAMPNS = 35;
const POLLIN = 1;

function libc() {
  return dlopen("libc.so.6", {
    socket: { args: ["i32", "i32", "i32"], returns: "i32" },
    connect: { args: ["i32", "ptr", "u32"], returns: "i32" },
    setsockopt: { args: ["i32", "i32", "i32", "ptr", "u32"], returns: "i32" },
    send: { args: ["i32", "ptr", "u64", "i32"], returns: "i64" },
    poll: { args: ["ptr", "u64", "i32"], returns: "i32" },
    recvmsg: { args: ["i32", "ptr", "i32"], returns: "i64" },
    close: { args: ["i32"], returns: "i32" },
    clock_gettime: { args: ["i32", "ptr"], returns: "i32" },
  }).symbols;
}

/** Sends `request` on `count` connections to 127.0.0.1 and hands out what comes back, until all have ended. Throws when a call fails. */
export function readTimed(
  port: number,
  count: number,
  request: string,
  take: (bytes: TimedBytes) => void,
): void {
  const c = libc();
  const must = (what: string, result: number | bigint): number => {
    if (result < 0) throw new Error(`${what} failed`);
    return Number(result);
  };
  const address = new Uint8Array([AF_INET, 0, port >> 8, port & 255, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
  const bytes = new TextEncoder().encode(request);
  const on = new Int32Array([1]);
  const polled = new DataView(new ArrayBuffer(8 * count));
  for (let i = 0; i < count; i += 1) {
    const fd = must("socket", c.socket(AF_INET, SOCK_STREAM, 0));
    must("setsockopt", c.setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, ptr(on), 4));
    must("connect", c.connect(fd, ptr(address), address.length));
    must("send", c.send(fd, ptr(bytes), bytes.length, 0));
    polled.setInt32(8 * i, fd, true);
    polled.setInt16(8 * i + 4, POLLIN, true);
  }
  const data = new Uint8Array(1 << 16);
  const control = new DataView(new ArrayBuffer(128));
  const part = new BigUint64Array([BigInt(ptr(data)), BigInt(data.length)]);
  // struct msghdr: name, its length, parts and their number, control bytes and their number, flags.
  const message = new BigUint64Array(7);
  const time = new DataView(new ArrayBuffer(16));
  const microseconds = (view: DataView, at: number) =>
    Number(view.getBigInt64(at, true)) * 1e6 + Number(view.getBigInt64(at + 8, true)) / 1000;
  for (let open = count; open > 0; ) {
    must("poll", c.poll(ptr(polled), BigInt(count), -1));
    for (let i = 0; i < count; i += 1) {
      const fd = polled.getInt32(8 * i, true);
      if (fd < 0 || polled.getInt16(8 * i + 6, true) === 0) continue;
      message.set([0n, 0n, BigInt(ptr(part)), 1n, BigInt(ptr(control)), BigInt(control.byteLength), 0n]);
      const got = must("recvmsg", c.recvmsg(fd, ptr(message), 0));
      if (got === 0) {
        c.close(fd);
        polled.setInt32(8 * i, -1, true);
        open -= 1;
        continue;
      }
      c.clock_gettime(0, ptr(time));
      // struct cmsghdr (16 bytes), then a timespec.
      const stamped = (message[5] ?? 0n) >= 32n && control.getInt32(12, true) === SO_TIMESTAMPNS;
      take({
        socket: i,
        text: new TextDecoder().decode(data.subarray(0, got)),
        sentUs: stamped ? microseconds(control, 16) : Number.NaN,
        readUs: microseconds(time, 0),
      });
    }
  }
}
