// What a program's processes have resident. Linux, for /proc.

import { readdirSync, readFileSync } from "node:fs";

export interface ProcessMemory {
  pid: number;
  /** "serve", "runner", "rank" …: the program's first argument. */
  name: string;
  /** Bytes resident, shared ones included. */
  resident: number;
  /** Of these, bytes of mapped files below `apart`. */
  apart: number;
  /** Most that was resident so far. */
  peak: number;
}

/** The process and all that descend from it, it first. Those that end meanwhile are left out. `apart`: a folder whose mapped
 * files are counted apart. */
export function processMemory(pid: number, apart?: string): ProcessMemory[] {
  const parents = new Map<number, number>();
  for (const entry of readdirSync("/proc")) {
    if (!/^\d+$/.test(entry)) continue;
    const stat = whileAlive(() => readFileSync(`/proc/${entry}/stat`, "utf8"));
    // The name before the closing bracket may hold anything.
    const parent = stat?.slice(stat.lastIndexOf(")") + 2).split(" ")[1];
    if (parent !== undefined) parents.set(Number(entry), Number(parent));
  }
  const family = [pid];
  for (const member of family)
    for (const [child, parent] of parents) if (parent === member) family.push(child);
  return family.flatMap((each) => whileAlive(() => memoryOf(each, apart)) ?? []);
}

function memoryOf(pid: number, folder: string | undefined): ProcessMemory {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const bytes = (field: string) =>
    Number(new RegExp(`^${field}:\\s+(\\d+) kB`, "m").exec(status)?.[1] ?? 0) * 1024;
  return {
    pid,
    name: readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0")[1] ?? "",
    resident: bytes("VmRSS"),
    apart: folder === undefined ? 0 : mappedBelow(pid, folder),
    peak: bytes("VmHWM"),
  };
}

function mappedBelow(pid: number, folder: string): number {
  let inside = false;
  let sum = 0;
  for (const line of readFileSync(`/proc/${pid}/smaps`, "utf8").split("\n")) {
    if (/^[0-9a-f]+-[0-9a-f]+ /.test(line)) inside = line.includes(` ${folder}/`);
    else if (inside) sum += Number(/^Rss:\s+(\d+) kB/.exec(line)?.[1] ?? 0) * 1024;
  }
  return sum;
}

function whileAlive<T>(read: () => T): T | undefined {
  try {
    return read();
  } catch (thrown) {
    const code = thrown instanceof Error && "code" in thrown ? thrown.code : undefined;
    if (code === "ENOENT" || code === "ESRCH") return undefined;
    throw thrown;
  }
}
