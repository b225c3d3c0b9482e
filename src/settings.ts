// The one configuration reader: command-line flags over CARAVAN_* variables over one TOML file over the defaults.
// Every value is checked here, once; an unknown key in the file is an error that names its line.

import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";
import { CaravanError } from "./errors.ts";
import { LOG_FORMATS, LOG_LEVELS } from "./log.ts";
import { type Environment, resolvePaths } from "./paths.ts";
import { lineOfKey, parseToml } from "./toml.ts";

const port = v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(65535));
const count = (least: number, most: number) =>
  v.pipe(v.number(), v.integer(), v.minValue(least), v.maxValue(most));
const text = v.pipe(v.string(), v.minLength(1));
const key = v.pipe(text, v.regex(/^[\x21-\x7e]+$/, "a key is printable ASCII without spaces"));

/** The fields, by their names in the file. Their variables are CARAVAN_ and the name in capitals. */
const FIELDS = {
  /** Address to listen on. Other than loopback it is reachable from the network. */
  host: text,
  /** 0 lets the system choose. */
  port,
  /** Accepted keys; none: no key is asked for. */
  api_keys: v.array(key),
  /** Keys that may also administer: load, unload, delete and pull models, and join nodes. */
  admin_keys: v.array(key),
  /** PEM files of the certificate (with those above it) and its key; both or neither. */
  tls_cert: text,
  tls_key: text,
  /** Where imported models live. */
  models_dir: text,
  /** Compute threads; 0: as many as the processor has fast cores. */
  threads: count(0, 1024),
  /** Context length in tokens that memory is planned for; 0: the model's own, as memory allows. */
  context: count(0, 16 * 1024 * 1024),
  /** Requests that may wait; one more is refused with 429. */
  max_queue: count(0, 1_000_000),
  /** Longest life of a request in seconds, waiting included; 0: no limit. */
  request_seconds: count(0, 1_000_000),
  /** A model that nobody has used for so many seconds is unloaded; 0: models stay until another needs their memory. */
  keep_alive_seconds: count(0, 10_000_000),
  /** How long running requests may go on when the node is told to stop. */
  drain_seconds: count(0, 86_400),
  max_body_bytes: count(1024, 999_999_999),
  /** Most bytes that the bodies of all requests may hold together. */
  max_total_body_bytes: count(1024, 999_999_999_999),
  /** Origins that browsers may call from besides the node's own; "*" for all. */
  cors_origins: v.array(text),
  /** Further names that a Host header may carry. */
  allowed_hosts: v.array(text),
  /** Port of the control plane between the nodes of a cluster, and of its beacons; used only in a cluster. 0: any. */
  cluster_port: port,
  /** Address that it listens on; "": all. */
  cluster_host: v.string(),
  /** HOST:PORT of nodes that multicast does not reach. */
  peers: v.array(text),
  /** UDP port of beacons; 0: none are sent or heard. */
  discovery_port: port,
  /** RDMA devices that may be used, with commas between them; "": all, "off": none. */
  rdma: v.pipe(v.string(), v.maxLength(500)),
  /** What other nodes show of this one; "": the machine's name. */
  node_name: v.pipe(v.string(), v.maxLength(100)),
  log_level: v.picklist(LOG_LEVELS),
  log_format: v.picklist(LOG_FORMATS),
} as const;

const FILE_SCHEMA = v.strictObject({
  ...(Object.fromEntries(Object.entries(FIELDS).map(([k, s]) => [k, v.optional(s)])) as {
    [K in keyof typeof FIELDS]: v.OptionalSchema<(typeof FIELDS)[K], undefined>;
  }),
  /** One key, for people who need only one. */
  api_key: v.optional(key),
});

export type Settings = { [K in keyof typeof FIELDS]: v.InferOutput<(typeof FIELDS)[K]> };
export type SettingName = keyof Settings;
export type SettingSource = "flag" | "environment" | "file" | "default";

/** 11711 is none of the ports of Ollama (11434), exo (52415), LM Studio (1234), llama.cpp (8080) or vLLM (8000). */
export const DEFAULT_PORT = 11711;

/** Keys below this length are worth a warning. */
const SHORT_KEY = 16;

/** Of the setting `rdma`: names of devices, none named = all, or "off". */
export function rdmaChoice(setting: string): readonly string[] | "off" {
  if (setting.trim() === "off") return "off";
  return setting
    .split(",")
    .map((name) => name.trim())
    .filter((name) => name !== "");
}

export interface LoadedSettings {
  settings: Settings;
  /** Where each value came from. */
  sources: Record<SettingName, SettingSource>;
  /** The file that was read, if there was one. */
  file: string | undefined;
  /** Things a person should know that stop nothing; for the log. */
  warnings: string[];
}

export interface LoadSettingsOptions {
  /** Values from the command line; undefined ones are as if absent. */
  flags?: { [K in SettingName]?: Settings[K] | undefined };
  env?: Environment;
  /** Reads a file; undefined when there is none. Replaced in tests. */
  read?: (file: string) => string | undefined;
}

const NUMBERS: readonly string[] = [
  "port",
  "threads",
  "context",
  "max_queue",
  "request_seconds",
  "keep_alive_seconds",
  "drain_seconds",
  "max_body_bytes",
  "max_total_body_bytes",
  "cluster_port",
  "discovery_port",
] satisfies SettingName[];
/** Comma-separated in variables. */
const LISTS: readonly string[] = [
  "api_keys",
  "admin_keys",
  "cors_origins",
  "allowed_hosts",
  "peers",
] satisfies SettingName[];
/** Variables that others read: paths.ts, CARAVAN_CONFIG below, the C library (CARAVAN_CPU), and local-ranks.ts for tests. */
const OTHER_VARIABLES = new Set([
  "CARAVAN_CONFIG",
  "CARAVAN_DATA_DIR",
  "CARAVAN_CONFIG_DIR",
  "CARAVAN_CACHE_DIR",
  "CARAVAN_CPU",
  "CARAVAN_RDMA_QUEUE_PAIRS",
]);

function readIfThere(file: string): string | undefined {
  try {
    return readFileSync(file, "utf8");
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? cause.code : undefined;
    if (code === "ENOENT" || code === "ENOTDIR") return undefined;
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new CaravanError("invalid_argument", `cannot read the configuration: ${reason}`, {
      where: file,
      cause,
    });
  }
}

function complaint(name: string, value: unknown, issue: v.BaseIssue<unknown> | undefined): string {
  const secret = /^(api|admin)_key/.test(name);
  const got = secret ? "" : `, not ${JSON.stringify(value)}`;
  const wanted = issue?.expected ?? issue?.message ?? "another value";
  const range = issue?.type === "min_value" || issue?.type === "max_value";
  const kind = issue?.type === "regex" ? issue.message : `must be ${range ? "" : "of the form "}${wanted}`;
  return `${name}: ${kind}${got}`;
}

/** What is wrong with a value of the file, and its line (0 = not found). */
function fileProblem(
  content: string,
  issue: v.BaseIssue<unknown>,
): { name: string; line: number; message: string } {
  const path = issue.path?.map((item) => String(item.key)) ?? [];
  const line = lineOfKey(content, path);
  const name = path.join(".");
  const wrong =
    issue.type === "strict_object" ? `${name} is not a setting` : complaint(name, issue.input, issue);
  return { name, line: line ?? 0, message: `${line === undefined ? "" : `line ${line}: `}${wrong}` };
}

function fromFile(file: string, content: string): Partial<Settings> {
  const table = parseToml(file, content, "invalid_argument");
  const result = v.safeParse(FILE_SCHEMA, table);
  if (!result.success) {
    const problems = result.issues.map((issue) => fileProblem(content, issue));
    problems.sort((one, other) => one.line - other.line);
    throw new CaravanError("invalid_argument", problems.map(({ message }) => message).join("\n  "), {
      where: file,
      hint: `settings are: ${Object.keys(FIELDS).join(", ")}`,
      param: problems[0]?.name ?? "",
    });
  }
  const { api_key, ...values } = result.output;
  if (api_key !== undefined && values.api_keys !== undefined) {
    throw new CaravanError("invalid_argument", "api_key and api_keys are both set", {
      where: file,
      hint: "keep api_keys only",
      param: "api_key",
    });
  }
  const known = Object.entries({ ...values, ...(api_key === undefined ? {} : { api_keys: [api_key] }) });
  return Object.fromEntries(known.filter(([, value]) => value !== undefined));
}

/** Turns a variable's text into the field's type; text that does not fit is left for the schema to refuse. */
function fromText(name: string, value: string): unknown {
  if (NUMBERS.includes(name)) return /^\d{1,12}$/.test(value.trim()) ? Number(value) : value;
  if (LISTS.includes(name))
    return value
      .split(",")
      .map((item) => item.trim())
      .filter((item) => item !== "");
  return value;
}

function fromEnvironment(env: Environment, warnings: string[]): Partial<Settings> {
  const values: Record<string, unknown> = {};
  for (const [variable, value] of Object.entries(env)) {
    if (!variable.startsWith("CARAVAN_") || OTHER_VARIABLES.has(variable)) continue;
    const lower = variable.slice("CARAVAN_".length).toLowerCase();
    const name = lower === "api_key" ? "api_keys" : lower;
    if (!(name in FIELDS)) {
      warnings.push(`${variable} is not a setting of caravan and is ignored`);
      continue;
    }
    // An empty variable is how shells and compose files say "not set".
    if (value === undefined || value === "") continue;
    const parsed = v.safeParse(FIELDS[name as SettingName], fromText(name, value));
    if (!parsed.success) {
      throw new CaravanError("invalid_argument", complaint(name, value, parsed.issues[0]), {
        where: variable,
      });
    }
    values[name] = parsed.output;
  }
  return values;
}

function fromFlags(flags: LoadSettingsOptions["flags"]): Partial<Settings> {
  const values: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(flags ?? {})) {
    if (value === undefined) continue;
    const parsed = v.safeParse(FIELDS[name as SettingName], value);
    if (!parsed.success) {
      const flag = `--${name.replaceAll("_", "-")}`;
      throw new CaravanError("invalid_argument", complaint(name, value, parsed.issues[0]), { where: flag });
    }
    values[name] = parsed.output;
  }
  return values;
}

/**
 * The settings in force. The file is CARAVAN_CONFIG, which must then exist, or `<config folder>/caravan.toml`, which
 * need not. Throws invalid_argument that names the file and line, the variable or the flag at fault.
 */
export function loadSettings(options: LoadSettingsOptions = {}): LoadedSettings {
  const env = options.env ?? process.env;
  const paths = resolvePaths(env);
  const warnings: string[] = [];
  const named = env.CARAVAN_CONFIG === "" ? undefined : env.CARAVAN_CONFIG;
  const file = named ?? join(paths.config, "caravan.toml");
  const content = (options.read ?? readIfThere)(file);
  if (content === undefined && named !== undefined) {
    throw new CaravanError("invalid_argument", "the file that CARAVAN_CONFIG names does not exist", {
      where: named,
    });
  }
  const defaults: Settings = {
    host: "127.0.0.1",
    port: DEFAULT_PORT,
    api_keys: [],
    admin_keys: [],
    tls_cert: "",
    tls_key: "",
    models_dir: paths.models,
    threads: 0,
    context: 0,
    max_queue: 256,
    request_seconds: 0,
    keep_alive_seconds: 0,
    drain_seconds: 30,
    max_body_bytes: 32 * 1024 * 1024,
    max_total_body_bytes: 256 * 1024 * 1024,
    cors_origins: [],
    allowed_hosts: [],
    cluster_port: DEFAULT_PORT + 1,
    cluster_host: "",
    peers: [],
    discovery_port: DEFAULT_PORT + 1,
    rdma: "",
    node_name: "",
    log_level: "info",
    log_format: "text",
  };
  const layers: [SettingSource, Partial<Settings>][] = [
    ["default", defaults],
    ["file", content === undefined ? {} : fromFile(file, content)],
    ["environment", fromEnvironment(env, warnings)],
    ["flag", fromFlags(options.flags)],
  ];
  const sources = {} as Record<SettingName, SettingSource>;
  for (const [source, values] of layers) {
    for (const name of Object.keys(values)) sources[name as SettingName] = source;
  }
  const settings: Settings = Object.assign({}, ...layers.map(([, values]) => values));
  if ((settings.tls_cert === "") !== (settings.tls_key === "")) {
    const name = settings.tls_cert === "" ? "tls_key" : "tls_cert";
    const inFile = sources[name] === "file" && content !== undefined;
    const line = inFile ? `line ${lineOfKey(content, [name])}: ` : "";
    throw new CaravanError(
      "invalid_argument",
      `${line}tls_cert and tls_key belong together, and only one is set`,
      {
        ...(inFile ? { where: file } : {}),
        hint: "Set both, or neither.",
        param: settings.tls_cert === "" ? "tls_cert" : "tls_key",
      },
    );
  }
  for (const name of ["api_keys", "admin_keys"] as const) {
    if (settings[name].some((key) => key.length < SHORT_KEY))
      warnings.push(`a key in ${name} has fewer than ${SHORT_KEY} characters and can be guessed`);
  }
  const keysInFile = sources.api_keys === "file" || sources.admin_keys === "file";
  if (keysInFile && options.read === undefined && (statSync(file).mode & 0o077) !== 0) {
    warnings.push(`${file} holds API keys and other users can read it; run: chmod 600 '${file}'`);
  }
  return { settings, sources, file: content === undefined ? undefined : file, warnings };
}
