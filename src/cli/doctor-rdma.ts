// What doctor looks at for RDMA: the devices as the node would see them, and on a Mac each thing that RDMA over Thunderbolt needs, with the
// command that mends it. It changes nothing. Machines without a device are well: ranks use TCP then, and doctor says so.

import { platform } from "node:os";
import type { RdmaSurvey } from "../cluster/types.ts";
import { chosenDevices, listRdmaDevices, usableDevices } from "../engine/rdma-devices.ts";
import { rdmaChoice } from "../settings.ts";
import type { Check } from "./doctor-cluster.ts";

/** What the system's own commands print; undefined: a command is not there or failed. */
export interface MacAnswers {
  /** sw_vers -productVersion */
  version: string | undefined;
  /** rdma_ctl status */
  control: string | undefined;
  /** ifconfig bridge0 */
  bridge: string | undefined;
}

const COMMAND_LIMIT_MS = 5000;
/** First macOS with RDMA over Thunderbolt. */
const NEEDED: readonly [major: number, minor: number] = [26, 2];

/** setting: `rdma` of the settings. */
export async function rdmaChecks(setting: string): Promise<Check[]> {
  const wanted = rdmaChoice(setting);
  if (wanted === "off") return [{ name: "RDMA", ok: true, detail: 'turned off (rdma = "off")' }];
  const survey = chosenDevices(await listRdmaDevices(), wanted);
  const needed = wanted.length > 0 || ("devices" in survey && survey.devices.length > 0);
  const mac = platform() === "darwin" ? macChecks(await askMac()) : [];
  return [...(needed ? mac : mac.map(asAdvice)), ...deviceChecks(survey, wanted)];
}

/** On a machine that has no devices, and of which nobody asked for RDMA, what it would take is no fault. */
export function asAdvice({ fix, ...check }: Check): Check {
  return fix === undefined ? check : { ...check, ok: true, detail: `${check.detail}. For RDMA: ${fix}` };
}

/** A device that was asked for by name must work; others may be without a cable. */
export function deviceChecks(survey: RdmaSurvey, wanted: readonly string[]): Check[] {
  if ("reason" in survey) {
    const hangs = survey.reason.includes("has not answered");
    const missing = hangs || wanted.length > 0;
    return [
      {
        ...{ name: "RDMA", ok: !missing, detail: `${survey.reason}; ranks on several nodes use TCP` },
        ...(hangs ? { fix: "Restart the machine." } : {}),
      },
    ];
  }
  if (survey.devices.length === 0)
    return [{ name: "RDMA", ok: true, detail: "no device; ranks on several nodes use TCP" }];
  const usable = usableDevices(survey);
  return survey.devices.map(({ name, address, problem }) => {
    if (usable.some((each) => each.name === name))
      return { name: "RDMA", ok: true, detail: `${name}: port up, ${address}` };
    return {
      ...{ name: "RDMA", ok: !wanted.includes(name), detail: problem || `${name} cannot be used` },
      ...(wanted.includes(name) ? { fix: fixOf(problem) } : {}),
    };
  });
}

function fixOf(problem: string): string {
  if (problem.includes("no active port")) return "Plug the cable in at both ends.";
  if (problem.includes("no IPv4 address"))
    return "Give the port's interface an IPv4 address: `networksetup -setdhcp` on a Mac, `ip addr add` on Linux.";
  if (problem.includes("no such device")) return "Name devices that `caravan doctor` lists, or none.";
  return "Restart the machine; a device stays busy after a process was killed.";
}

/** Each precondition of RDMA over Thunderbolt. Pure. */
export function macChecks({ version, control, bridge }: MacAnswers): Check[] {
  const checks: Check[] = [];
  const [major = 0, minor = 0] = (version ?? "").split(".").map(Number);
  const new_enough = major > NEEDED[0] || (major === NEEDED[0] && minor >= NEEDED[1]);
  checks.push({
    ...{ name: "RDMA: macOS", ok: new_enough, detail: version ?? "its version is not known" },
    ...(new_enough
      ? {}
      : { fix: `RDMA over Thunderbolt needs macOS ${NEEDED.join(".")}: update the system.` }),
  });
  const enabled = control !== undefined && /\benabled\b/i.test(control);
  checks.push({
    ...{ name: "RDMA: switch", ok: enabled, detail: control?.trim() || "rdma_ctl does not answer" },
    ...(enabled
      ? {}
      : {
          fix: "Shut down, start into Recovery (hold the power button), open the Terminal there, run `rdma_ctl enable`, restart.",
        }),
  });
  const members = [...(bridge ?? "").matchAll(/\bmember:\s*(\S+)/g)].map(([, name]) => name ?? "");
  checks.push({
    ...{ name: "RDMA: bridge", ok: members.length === 0 },
    ...(members.length === 0
      ? { detail: "the Thunderbolt Bridge has no ports" }
      : {
          detail: `the Thunderbolt Bridge holds ${members.join(", ")}: RDMA does not work on these ports`,
          fix: "Run `sudo networksetup -setnetworkserviceenabled 'Thunderbolt Bridge' off`.",
        }),
  });
  return checks;
}

async function askMac(): Promise<MacAnswers> {
  const [version, control, bridge] = await Promise.all([
    answer(["/usr/bin/sw_vers", "-productVersion"]),
    answer(["/usr/bin/rdma_ctl", "status"]),
    answer(["/sbin/ifconfig", "bridge0"]),
  ]);
  return { version: version?.trim(), control, bridge };
}

/** Standard output; undefined: it is not there, failed, or takes too long. */
async function answer(command: string[]): Promise<string | undefined> {
  try {
    const child = Bun.spawn(command, {
      ...{ stdin: "ignore", stdout: "pipe", stderr: "ignore" },
      ...{ timeout: COMMAND_LIMIT_MS, killSignal: "SIGKILL" },
    });
    const text = await child.stdout.text();
    return (await child.exited) === 0 ? text : undefined;
  } catch {
    return undefined; // not on this system
  }
}
