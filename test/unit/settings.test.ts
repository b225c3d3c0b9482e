// The configuration reader: precedence, refusals that name the place, and the folders of a machine.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CaravanError } from "../../src/errors.ts";
import { homeFolder, makeFolder, NO_HOME, resolvePaths } from "../../src/paths.ts";
import { DEFAULT_PORT, type LoadSettingsOptions, loadSettings } from "../../src/settings.ts";
import { lineOfKey } from "../../src/toml.ts";

const HOME = "/home/me";

function withFile(text: string | undefined, options: LoadSettingsOptions = {}) {
  return loadSettings({ env: { HOME }, read: () => text, ...options });
}

function refused(action: () => unknown): CaravanError {
  try {
    action();
  } catch (error) {
    if (error instanceof CaravanError) return error;
    throw error;
  }
  throw new Error("it was accepted");
}

describe("settings", () => {
  test("have defaults, and a machine without any file or variable works", () => {
    const { settings, sources, file, warnings } = withFile(undefined);
    expect(settings).toEqual({
      host: "127.0.0.1",
      port: DEFAULT_PORT,
      api_keys: [],
      admin_keys: [],
      tls_cert: "",
      tls_key: "",
      models_dir: resolvePaths({ HOME }).models,
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
    });
    expect(new Set(Object.values(sources))).toEqual(new Set(["default"]));
    expect(file).toBeUndefined();
    expect(warnings).toEqual([]);
  });

  test("the default port is none that Ollama or exo use", () => {
    expect([11434, 52415]).not.toContain(DEFAULT_PORT);
  });

  test("flags win over variables, variables over the file, the file over defaults", () => {
    const text = 'port = 1\nthreads = 1\nmax_queue = 1\nhost = "file"\n';
    const { settings, sources } = withFile(text, {
      env: { HOME, CARAVAN_PORT: "2", CARAVAN_THREADS: "2", CARAVAN_HOST: "" },
      flags: { port: 3, threads: undefined },
    });
    expect([settings.port, settings.threads, settings.max_queue, settings.host]).toEqual([3, 2, 1, "file"]);
    expect([sources.port, sources.threads, sources.max_queue, sources.context]).toEqual([
      "flag",
      "environment",
      "file",
      "default",
    ]);
  });

  test("keys may be one or several, in the file and in the environment", () => {
    expect(withFile('api_key = "a"').settings.api_keys).toEqual(["a"]);
    expect(withFile('api_keys = ["a", "b"]').settings.api_keys).toEqual(["a", "b"]);
    expect(withFile(undefined, { env: { HOME, CARAVAN_API_KEY: "a, b" } }).settings.api_keys).toEqual([
      "a",
      "b",
    ]);
    expect(refused(() => withFile('api_key = "a"\napi_keys = ["b"]')).message).toContain("both set");
  });

  const bad: [string, string, string][] = [
    ["an unknown key", 'host = "x"\nprot = 1\n', "line 2: prot is not a setting"],
    ["an unknown table", "\n[server]\nport = 1\n", "line 2: server is not a setting"],
    ["a wrong type", 'port = "80"\n', 'line 1: port: must be of the form number, not "80"'],
    ["a value out of range", "# x\nport = 70000\n", "line 2: port: must be <=65535, not 70000"],
    ["a fraction", "threads = 1.5\n", "line 1: threads: must be"],
    ["a level that is none", 'log_level = "loud"\n', "line 1: log_level: must be of the form"],
    [
      "everything at once",
      'host = "x"\nlog_level = "loud"\nport = 70000\n',
      'line 2: log_level: must be of the form ("debug" | "info" | "warn" | "error" | "silent"), not "loud"\n  line 3: port: must be <=65535',
    ],
    ["no TOML", "port = = 1\n", "line 1, column"],
  ];
  for (const [what, text, message] of bad) {
    test(`${what} in the file is an error that names the file and the line`, () => {
      const error = refused(() => withFile(text));
      expect(error.code).toBe("invalid_argument");
      expect(error.where).toBe(join(resolvePaths({ HOME }).config, "caravan.toml"));
      expect(error.message).toStartWith(message);
    });
  }

  test("a bad variable or flag is an error that names it", () => {
    const variable = refused(() => withFile(undefined, { env: { HOME, CARAVAN_PORT: "eighty" } }));
    expect([variable.where, variable.message]).toEqual([
      "CARAVAN_PORT",
      'port: must be of the form number, not "eighty"',
    ]);
    const flag = refused(() => withFile(undefined, { flags: { max_queue: -1 } }));
    expect(flag.where).toBe("--max-queue");
  });

  test("a bad key is refused without being shown", () => {
    const error = refused(() => withFile(undefined, { env: { HOME, CARAVAN_API_KEYS: "my secret" } }));
    expect(error.toText()).toContain("printable ASCII");
    expect(error.toText()).not.toContain("secret");
  });

  test("an unknown CARAVAN_ variable is a warning", () => {
    expect(
      withFile(undefined, { env: { HOME, CARAVAN_PROT: "1", CARAVAN_DATA_DIR: "/d" } }).warnings,
    ).toEqual(["CARAVAN_PROT is not a setting of caravan and is ignored"]);
  });

  describe("with real files", () => {
    let folder = "";
    beforeEach(() => {
      folder = mkdtempSync(join(tmpdir(), "caravan-settings-"));
    });
    afterEach(() => rmSync(folder, { recursive: true }));

    test("CARAVAN_CONFIG names the file, which must then be there", () => {
      const file = join(folder, "my.toml");
      expect(refused(() => loadSettings({ env: { HOME, CARAVAN_CONFIG: file } })).message).toContain(
        "does not exist",
      );
      writeFileSync(file, "port = 5\n");
      expect(loadSettings({ env: { HOME, CARAVAN_CONFIG: file } })).toMatchObject({
        file,
        settings: { port: 5 },
      });
    });

    test("a short key and half a TLS pair are pointed out", () => {
      const short = withFile(undefined, { env: { HOME, CARAVAN_ADMIN_KEYS: "short" } });
      expect(short.warnings.join()).toContain("admin_keys has fewer than 16 characters");
      const half = refused(() => withFile('tls_cert = "cert.pem"'));
      expect(half.message).toMatch(/^line 1: .*belong together/);
      expect(half.param).toBe("tls_key");
    });

    test("a file with keys that others can read is warned about", () => {
      const file = join(folder, "my.toml");
      writeFileSync(file, 'api_key = "a-key-that-is-long-enough"\n');
      chmodSync(file, 0o644);
      expect(loadSettings({ env: { HOME, CARAVAN_CONFIG: file } }).warnings.join()).toContain("chmod 600");
      chmodSync(file, 0o600);
      expect(loadSettings({ env: { HOME, CARAVAN_CONFIG: file } }).warnings).toEqual([]);
    });

    test("a folder in the file's place is an error", () => {
      mkdirSync(join(folder, "caravan.toml"));
      expect(refused(() => loadSettings({ env: { HOME, CARAVAN_CONFIG_DIR: folder } })).code).toBe(
        "invalid_argument",
      );
    });

    test("makeFolder makes folders, and says what to set where it cannot", () => {
      makeFolder(join(folder, "a", "b"), "keep models");
      makeFolder(join(folder, "a", "b"), "keep models");
      writeFileSync(join(folder, "file"), "");
      const error = refused(() => makeFolder(join(folder, "file", "x"), "keep models"));
      expect(error.code).toBe("permission_denied");
      expect(error.message).toStartWith("cannot keep models: ");
      expect(error.hint).toContain("CARAVAN_DATA_DIR");
    });
  });
});

describe("the line of a key", () => {
  const text = 'a = 1\n[t] # x\n"b c" = 2\n[t.u]\nd = { e = 1 }\n[[list]]\nf = 1\n# g = 1\n';
  test("is that of its assignment, of its table, or of the nearest table around it", () => {
    expect(lineOfKey(text, ["a"])).toBe(1);
    expect(lineOfKey(text, ["t"])).toBe(2);
    expect(lineOfKey(text, ["t", "b c"])).toBe(3);
    expect(lineOfKey(text, ["t", "u", "d", "e"])).toBe(5);
    expect(lineOfKey(text, ["list", "f"])).toBe(7);
    expect(lineOfKey(text, ["t", "missing"])).toBe(2);
    expect(lineOfKey(text, ["g"])).toBeUndefined();
  });
});

describe("folders", () => {
  test("follow XDG on Linux, and only absolute XDG variables", () => {
    expect(resolvePaths({ HOME }, "linux")).toEqual({
      data: "/home/me/.local/share/caravan",
      config: "/home/me/.config/caravan",
      cache: "/home/me/.cache/caravan",
      models: "/home/me/.local/share/caravan/models",
      cards: "/home/me/.local/share/caravan/cards",
      hub: "/home/me/.cache/huggingface/hub",
      hubTokenFile: "/home/me/.cache/huggingface/token",
    });
    expect(resolvePaths({ HOME, XDG_DATA_HOME: "/d" }, "linux").data).toBe("/d/caravan");
    expect(resolvePaths({ HOME, XDG_DATA_HOME: "d" }, "linux").data).toBe("/home/me/.local/share/caravan");
  });

  test("follow the Library on macOS, with the hub's cache where the hub has it", () => {
    const paths = resolvePaths({ HOME }, "darwin");
    expect(paths.data).toBe("/home/me/Library/Application Support/caravan");
    expect(paths.cache).toBe("/home/me/Library/Caches/caravan");
    expect(paths.hub).toBe("/home/me/.cache/huggingface/hub");
  });

  test("of the hub follow HF_HUB_CACHE, then HF_HOME, then XDG_CACHE_HOME", () => {
    const all = { HOME, HF_HUB_CACHE: "/c", HF_HOME: "~/hf", XDG_CACHE_HOME: "/x" };
    expect(resolvePaths(all).hub).toBe("/c");
    expect(resolvePaths({ ...all, HF_HUB_CACHE: "" }).hub).toBe("/home/me/hf/hub");
    expect(resolvePaths({ HOME, XDG_CACHE_HOME: "/x" }).hub).toBe("/x/huggingface/hub");
  });

  test("of caravan follow its own variables first", () => {
    const env = { HOME, XDG_DATA_HOME: "/d", CARAVAN_DATA_DIR: "~/c", CARAVAN_CONFIG_DIR: "/e" };
    expect(resolvePaths(env, "linux")).toMatchObject({
      data: "/home/me/c",
      models: "/home/me/c/models",
      config: "/e",
    });
  });

  test("with HOME empty, unset or relative come from the user list, and reading settings works", () => {
    for (const HOME of ["", undefined, "relative"]) {
      expect(homeFolder({ HOME })).toStartWith("/");
      expect(loadSettings({ env: { HOME } }).settings.host).toBe("127.0.0.1");
    }
  });

  test("without any home fail only when something must be written", () => {
    const paths = resolvePaths({}, "linux", NO_HOME);
    expect(loadSettings({ env: { HOME: NO_HOME } }).settings.port).toBe(DEFAULT_PORT);
    const error = refused(() => makeFolder(paths.data, "keep models"));
    expect(error.message).toBe("cannot keep models: this user has no home folder");
    expect(error.hint).toContain("HOME");
  });
});
