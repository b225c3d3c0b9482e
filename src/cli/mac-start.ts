// What serving on a Mac takes beside serving: the system must not fall asleep under it, and macOS asks for permissions that a
// person has to give. Elsewhere nothing of it happens.

import { stayAwake } from "../engine/binding.ts";
import { asCaravanError } from "../errors.ts";
import type { Logger } from "../log.ts";

export interface MacStart {
  log: Logger;
  /** Node's name of the system; others than "darwin" need nothing. */
  platform?: string;
  /** Darwin's version, "24.1.0": macOS 15. */
  release: string;
  /** Whether other nodes are looked for. */
  discovers: boolean;
  /** Holds the system awake until the function that it gives is called. */
  awake?: (why: string) => () => void;
}

/** First Darwin whose macOS (15) asks before a program may reach the local network. */
const LOCAL_NETWORK_DARWIN = 24;

/** Says what a person may have to do, and keeps the system awake until the returned function is called. */
export function startOnMac({
  log,
  platform = process.platform,
  release,
  discovers,
  awake = stayAwake,
}: MacStart): () => void {
  if (platform !== "darwin") return () => {};
  if (discovers && Number.parseInt(release, 10) >= LOCAL_NETWORK_DARWIN)
    log.info(
      "to find other Macs, caravan needs the permission Local Network: macOS asks for it once (System Settings, Privacy & Security, Local Network)",
    );
  try {
    const sleep = awake("caravan serves models");
    log.info("the system stays awake while caravan serves; the display may sleep");
    return sleep;
  } catch (thrown) {
    log.warn(`the system may fall asleep while caravan serves: ${asCaravanError(thrown).message}`);
    return () => {};
  }
}

/** The command that lets macOS run a downloaded executable, where it is still marked as downloaded. `attributes` are the names that
 * `xattr` prints. */
export function quarantineCommand(executable: string, attributes: string): string | undefined {
  const marked = attributes.split("\n").some((name) => name.trim() === "com.apple.quarantine");
  return marked ? `xattr -d com.apple.quarantine '${executable.replaceAll("'", "'\\''")}'` : undefined;
}
