// caravan service: has the system start `caravan serve` at login and again after a crash. One file in the user's own folder, and
// the system's own manager told about it; no root, and nothing else is touched.

import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { userInfo } from "node:os";
import { dirname, join } from "node:path";
import { isCompiled } from "../engine/library.ts";
import { CaravanError } from "../errors.ts";
import { homeFolder, makeFolder, resolvePaths } from "../paths.ts";
import { loadSettings } from "../settings.ts";
import { type Command, usage } from "./command.ts";
import { LAUNCHD_LABEL, launchdAgent, SYSTEMD_NAME, systemdUnit } from "./service-unit.ts";

interface Manager {
  /** The definition's file. */
  path: string;
  text: string;
  /** Commands that start it now and at every login, and that end it. */
  enable: string[][];
  disable: string[][];
  /** Ends with 0 where it runs. */
  active: string[];
}

function serveCommand(): string[] {
  return isCompiled()
    ? [process.execPath, "serve"]
    : [process.execPath, new URL("../main.ts", import.meta.url).pathname, "serve"];
}

/** Throws not_built_yet on other systems. */
function manager(): Manager {
  const { drain_seconds } = loadSettings().settings;
  const home = homeFolder();
  if (process.platform === "darwin") {
    const path = join(home, "Library", "LaunchAgents", `${LAUNCHD_LABEL}.plist`);
    const domain = `gui/${userInfo().uid}`;
    const log = join(home, "Library", "Logs", "caravan.log");
    return {
      path,
      text: launchdAgent(serveCommand(), drain_seconds, log),
      enable: [["launchctl", "bootstrap", domain, path]],
      disable: [["launchctl", "bootout", `${domain}/${LAUNCHD_LABEL}`]],
      active: ["launchctl", "print", `${domain}/${LAUNCHD_LABEL}`],
    };
  }
  if (process.platform === "linux") {
    const config = process.env.XDG_CONFIG_HOME;
    const folder = config?.startsWith("/") ? config : join(home, ".config");
    const systemctl = ["systemctl", "--user"];
    return {
      path: join(folder, "systemd", "user", SYSTEMD_NAME),
      text: systemdUnit(serveCommand(), drain_seconds),
      enable: [
        [...systemctl, "daemon-reload"],
        [...systemctl, "enable", "--now", SYSTEMD_NAME],
      ],
      disable: [[...systemctl, "disable", "--now", SYSTEMD_NAME]],
      active: [...systemctl, "is-active", "--quiet", SYSTEMD_NAME],
    };
  }
  throw new CaravanError("not_built_yet", `there is no service for ${process.platform}`);
}

/** Runs a command of the system; what it said where it failed. */
function run([program = "", ...args]: readonly string[]): string | undefined {
  try {
    const { exitCode, stderr, stdout } = Bun.spawnSync([program, ...args]);
    if (exitCode === 0) return undefined;
    return (stderr.toString() || stdout.toString()).trim() || `exit code ${exitCode}`;
  } catch (thrown) {
    return thrown instanceof Error ? thrown.message : String(thrown);
  }
}

function runAll(commands: readonly string[][]): void {
  for (const command of commands) {
    const failure = run(command);
    if (failure === undefined) continue;
    throw new CaravanError("internal_error", `\`${command.join(" ")}\` failed: ${failure}`, {
      hint: "Run it yourself once the system's service manager answers.",
    });
  }
}

function install(): number {
  const { path, text, enable } = manager();
  makeFolder(dirname(path), "install the service");
  writeFileSync(path, text, { mode: 0o644 });
  process.stdout.write(`wrote ${path}\n`);
  runAll(enable);
  process.stdout.write("caravan serve runs now, and starts at every login\n");
  return 0;
}

function uninstall(): number {
  const { path, disable } = manager();
  if (!existsSync(path)) {
    process.stdout.write("the service is not installed\n");
    return 0;
  }
  // A service that does not run cannot be ended: its file goes all the same.
  for (const command of disable) run(command);
  rmSync(path, { force: true });
  process.stdout.write(`removed ${path}; models and settings in ${resolvePaths().data} stay\n`);
  return 0;
}

function status(): number {
  const { path, text, active } = manager();
  if (!existsSync(path)) {
    process.stdout.write("not installed; `caravan service install` does that\n");
    return 3;
  }
  const runs = run(active) === undefined;
  const old = !sameFile(path, text);
  process.stdout.write(
    `installed (${path}), ${runs ? "running" : "not running"}${old ? "; it starts another build or with other limits: `caravan service install` brings it up to date" : ""}\n`,
  );
  return runs ? 0 : 3;
}

function sameFile(path: string, text: string): boolean {
  return readFileSync(path, "utf8") === text;
}

export const service: Command = {
  name: "service",
  summary: "start the node at login, and again after a crash",
  positionals: "install | uninstall | status",
  count: [1, 1],
  options: {},
  details: `Writes one file for the system's own manager (systemd user unit, launchd agent), as this user.
Settings are read from caravan.toml, not from this terminal's variables. On Linux,
\`loginctl enable-linger\` keeps a user's services running without a login.
status ends with 0 where the service runs, with 3 where it does not.`,
  async run(args) {
    switch (args.positional(0)) {
      case "install":
        return install();
      case "uninstall":
        return uninstall();
      case "status":
        return status();
      default:
        throw usage("`caravan service` takes install, uninstall or status");
    }
  },
};
