// What the API needs of the program's logger.

export interface Log {
  info(message: string, fields?: Record<string, unknown>): void;
  warn(message: string, fields?: Record<string, unknown>): void;
  error(message: string, fields?: Record<string, unknown>): void;
}

/** Says nothing; for tests and for embedding. */
export const SILENT: Log = { info: () => undefined, warn: () => undefined, error: () => undefined };
