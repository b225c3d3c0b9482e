// What a node says and does when it starts on a Mac, played on any system.

import { describe, expect, test } from "bun:test";
import { quarantineCommand, startOnMac } from "../../src/cli/mac-start.ts";
import { stayAwake } from "../../src/engine/binding.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { libraryIsBuilt } from "../tools/native-header.ts";

/** A logger, and what it wrote. */
function logged() {
  const lines: string[] = [];
  const log = createLogger({ level: "debug", format: "text", write: (line) => lines.push(line) });
  return { log, text: () => lines.join("\n") };
}

describe("starting on a Mac", () => {
  test("keeps the system awake until the node ends, and names the permission that macOS 15 asks for", () => {
    const { log, text } = logged();
    const calls: string[] = [];
    const sleep = startOnMac({
      log,
      platform: "darwin",
      release: "24.1.0",
      discovers: true,
      awake: (why) => {
        calls.push(why);
        return () => calls.push("sleep");
      },
    });
    expect(calls).toEqual(["caravan serves models"]);
    expect(text()).toContain("Local Network");
    expect(text()).toContain("stays awake");
    sleep();
    expect(calls).toEqual(["caravan serves models", "sleep"]);
  });

  test("asks for nothing that macOS 14 or a node alone does not need", () => {
    for (const [release, discovers] of [
      ["23.6.0", true],
      ["24.1.0", false],
    ] as const) {
      const { log, text } = logged();
      startOnMac({ log, platform: "darwin", release, discovers, awake: () => () => {} });
      expect(text()).not.toContain("Local Network");
    }
  });

  test("serves all the same where the system refuses, and says so", () => {
    const { log, text } = logged();
    const awake = () => {
      throw new CaravanError("engine_failed", "refused");
    };
    startOnMac({ log, platform: "darwin", release: "23.0.0", discovers: false, awake })();
    expect(text()).toContain("may fall asleep while caravan serves: refused");
  });

  test("does nothing elsewhere", () => {
    const { log, text } = logged();
    startOnMac({ log, platform: "linux", release: "6.1.0", discovers: true })();
    expect(text()).toBe("");
  });
});

test.skipIf(!libraryIsBuilt() || process.platform === "darwin")(
  "the C library says that only macOS has power assertions",
  () => {
    expect(() => stayAwake("a test")).toThrow("only macOS has power assertions");
  },
);

test("a downloaded executable is freed by a command that the shell takes", () => {
  expect(quarantineCommand("/a/caravan", "com.apple.provenance\ncom.apple.quarantine\n")).toBe(
    "xattr -d com.apple.quarantine '/a/caravan'",
  );
  expect(quarantineCommand("/it's/caravan", "com.apple.quarantine")).toContain("'/it'\\''s/caravan'");
  expect(quarantineCommand("/a/caravan", "com.apple.provenance\n")).toBeUndefined();
});
