// caravan service: has the system start `caravan serve` at login, with --boot also before anybody has logged in, and again after a
// crash. One file in the user's own folder, and the system's own manager told about it; no root, and nothing else is touched.

import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { userInfo } from "node:os";
import { dirname, join } from "node:path";
import { isCompiled } from "../engine/library.ts";
import { CaravanError } from "../errors.ts";
import { homeFolder, makeFolder, resolvePaths } from "../paths.ts";
import { loadSettings } from "../settings.ts";
import { type Command, usage } from "./command.ts";
import { daemonCommands, LAUNCHD_LABEL, launchdAgent, SYSTEMD_NAME, systemdUnit } from "./service-unit.ts";

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

/** Linux: this user's services start at boot and go on without a login. A user may ask that for himself. */
const LINGER = ["loginctl", "enable-linger"];

/** Installs for boot; where only a person with more rights can do it, says how. */
function installForBoot(): number {
  return process.platform === "darwin" ? prepareDaemon() : installWithLinger();
}

function installWithLinger(): number {
  const code = install();
  const failure = run(LINGER);
  if (failure === undefined) {
    process.stdout.write(
      "and at boot, before anybody has logged in (lingering is on; `loginctl disable-linger` ends that)\n",
    );
    return code;
  }
  const { username } = userInfo();
  throw new CaravanError(
    "permission_denied",
    `it starts at login, but not at boot: \`${LINGER.join(" ")}\` failed: ${failure}`,
    { hint: `Somebody who may, runs: sudo loginctl enable-linger ${username}` },
  );
}

/** A Mac's launchd starts at boot only what root has put into /Library/LaunchDaemons: the file is written, the rest is said. */
function prepareDaemon(): number {
  const { path: agent } = manager();
  const home = homeFolder();
  const { drain_seconds } = loadSettings().settings;
  const folder = resolvePaths().data;
  const path = join(folder, `${LAUNCHD_LABEL}.daemon.plist`);
  const log = join(home, "Library", "Logs", "caravan.log");
  makeFolder(folder, "prepare the service");
  const user = { name: userInfo().username, home };
  writeFileSync(path, launchdAgent(serveCommand(), drain_seconds, log, user), { mode: 0o644 });
  const { install: commands, remove } = daemonCommands(path);
  process.stdout.write(
    [
      `wrote ${path}: caravan serve as ${user.name}, started at boot. caravan itself never uses root; these commands install it:`,
      ...commands.map((command) => `  ${command}`),
      "and these remove it:",
      ...remove.map((command) => `  ${command}`),
      ...(existsSync(agent)
        ? [
            "Before that, `caravan service uninstall` ends the one that starts at login: both want the same port.",
          ]
        : []),
      "With FileVault on, the disk is locked until somebody has logged in after a restart, and nothing starts before. Without it,",
      "automatic login (System Settings, Users & Groups) with `caravan service install` does the same without root.",
      "",
    ].join("\n"),
  );
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
  summary: "start the node at login or at boot, and again after a crash",
  positionals: "install | uninstall | status",
  count: [1, 1],
  options: {
    boot: {
      help: "with install: start before anybody has logged in (Linux: lingering; macOS: says the sudo commands)",
    },
  },
  details: `Writes one file for the system's own manager (systemd user unit, launchd agent), as this user.
Settings are read from caravan.toml, not from this terminal's variables. --boot on Linux turns on
lingering, which keeps all of a user's services running without a login; uninstall leaves it on.
On macOS only root may start something at boot: --boot writes the daemon's file and prints the commands.
status ends with 0 where the service runs, with 3 where it does not.`,
  async run(args) {
    const boot = args.flag("boot");
    if (boot && args.positional(0) !== "install") throw usage("--boot goes with `caravan service install`");
    switch (args.positional(0)) {
      case "install":
        return boot ? installForBoot() : install();
      case "uninstall":
        return uninstall();
      case "status":
        return status();
      default:
        throw usage("`caravan service` takes install, uninstall or status");
    }
  },
};
