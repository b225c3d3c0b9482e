// What survives when the program or the disk gives out in mid-download: real processes that are killed, real disks that
// are full.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CaravanError } from "../../src/errors.ts";
import { pullModel } from "../../src/model/download/pull.ts";
import { openStore, scanStore } from "../../src/model/store.ts";
import { MisbehavingHub, sha256 } from "../tools/misbehaving-hub.ts";
import { tinyModel } from "../tools/tiny-model.ts";
import { until } from "../tools/until.ts";

const ID = "org/tiny";
const WEIGHTS = "model.safetensors";
const CHUNK = 64 * 1024;
const CHILD = join(import.meta.dir, "..", "tools", "pull-child.ts");

let root = "";
let hub: MisbehavingHub;
let mounted: string | undefined;

beforeEach(async () => {
  root = mkdtempSync(join(tmpdir(), "caravan-resume-"));
  hub = await MisbehavingHub.start(ID, tinyModel(1_000_000));
});
afterEach(() => {
  hub.stop();
  if (mounted !== undefined) Bun.spawnSync(["umount", mounted]);
  mounted = undefined;
  rmSync(root, { recursive: true, force: true });
});

const environment = (): Record<string, string> => ({
  PATH: process.env.PATH ?? "",
  HOME: root,
  HF_ENDPOINT: hub.url,
  HF_HUB_CACHE: join(root, "hub"),
});

const weights = (): Uint8Array =>
  hub.files.find((file) => file.path === WEIGHTS)?.content ?? new Uint8Array();
const partFile = (hubFolder: string): string =>
  join(hubFolder, "models--org--tiny", "blobs", `${sha256(weights())}.caravan-part`);

/** Bytes that the map beside the part file says are there. */
function mappedBytes(part: string): number {
  if (!existsSync(`${part}.json`)) return 0;
  const map = JSON.parse(readFileSync(`${part}.json`, "utf8")) as { done: number[] };
  return map.done.reduce((sum, bytes) => sum + bytes, 0);
}

async function failure(pending: Promise<unknown>): Promise<CaravanError> {
  try {
    await pending;
  } catch (error) {
    if (error instanceof CaravanError) return error;
    throw error;
  }
  throw new Error("it did not fail");
}

function expectWhole(path: string): void {
  expect(Buffer.compare(readFileSync(join(path, WEIGHTS)), Buffer.from(weights()))).toBe(0);
}

describe("a process killed in mid-download", () => {
  test("goes on where its map says, and fetches only the bytes that are missing", async () => {
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS && earlier >= 6 ? { do: "stall", afterBytes: 1000 } : undefined;
    const child = Bun.spawn([process.execPath, CHILD, ID, String(CHUNK)], {
      env: environment(),
      stdout: "pipe",
      stderr: "pipe",
    });
    const part = partFile(join(root, "hub"));
    await until(() => mappedBytes(part) >= 6 * CHUNK, "six chunks on disk");
    child.kill("SIGKILL");
    await child.exited;
    const there = mappedBytes(part);
    expect(existsSync(join(root, "hub", "models--org--tiny", "snapshots"))).toBe(false);

    const store = openStore(join(root, "models"), environment());
    expect(scanStore(store).models).toEqual([]);
    expect(scanStore(store).partial.map(({ name, hint }) => [name, hint])).toEqual([
      [ID, `caravan pull ${ID}`],
    ]);

    hub.behave = () => undefined;
    hub.requests.length = 0;
    const result = await pullModel(ID, {
      endpoint: hub.url,
      hub: join(root, "hub"),
      env: environment(),
      chunkBytes: 4096,
    });
    expectWhole(result.path);
    expect(hub.bytesServed(WEIGHTS)).toBe(weights().byteLength - there);
    expect(hub.bytesServed("config.json")).toBe(0);
    expect(scanStore(store).models.map((model) => model.name)).toEqual([ID]);
  });

  test("several times in a row, at any point, it still ends with the right file", async () => {
    const part = partFile(join(root, "hub"));
    let last = 0;
    for (let round = 1; round <= 3; round += 1) {
      const target = last + 2 * CHUNK;
      hub.behave = ({ path }) =>
        path === WEIGHTS && mappedBytes(part) >= target ? { do: "stall", afterBytes: 77 } : undefined;
      const child = Bun.spawn([process.execPath, CHILD, ID, String(CHUNK)], {
        env: environment(),
        stdout: "ignore",
        stderr: "ignore",
      });
      await until(() => mappedBytes(part) >= target, `round ${round}`);
      child.kill("SIGKILL");
      await child.exited;
      last = mappedBytes(part);
    }
    hub.behave = () => undefined;
    hub.requests.length = 0;
    const result = await pullModel(ID, { endpoint: hub.url, hub: join(root, "hub"), env: environment() });
    expectWhole(result.path);
    expect(hub.bytesServed(WEIGHTS)).toBe(weights().byteLength - last);
  });
});

/** A disk of its own of `megabytes`, or undefined (and the reason printed) where none can be made. */
function smallDisk(megabytes: number): string | undefined {
  const folder = join(root, "disk");
  mkdirSync(folder);
  const mount = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", `size=${megabytes}m`, "tmpfs", folder], {
    stderr: "pipe",
  });
  if (mount.exitCode !== 0) {
    console.log(`skipped: no small disk can be mounted here (${mount.stderr.toString().trim()})`);
    return undefined;
  }
  mounted = folder;
  return folder;
}

const canMount = process.platform === "linux" && process.getuid?.() === 0;
if (!canMount) console.log("skipped: tests with a full disk mount a tmpfs, which needs root on Linux");

describe("a full disk", () => {
  test.skipIf(!canMount)("is found before anything is fetched", async () => {
    const disk = smallDisk(1);
    if (disk === undefined) return;
    const error = await failure(pullModel(ID, { endpoint: hub.url, hub: disk, env: environment() }));
    expect(error.code).toBe("disk_full");
    expect(error.message).toMatch(/needs 1\.0 MB more on this disk, which has [\d.]+ MB/);
    expect(hub.bytesServed()).toBe(0);
  });

  test.skipIf(!canMount)(
    "in mid-download keeps what is there; with space again only the rest is fetched",
    async () => {
      const disk = smallDisk(3);
      if (disk === undefined) return;
      const filler = join(disk, "filler");
      hub.behave = ({ path, earlier }) =>
        path === WEIGHTS && earlier === 8
          ? { do: "after", work: () => Bun.spawnSync(["sh", "-c", `cat /dev/zero > ${filler}`]) && undefined }
          : undefined;
      const options = { endpoint: hub.url, hub: disk, env: environment(), chunkBytes: CHUNK, connections: 1 };
      const error = await failure(pullModel(ID, options));
      expect(error.code).toBe("disk_full");
      expect(error.hint).toContain("what was downloaded is kept");

      rmSync(filler);
      const there = mappedBytes(partFile(disk));
      expect(there).toBeGreaterThanOrEqual(8 * CHUNK);
      hub.behave = () => undefined;
      hub.requests.length = 0;
      const result = await pullModel(ID, options);
      expectWhole(result.path);
      expect(hub.bytesServed(WEIGHTS)).toBe(weights().byteLength - there);
    },
  );

  test("a limit on the size of files counts as one, and the part stays good", async () => {
    const command = `trap '' XFSZ; ulimit -f 800; exec "${process.execPath}" "${CHILD}" ${ID} ${CHUNK}`;
    const child = Bun.spawn(["bash", "-c", command], {
      env: environment(),
      stdout: "pipe",
      stderr: "ignore",
    });
    expect((await new Response(child.stdout).text()).trim()).toBe("disk_full");
    const there = mappedBytes(partFile(join(root, "hub")));
    expect(there).toBeGreaterThanOrEqual(10 * CHUNK);
    hub.requests.length = 0;
    const result = await pullModel(ID, { endpoint: hub.url, hub: join(root, "hub"), env: environment() });
    expectWhole(result.path);
    expect(hub.bytesServed(WEIGHTS)).toBe(weights().byteLength - there);
    expect(
      readdirSync(join(root, "hub", "models--org--tiny", "blobs")).filter((name) => name.includes("part")),
    ).toEqual([]);
  });
});

describe("a home that cannot be written", () => {
  test("is an error that says what to set, and only when something must be written", async () => {
    const error = await failure(pullModel(ID, { endpoint: hub.url, env: { HOME: "/proc/nowhere" } }));
    expect(error.code).toBe("permission_denied");
    expect(error.hint).toContain("HF_HUB_CACHE");
    writeFileSync(join(root, "file"), "");
    const inFile = await failure(pullModel(ID, { endpoint: hub.url, env: { HOME: join(root, "file") } }));
    expect(inFile.code).toBe("permission_denied");
  });
});
