// caravan service with a home of its own and a service manager that only writes down what it is told.

import { afterEach, beforeEach, expect, setDefaultTimeout, test } from "bun:test";
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { daemonCommands, launchdAgent, systemdUnit } from "../../src/cli/service-unit.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(120_000);

const MAIN = join(import.meta.dir, "../../src/main.ts");
const linux = process.platform === "linux";
if (!linux) console.log("skipped: the fake manager plays systemd, this is not Linux");

let home = "";
beforeEach(() => {
  home = mkdtempSync(join(tmpdir(), "caravan-service-"));
  mkdirSync(join(home, "bin"));
  manager("exit 0");
});
afterEach(() => rmSync(home, { recursive: true, force: true }));

/** Writes down its arguments, then does what the shell line says. */
function manager(line: string): void {
  tool("systemctl", line);
  tool("loginctl", "exit 0");
}

function tool(name: string, line: string): void {
  const path = join(home, "bin", name);
  writeFileSync(path, `#!/bin/sh\necho "$*" >> "${home}/told"\n${line}\n`);
  chmodSync(path, 0o755);
}

function told(): string[] {
  const path = join(home, "told");
  return existsSync(path) ? readFileSync(path, "utf8").trim().split("\n") : [];
}

function caravan(...args: string[]): { code: number; text: string } {
  const { exitCode, stdout, stderr } = Bun.spawnSync([process.execPath, MAIN, "service", ...args], {
    env: { HOME: home, PATH: `${join(home, "bin")}:/usr/bin:/bin` },
  });
  return { code: exitCode, text: stdout.toString() + stderr.toString() };
}

const unit = () => join(home, ".config/systemd/user/caravan.service");

test.skipIf(!linux)("is installed, seen and removed as one file, and the manager is told", () => {
  expect(caravan("status")).toMatchObject({ code: 3, text: expect.stringContaining("not installed") });
  expect(caravan("install").code).toBe(0);
  expect(readFileSync(unit(), "utf8")).toContain(`ExecStart=${process.execPath} ${MAIN} serve\n`);
  expect(told()).toEqual(["--user daemon-reload", "--user enable --now caravan.service"]);
  expect(caravan("status")).toMatchObject({ code: 0, text: expect.stringContaining("running") });
  writeFileSync(unit(), "old");
  expect(caravan("status").text).toContain("brings it up to date");
  expect(caravan("uninstall").code).toBe(0);
  expect(existsSync(unit())).toBe(false);
  expect(told().at(-1)).toBe("--user disable --now caravan.service");
  expect(caravan("uninstall")).toMatchObject({ code: 0, text: expect.stringContaining("not installed") });
});

test.skipIf(!linux)(
  "that the manager refuses says what to run, and one that stands still ends with 3",
  () => {
    manager('echo "no bus" >&2; exit 1');
    const refused = caravan("install");
    expect(refused.code).toBe(1);
    expect(refused.text).toContain("`systemctl --user daemon-reload` failed: no bus");
    expect(caravan("status")).toMatchObject({ code: 3, text: expect.stringContaining("not running") });
  },
);

test.skipIf(!linux)(
  "with --boot it also starts without a login; where that is refused it says who can",
  () => {
    const installed = caravan("install", "--boot");
    expect(installed.code).toBe(0);
    expect(installed.text).toContain("at boot, before anybody has logged in");
    expect(told()).toEqual(["--user daemon-reload", "--user enable --now caravan.service", "enable-linger"]);
    tool("loginctl", 'echo "Access denied" >&2; exit 1');
    const refused = caravan("install", "--boot");
    expect(refused.code).toBe(1);
    expect(refused.text).toContain("starts at login, but not at boot");
    expect(refused.text).toMatch(/Access denied[\s\S]*sudo loginctl enable-linger \w+/);
    expect(existsSync(unit())).toBe(true);
    expect(caravan("status", "--boot").text).toContain("--boot goes with `caravan service install`");
  },
);

test("a Mac's daemon runs as the user, and the commands that install it are for the user to run", () => {
  const plist = launchdAgent(["/a/caravan", "serve"], 30, "/log", { name: "an & other", home: "/Users/o" });
  expect(plist).toContain("<key>UserName</key>\n  <string>an &amp; other</string>");
  expect(plist).toContain("<key>HOME</key>\n    <string>/Users/o</string>");
  expect(launchdAgent(["/a/caravan", "serve"], 30, "/log")).not.toContain("UserName");
  const { install, remove } = daemonCommands("/Users/o/Library/Application Support/it's.plist");
  expect(install).toEqual([
    "sudo install -o root -g wheel -m 644 '/Users/o/Library/Application Support/it'\\''s.plist' /Library/LaunchDaemons/ai.caravan.serve.plist",
    "sudo launchctl bootstrap system /Library/LaunchDaemons/ai.caravan.serve.plist",
  ]);
  expect(remove.at(-1)).toBe("sudo rm /Library/LaunchDaemons/ai.caravan.serve.plist");
});

test("commands with strange characters reach the program as they are", () => {
  const command = ['/opt/my apps/50% "a\\b" $HOME/caravan', "serve"];
  expect(systemdUnit(command, 30)).toContain(
    'ExecStart="/opt/my apps/50%% \\"a\\\\b\\" $$HOME/caravan" serve\n',
  );
  expect(systemdUnit(command, 30)).toContain("TimeoutStopSec=40");
  expect(launchdAgent(["/a & <b>/caravan", "serve"], 30, "/log")).toContain(
    "<string>/a &amp; &lt;b&gt;/caravan</string>\n    <string>serve</string>",
  );
});
