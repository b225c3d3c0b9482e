// How much memory this machine can still give. Linux: MemAvailable, and the limit of the control group that this
// process is in, where there is one (containers). Elsewhere: the system's total and free memory.

import { readFileSync } from "node:fs";
import { freemem, totalmem } from "node:os";

export interface MachineMemory {
  /** Bytes. */
  total: number;
  /** Bytes that can be used without swapping. */
  available: number;
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return undefined; // not this kind of system
  }
}

function number(text: string | undefined): number | undefined {
  const value = text === undefined ? Number.NaN : Number(text.trim());
  return Number.isFinite(value) ? value : undefined;
}

/** Bytes that the control group (v2, else v1) leaves; undefined without a limit. */
function groupRoom(): { total: number; available: number } | undefined {
  const limit =
    number(read("/sys/fs/cgroup/memory.max")) ?? number(read("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
  const used =
    number(read("/sys/fs/cgroup/memory.current")) ??
    number(read("/sys/fs/cgroup/memory/memory.usage_in_bytes"));
  if (limit === undefined || used === undefined || limit > totalmem()) return undefined;
  const stat = read("/sys/fs/cgroup/memory.stat") ?? read("/sys/fs/cgroup/memory/memory.stat") ?? "";
  // The page cache counts as used, but gives way.
  const cache = number(/^(?:file|total_cache) (\d+)$/m.exec(stat)?.[1]) ?? 0;
  return { total: limit, available: Math.max(0, limit - used + cache) };
}

export function availableMemory(): MachineMemory {
  const available = /^MemAvailable:\s+(\d+) kB$/m.exec(read("/proc/meminfo") ?? "")?.[1];
  const machine = {
    total: totalmem(),
    // macOS counts its file cache as used; what is not wired or compressed can be had. Half is a careful guess.
    available: available === undefined ? Math.max(freemem(), totalmem() / 2) : Number(available) * 1024,
  };
  const group = groupRoom();
  if (group === undefined) return machine;
  return {
    total: Math.min(machine.total, group.total),
    available: Math.min(machine.available, group.available),
  };
}

/** Most memory that this process had resident so far, in bytes. Linux counts mapped files too; macOS mostly. */
export function peakResidentBytes(): number {
  const high = /^VmHWM:\s+(\d+) kB$/m.exec(read("/proc/self/status") ?? "")?.[1];
  if (high !== undefined) return Number(high) * 1024;
  // Kilobytes or bytes, as the system has it; a peak is never below what is resident now.
  const { maxRSS } = process.resourceUsage();
  return maxRSS < process.memoryUsage.rss() ? maxRSS * 1024 : maxRSS;
}
