// This machine's RDMA devices. The system's library may hang where a port is wedged, so a process of its own asks it, and is left to
// its fate after a few seconds.

import * as v from "valibot";
import type { RdmaDevice, RdmaSurvey } from "../cluster/types.ts";
import { asCaravanError } from "../errors.ts";
import { rdmaDeviceLines } from "./binding.ts";
import { childEnvironment } from "./child-environment.ts";
import { ownCommand } from "./child-process.ts";
import { within } from "./patience.ts";

/** A healthy library answers within milliseconds; the rest is for a busy machine's start of a process. */
const LIST_LIMIT_MS = 20_000;
/** IBV_PORT_ACTIVE. */
const ACTIVE = 4;

const SurveySchema: v.GenericSchema<unknown, RdmaSurvey> = v.union([
  v.object({
    devices: v.array(
      v.object({ name: v.string(), active: v.boolean(), address: v.string(), problem: v.string() }),
    ),
  }),
  v.object({ reason: v.string() }),
]);

/** In a process that may hang: asks the library. */
export function ownRdmaDevices(): RdmaSurvey {
  try {
    return { devices: parseDevices(rdmaDeviceLines()) };
  } catch (thrown) {
    return { reason: asCaravanError(thrown).message };
  }
}

/** Lines of cv_rdma_devices. */
export function parseDevices(lines: string): RdmaDevice[] {
  return lines
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => {
      const [name = "", state = "0", address = "", problem = ""] = line.split("\t");
      return { name, active: Number(state) === ACTIVE, address, problem };
    });
}

export interface ListOptions {
  /** Command line of the process that asks; default: this program's `rdma` command. */
  command?: readonly string[];
  limitMs?: number;
}

/** The devices, or why there are none. Never rejects, and comes back within the limit. */
export async function listRdmaDevices({
  command = ownCommand("rdma"),
  limitMs = LIST_LIMIT_MS,
}: ListOptions = {}): Promise<RdmaSurvey> {
  try {
    const child = Bun.spawn([...command], { env: childEnvironment(), stdin: "ignore", stderr: "pipe" });
    const found = await within(answerOf(child), limitMs);
    if (found !== undefined) return found;
    // What hangs in the kernel does not die of it; nobody waits for that.
    child.kill("SIGKILL");
    child.unref();
    return {
      reason: `the RDMA library has not answered for ${limitMs / 1000} s (a port may be wedged: restart the machine)`,
    };
  } catch (thrown) {
    return { reason: `RDMA devices cannot be listed: ${asCaravanError(thrown).message}` };
  }
}

async function answerOf(child: Bun.Subprocess<"ignore", "pipe", "pipe">): Promise<RdmaSurvey> {
  const [text, errors] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  const said = errors.trim().split("\n").at(-1) ?? "";
  if (text.trim() === "")
    return { reason: `looking for RDMA devices ended without an answer${said === "" ? "" : `: ${said}`}` };
  const survey = v.safeParse(SurveySchema, JSON.parse(text));
  return survey.success ? survey.output : { reason: "the list of RDMA devices makes no sense" };
}

/** What of the devices may be used. wanted: names that a person gave; empty = all. Devices that are not wanted stay in the list and say
 * so; a wanted one that is not there is added with its problem. */
export function chosenDevices(survey: RdmaSurvey, wanted: readonly string[]): RdmaSurvey {
  if ("reason" in survey || wanted.length === 0) return survey;
  const devices = survey.devices.map((device) =>
    wanted.includes(device.name)
      ? device
      : { ...device, active: false, problem: "not among the devices that --rdma names" },
  );
  for (const name of wanted)
    if (!survey.devices.some((device) => device.name === name))
      devices.push({ name, active: false, address: "", problem: "there is no such device" });
  return { devices };
}

/** Devices that a cable may end in. */
export function usableDevices(survey: RdmaSurvey): RdmaDevice[] {
  return "reason" in survey
    ? []
    : survey.devices.filter(({ active, address, problem }) => active && address !== "" && problem === "");
}
