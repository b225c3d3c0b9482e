// The GPU that Metal gives: what it is, what its macOS lacks, and whether a model can run on it.

import { CaravanError } from "../errors.ts";
import type { ModelConfig } from "../model/config.ts";
import type { KvType } from "../model/memory-plan.ts";
import { metalDescription } from "./binding.ts";

export interface MetalDevice {
  name: string;
  /** Bytes that commands may use at once (recommendedMaxWorkingSetSize). */
  workingSet: number;
  /** Bytes of the largest buffer. */
  maxBuffer: number;
  /** Version of macOS, "" where it is not known. */
  macos: string;
  /** The system's build: pipelines compiled under another one are not used. */
  build: string;
  /** Residency sets (macOS 15). */
  residency: boolean;
  /** bfloat16 in kernels (macOS 14). */
  bfloat: boolean;
}

export type Device = "cpu" | "metal";
/** What can be asked for. */
export type DeviceChoice = Device | "auto";

/** Limits of native/backend/metal/kernels/params.h. */
const MOST_EXPERTS = 1024;
const MOST_CHOSEN = 8;
/** First macOS whose Metal has bfloat16. */
const BFLOAT_MACOS = 14;

/** The system's GPU, or why there is none. */
export function findMetal(): MetalDevice | { reason: string } {
  try {
    return parseDescription(metalDescription());
  } catch (thrown) {
    if (thrown instanceof CaravanError && thrown.code === "unsupported_model")
      return { reason: thrown.message };
    throw thrown;
  }
}

/** Reads cv_metal_info's lines. */
export function parseDescription(lines: string): MetalDevice {
  const values = new Map(
    lines
      .split("\n")
      .filter((line) => line.includes("="))
      .map((line) => [line.slice(0, line.indexOf("=")), line.slice(line.indexOf("=") + 1)]),
  );
  const macos = values.get("macos") ?? "";
  return {
    name: values.get("name") ?? "unknown",
    workingSet: Number(values.get("working_set") ?? 0),
    maxBuffer: Number(values.get("max_buffer") ?? 0),
    macos,
    build: values.get("build") ?? "",
    residency: values.get("residency") === "1",
    bfloat: macos === "" || Number.parseInt(macos, 10) >= BFLOAT_MACOS,
  };
}

/** What runs slower or in another way on this macOS than on a newer one, each in a sentence. */
export function fallbacks(device: MetalDevice): string[] {
  return [
    ...(device.bfloat ? [] : [`macOS ${device.macos} has no bfloat16 on the GPU: float16 is used instead`]),
    ...(device.residency
      ? []
      : [`macOS ${device.macos} has no residency sets: the system decides what stays in the GPU's memory`]),
  ];
}

/** Shapes that the kernels have (native/backend/metal/metal.c: check_shape); undefined when the model runs. */
export function metalLacks(config: ModelConfig): string | undefined {
  if (![16, 32, 64, 128].includes(config.headDim))
    return `the Metal kernels have no heads of ${config.headDim} elements`;
  if (config.experts > MOST_EXPERTS || config.expertsPerToken > MOST_CHOSEN)
    return `the Metal kernels choose at most ${MOST_CHOSEN} of ${MOST_EXPERTS} experts, not ${config.expertsPerToken} of ${config.experts}`;
  if (config.hiddenSize % 16 !== 0 || config.intermediateSize % 16 !== 0 || config.expertSize % 16 !== 0)
    return "the Metal kernels need matrices whose number of columns 16 divides";
  return undefined;
}

export interface ChosenDevice {
  device: Device;
  /** A sentence for the log and the model's page. */
  reason: string;
  kvType: KvType;
  /** Of a device "metal". */
  metal?: MetalDevice;
}

/** What is to run. */
export interface DeviceRequest {
  config: ModelConfig;
  /** What the cache keeps on a device with or without bfloat16. */
  kvType: (bfloat: boolean) => KvType;
}

/** Chooses where a model runs. Throws where Metal was asked for and cannot be. */
export function chooseDevice(
  asked: DeviceChoice,
  { config, kvType }: DeviceRequest,
  find: () => MetalDevice | { reason: string } = findMetal,
): ChosenDevice {
  const cpu = (reason: string): ChosenDevice => ({ device: "cpu", reason, kvType: kvType(true) });
  if (asked === "cpu") return cpu("the CPU, as asked");
  const metal = find();
  const type = kvType("reason" in metal || metal.bfloat);
  const lacks = "reason" in metal ? metal.reason : metalLacks(config);
  if (!("reason" in metal) && lacks === undefined) {
    const limit = `${metal.name}, whose GPU may use ${(metal.workingSet / 1e9).toFixed(1)} GB`;
    return { device: "metal", reason: [limit, ...fallbacks(metal)].join("; "), kvType: type, metal };
  }
  if (asked === "auto") return cpu(`the CPU, because ${lacks}`);
  throw new CaravanError("unsupported_model", `${lacks}`, {
    where: config.where,
    param: "device",
    hint: "--device cpu runs it on the processor",
  });
}
