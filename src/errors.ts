// The one error class. Every failure that reaches a person or a client is a CaravanError:
// what happened, where, and what to do next; the API turns it into JSON, the terminal into text.

/** Error codes that clients can act on; the HTTP status follows from the code (api.md section 3). */
export type ErrorCode =
  | "invalid_argument"
  | "invalid_json"
  | "unsupported_parameter"
  | "context_length_exceeded"
  | "request_too_large"
  | "invalid_api_key"
  | "permission_denied"
  | "model_not_found"
  | "unknown_url"
  | "request_not_found"
  | "method_not_allowed"
  | "queue_full"
  | "model_loading"
  | "shutting_down"
  | "cluster_degraded"
  | "deadline_exceeded"
  | "cancelled"
  | "engine_failed"
  | "out_of_memory"
  | "bad_file"
  | "bad_card"
  | "unsupported_model"
  | "download_failed"
  | "disk_full"
  | "not_built_yet"
  | "internal_error";

const STATUS: Record<ErrorCode, number> = {
  invalid_argument: 400,
  invalid_json: 400,
  unsupported_parameter: 400,
  context_length_exceeded: 400,
  request_too_large: 413,
  invalid_api_key: 401,
  permission_denied: 403,
  model_not_found: 404,
  unknown_url: 404,
  request_not_found: 404,
  method_not_allowed: 405,
  queue_full: 429,
  model_loading: 503,
  shutting_down: 503,
  cluster_degraded: 503,
  deadline_exceeded: 503,
  cancelled: 499,
  engine_failed: 503,
  out_of_memory: 503,
  bad_file: 500,
  bad_card: 500,
  unsupported_model: 400,
  download_failed: 502,
  disk_full: 507,
  not_built_yet: 501,
  internal_error: 500,
};

export interface CaravanErrorOptions {
  /** File, model, URL or parameter that the failure is about. */
  where?: string;
  /** What the reader can do next, as a sentence or a command. */
  hint?: string;
  /** Request parameter at fault (OpenAI's `param`). */
  param?: string;
  /** Seconds after which a retry makes sense (`Retry-After`). */
  retryAfterSeconds?: number;
  cause?: unknown;
}

export class CaravanError extends Error {
  readonly code: ErrorCode;
  readonly where: string | undefined;
  readonly hint: string | undefined;
  readonly param: string | undefined;
  readonly retryAfterSeconds: number | undefined;

  constructor(code: ErrorCode, message: string, options: CaravanErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = "CaravanError";
    this.code = code;
    this.where = options.where;
    this.hint = options.hint;
    this.param = options.param;
    this.retryAfterSeconds = options.retryAfterSeconds;
  }

  /** HTTP status that the code maps to. */
  get status(): number {
    return STATUS[this.code];
  }

  /** One to three lines for a terminal. */
  toText(): string {
    const where = this.where === undefined ? "" : `${this.where}: `;
    return `${where}${this.message}${this.hint === undefined ? "" : `\n  ${this.hint}`}`;
  }

  toJSON(): Record<string, unknown> {
    return {
      code: this.code,
      message: this.message,
      ...(this.where === undefined ? {} : { where: this.where }),
      ...(this.hint === undefined ? {} : { hint: this.hint }),
      ...(this.param === undefined ? {} : { param: this.param }),
      ...(this.retryAfterSeconds === undefined ? {} : { retry_after_seconds: this.retryAfterSeconds }),
    };
  }

  /** Rebuilds an error that crossed a process boundary as JSON. */
  static fromJSON(value: Record<string, unknown>): CaravanError {
    const text = (key: string): string | undefined =>
      typeof value[key] === "string" ? value[key] : undefined;
    const code = text("code");
    const known = code !== undefined && code in STATUS ? (code as ErrorCode) : "internal_error";
    const retry = value.retry_after_seconds;
    return new CaravanError(known, text("message") ?? "unknown error", {
      ...(text("where") === undefined ? {} : { where: text("where") as string }),
      ...(text("hint") === undefined ? {} : { hint: text("hint") as string }),
      ...(text("param") === undefined ? {} : { param: text("param") as string }),
      ...(typeof retry === "number" ? { retryAfterSeconds: retry } : {}),
    });
  }
}

/** Wraps anything thrown as a CaravanError, keeping one that already is. */
export function asCaravanError(thrown: unknown): CaravanError {
  if (thrown instanceof CaravanError) return thrown;
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  return new CaravanError("internal_error", message, { cause: thrown });
}
