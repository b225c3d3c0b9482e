// The GPU's self-test: every kernel case against the CPU's exact arithmetic, and how fast decoding's kernels read memory. One
// case at a time, so that whoever asked can show progress; each blocks for a moment.

import { CaravanError } from "../errors.ts";
import { measureBandwidth, metalHandOvers, metalSelftest, metalSpeed, performanceCores } from "./binding.ts";
import { findMetal, type MetalDevice } from "./metal-device.ts";

export interface SelftestCase {
  name: string;
  /** Not run, because this macOS lacks something. */
  skipped: boolean;
  ok: boolean;
  /** Largest difference, as a share of what rounding may do. */
  worst: number;
  /** Operation of that difference. */
  where: string;
  /** Why it could not be computed; "" when it was. */
  error: string;
}

export interface KernelSpeed {
  name: string;
  /** Of weights, read once. */
  bytes: number;
  multiplyAdds: number;
  seconds: number;
}

/** A way in which a step that is split over ranks hands sums over to the processor and goes on. */
export interface HandOver {
  way: string;
  /** A hand-over and back; 0 where this system has not got the way. */
  nanoseconds: number;
  /** Whether steps take it. */
  taken: boolean;
}

export interface Selftest {
  device: MetalDevice;
  cases: SelftestCase[];
  speeds: KernelSpeed[];
  handOvers: HandOver[];
  /** Bytes a second that the processor's cores read. */
  readBandwidth: number;
}

export interface SelftestOptions {
  /** Bytes of the matrices that are timed: more than the GPU's caches hold. */
  bytes: number;
  /** Only a sample of the cases. */
  quick: boolean;
  onCase?: (done: number, name: string) => void;
}

/** Every how many-th case a quick test takes: prime, so that formats and types go round. */
const QUICK_STRIDE = 7;
/** Bytes of a buffer below which reading speed says nothing. */
const SMALLEST_MEASURED = 16e6;

/** Throws unsupported_model, saying why, where there is no GPU to test. */
export async function runSelftest({ bytes, quick, onCase }: SelftestOptions): Promise<Selftest> {
  const device = findMetal();
  if ("reason" in device)
    throw new CaravanError("unsupported_model", `no Metal device: ${device.reason}`, {
      hint: "The self-test is for Macs with Apple silicon.",
    });
  const cases: SelftestCase[] = [];
  for (let index = 0; ; index += quick ? QUICK_STRIDE : 1) {
    const lines = metalSelftest(index, device.bfloat);
    if (lines === undefined) break;
    const read = fields(lines);
    const result = {
      name: read("name"),
      skipped: read("skipped") === "1",
      ok: read("ok") === "1",
      worst: Number(read("worst")),
      where: read("where"),
      error: read("error"),
    };
    cases.push(result);
    onCase?.(cases.length, result.name);
    await Bun.sleep(0); // a Ctrl-C between two cases
  }
  const speeds: KernelSpeed[] = [];
  for (let index = 0; ; index++) {
    const lines = metalSpeed(index, bytes);
    if (lines === undefined) break;
    const read = fields(lines);
    const number = (key: string) => Number(read(key));
    const [size, multiplyAdds, seconds] = [number("bytes"), number("multiply_adds"), number("seconds")];
    speeds.push({ name: read("name"), bytes: size, multiplyAdds, seconds });
    onCase?.(cases.length + speeds.length, read("name"));
    await Bun.sleep(0);
  }
  const readWay = fields(metalHandOvers());
  const handOvers = ["wait", "look", "event", "spin"].map((way) => ({
    ...{ way, nanoseconds: Number(readWay(way)), taken: readWay("taken") === way },
  }));
  return {
    device,
    cases,
    speeds,
    handOvers,
    readBandwidth: measureBandwidth(Math.max(bytes, SMALLEST_MEASURED), performanceCores() || 1),
  };
}

/** Values of lines "key=value"; "" for one that is not there. */
function fields(lines: string): (key: string) => string {
  return (key) => new RegExp(`^${key}=(.*)$`, "m").exec(lines)?.[1] ?? "";
}

export function passed({ cases }: Selftest): boolean {
  return cases.length > 0 && cases.every(({ ok, skipped }) => ok || skipped);
}

/** One page to attach to a report of a fault. */
export function selftestPage(test: Selftest, version: string): string {
  const { device, cases, speeds, handOvers, readBandwidth } = test;
  const bad = cases.filter(({ ok, skipped }) => !ok && !skipped);
  const skipped = cases.filter((each) => each.skipped).length;
  const worst = Math.max(...cases.map((each) => each.worst));
  const gigabytes = (n: number) => (n / 1e9).toFixed(1);
  const lines = [
    `caravan ${version} GPU self-test`,
    `${device.name}, macOS ${device.macos || "unknown"} (${device.build || "unknown build"}), the GPU may use ${gigabytes(device.workingSet)} GB, buffers up to ${gigabytes(device.maxBuffer)} GB`,
    `residency sets: ${device.residency ? "yes" : "no (macOS 15 has them)"}; bfloat16: ${device.bfloat ? "yes" : "no (macOS 14 has it)"}`,
    "",
    `${cases.length - bad.length - skipped} of ${cases.length} cases equal the CPU's arithmetic within rounding (largest difference ${Math.round(worst * 100)} % of what is allowed)${skipped === 0 ? "" : `, ${skipped} skipped`}`,
    ...bad.map(({ name, where, worst: share, error }) =>
      error === ""
        ? `  WRONG  ${name}: ${where}: ${share.toFixed(2)} times what is allowed`
        : `  FAILED ${name}: ${error}`,
    ),
    "",
    "weights                                  read GB/s   of the cores' speed   G multiply-adds/s",
    ...speeds.map(({ name, bytes, multiplyAdds, seconds }) => {
      const speed = bytes / seconds;
      const share = `${Math.round((100 * speed) / readBandwidth)} %`;
      return `${name.padEnd(40)} ${gigabytes(speed).padStart(9)}   ${share.padStart(19)}   ${(multiplyAdds / seconds / 1e9).toFixed(1).padStart(17)}`;
    }),
    `from GPU to processor and back, for sums over ranks: ${handOvers.map(({ way, nanoseconds, taken }) => `${way} ${nanoseconds === 0 ? "not possible" : `${(nanoseconds / 1e3).toFixed(1)} µs`}${taken ? " (taken)" : ""}`).join(", ")}`,
    `the processor's cores read ${gigabytes(readBandwidth)} GB/s; one GPU token needs every active weight once`,
  ];
  return `${lines.join("\n")}\n`;
}
