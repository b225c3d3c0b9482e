// What doctor says of RDMA, over answers of systems that are not here.

import { describe, expect, test } from "bun:test";
import { asAdvice, deviceChecks, macChecks } from "../../src/cli/doctor-rdma.ts";
import { chosenDevices } from "../../src/engine/rdma-devices.ts";
import { rdmaChoice } from "../../src/settings.ts";

const up = { name: "rdma_en3", active: true, address: "169.254.1.2", problem: "" };
const down = {
  ...{ name: "rdma_en4", active: false, address: "" },
  problem: "rdma_en4 has no active port (is the cable in?)",
};

describe("devices", () => {
  test("are listed; one without a cable is no fault unless it was asked for", () => {
    const devices = [up, down];
    expect(deviceChecks({ devices }, []).map(({ ok, detail }) => [ok, detail])).toEqual([
      [true, "rdma_en3: port up, 169.254.1.2"],
      [true, "rdma_en4 has no active port (is the cable in?)"],
    ]);
    const wanted = deviceChecks(chosenDevices({ devices }, ["rdma_en4", "gone"]), ["rdma_en4", "gone"]);
    expect(wanted.map(({ ok, fix }) => [ok, fix])).toEqual([
      [true, undefined],
      [false, "Plug the cable in at both ends."],
      [false, "Name devices that `caravan doctor` lists, or none."],
    ]);
  });

  test("that are missing are no fault; a library that hangs is one", () => {
    expect(deviceChecks({ devices: [] }, [])).toEqual([
      { name: "RDMA", ok: true, detail: "no device; ranks on several nodes use TCP" },
    ]);
    expect(deviceChecks({ reason: "libibverbs.so.1 is not on this system" }, [])[0]?.ok).toBe(true);
    expect(deviceChecks({ reason: "libibverbs.so.1 is not on this system" }, ["a"])[0]?.ok).toBe(false);
    expect(deviceChecks({ reason: "the RDMA library has not answered for 20 s" }, [])[0]).toMatchObject({
      ...{ ok: false, fix: "Restart the machine." },
    });
  });

  test("come from the setting by name", () => {
    expect(rdmaChoice("")).toEqual([]);
    expect(rdmaChoice("off")).toBe("off");
    expect(rdmaChoice(" rdma_en3, rdma_en4,")).toEqual(["rdma_en3", "rdma_en4"]);
  });
});

describe("a Mac", () => {
  const good = { version: "26.2", control: "RDMA is enabled\n", bridge: undefined };
  const faults = (change: object) =>
    macChecks({ ...good, ...change })
      .filter(({ ok }) => !ok)
      .map(({ name, fix }) => [name, fix]);

  test("that has everything passes", () => {
    expect(faults({})).toEqual([]);
    expect(faults({ version: "27.0" })).toEqual([]);
    expect(faults({ bridge: "bridge0: flags=8822 mtu 1500\n\tstatus: inactive\n" })).toEqual([]);
  });

  test("that has no devices, and is not asked to, is told as advice", () => {
    const advice = macChecks({ ...good, control: "disabled" }).map(asAdvice);
    expect(advice.every(({ ok }) => ok)).toBe(true);
    expect(advice[1]?.detail).toMatch(/^disabled\. For RDMA: .*rdma_ctl enable/);
  });

  const cases: [string, object, string, RegExp][] = [
    ["an old system", { version: "26.1.3" }, "RDMA: macOS", /needs macOS 26\.2/],
    ["the switch off", { control: "disabled" }, "RDMA: switch", /rdma_ctl enable/],
    ["no rdma_ctl", { control: undefined }, "RDMA: switch", /Recovery/],
    [
      "ports in the bridge",
      { bridge: "bridge0: flags\n\tmember: en2 flags=3<LEARNING>\n\tmember: en3 flags=3\n" },
      "RDMA: bridge",
      /networksetup -setnetworkserviceenabled/,
    ],
  ];
  test.each(cases)("with %s is told what to do", (_, change, name, fix) => {
    expect(faults(change)).toEqual([[name, expect.stringMatching(fix)]]);
  });
});
