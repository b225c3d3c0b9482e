// The API's settings and their defaults. The config reader and the command line fill them in; nothing here reads
// the environment or a file.

export interface ApiSettings {
  /** Address that the server binds to. A loopback address turns the Host check on. */
  host: string;
  /** Keys that may generate. Without these and adminKeys no key is asked for. */
  apiKeys: readonly string[];
  /** Keys that may do everything, administration too. */
  adminKeys: readonly string[];
  /** Served with TLS: cookies then are for TLS only. */
  secure: boolean;
  /** Origins that browsers may call from besides the server's own; "*" for all. */
  corsOrigins: readonly string[];
  /** Further names that a Host header may carry, without port. For a bind that is not loopback: empty = any. */
  allowedHosts: readonly string[];
  maxBodyBytes: number;
  /** Of all bodies together, those of running requests included; one of maxBodyBytes always fits. */
  maxTotalBodyBytes: number;
  /** A request whose body takes longer than this to arrive is refused. */
  bodyTimeoutMs: number;
  /** Generation requests at one time, waiting ones included; the next gets 429. */
  maxConcurrentRequests: number;
  /** Silence on a stream after which a comment line is sent. */
  keepAliveMs: number;
  /** A stream whose reader takes nothing for this long is given up. */
  stallLimitMs: number;
  /** Longest life of one generation; absent = no limit. */
  deadlineMs?: number;
}

export const DEFAULT_SETTINGS: ApiSettings = {
  host: "127.0.0.1",
  apiKeys: [],
  adminKeys: [],
  secure: false,
  corsOrigins: [],
  allowedHosts: [],
  maxBodyBytes: 32 * 1024 * 1024,
  maxTotalBodyBytes: 256 * 1024 * 1024,
  bodyTimeoutMs: 60_000,
  maxConcurrentRequests: 1024,
  keepAliveMs: 10_000,
  stallLimitMs: 300_000,
};
