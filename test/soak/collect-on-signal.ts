// Loaded into the executable under test, unchanged otherwise, by BUN_OPTIONS=--preload: at SIGUSR2 a process collects all its
// garbage and writes what is left to `CARAVAN_SOAK_HEAPS/PID.json`. Memory that is garbage comes and goes with the collector,
// which may wait for minutes; what is resident after it has run is what a leak would raise.

import { heapStats } from "bun:jsc";
import { renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const folder = process.env.CARAVAN_SOAK_HEAPS;
let times = 0;
if (folder !== undefined)
  process.on("SIGUSR2", () => {
    Bun.gc(true);
    const { heapSize, objectCount } = heapStats();
    const path = join(folder, `${process.pid}.json`);
    writeFileSync(`${path}.new`, JSON.stringify({ times: ++times, heapSize, objectCount }));
    renameSync(`${path}.new`, path);
  });
