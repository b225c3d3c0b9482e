// Where caravan keeps things on this machine: its data, configuration and cache, and the Hugging Face hub's cache that
// it shares with other tools. Working the places out never touches the disk and never fails; makeFolder does.

import { accessSync, constants, mkdirSync } from "node:fs";
import { userInfo } from "node:os";
import { isAbsolute, join } from "node:path";
import { CaravanError } from "./errors.ts";

export type Environment = Readonly<Record<string, string | undefined>>;

export interface Paths {
  /** Imported models, user cards, node identity. */
  data: string;
  /** Holds caravan.toml. */
  config: string;
  /** Things that can be made again. */
  cache: string;
  /** `<data>/models`: imported models, a folder each. */
  models: string;
  /** `<data>/cards`: the user's own cards. */
  cards: string;
  /** The hub cache (`models--org--name/…`), shared with other tools. */
  hub: string;
  /** File that may hold the hub's token when HF_TOKEN is not set. */
  hubTokenFile: string;
}

/** Stands for the home of a user who has none. Nothing is ever found below it, and makeFolder refuses it. */
export const NO_HOME = "/nonexistent";

function absolute(path: string | undefined): string | undefined {
  return path !== undefined && isAbsolute(path) ? path : undefined;
}

/** HOME, else the home in the system's user list, else NO_HOME (a container with an unlisted user id has neither). */
export function homeFolder(env: Environment = process.env): string {
  const home = absolute(env.HOME);
  if (home !== undefined) return home;
  try {
    return absolute(userInfo().homedir) ?? NO_HOME;
  } catch {
    return NO_HOME; // the user id is in no user list: that is the answer, not a fault
  }
}

/**
 * The folders for an environment. Linux: the XDG variables (absolute ones only, as that specification demands) or their
 * defaults. macOS: Library/Application Support and Library/Caches, unless the XDG variables are set.
 * CARAVAN_DATA_DIR, CARAVAN_CONFIG_DIR and CARAVAN_CACHE_DIR win over both. The hub's cache follows HF_HUB_CACHE,
 * HUGGINGFACE_HUB_CACHE (its older name), HF_HOME and XDG_CACHE_HOME, in this order, like the hub's own library.
 */
export function resolvePaths(
  env: Environment = process.env,
  platform: string = process.platform,
  home: string = homeFolder(env),
): Paths {
  const expand = (path: string | undefined): string | undefined =>
    path === undefined || path === ""
      ? undefined
      : path === "~" || path.startsWith("~/")
        ? join(home, path.slice(1))
        : path;
  const mac = platform === "darwin";
  const support = join(home, "Library", "Application Support");
  const xdg = (name: string, linux: string[], macFolder: string): string =>
    join(absolute(env[name]) ?? (mac ? macFolder : join(home, ...linux)), "caravan");

  const data = expand(env.CARAVAN_DATA_DIR) ?? xdg("XDG_DATA_HOME", [".local", "share"], support);
  const config = expand(env.CARAVAN_CONFIG_DIR) ?? xdg("XDG_CONFIG_HOME", [".config"], support);
  const cache =
    expand(env.CARAVAN_CACHE_DIR) ?? xdg("XDG_CACHE_HOME", [".cache"], join(home, "Library", "Caches"));
  const hubHome =
    expand(env.HF_HOME) ?? join(absolute(env.XDG_CACHE_HOME) ?? join(home, ".cache"), "huggingface");
  return {
    data,
    config,
    cache,
    models: join(data, "models"),
    cards: join(data, "cards"),
    hub: expand(env.HF_HUB_CACHE) ?? expand(env.HUGGINGFACE_HUB_CACHE) ?? join(hubHome, "hub"),
    hubTokenFile: expand(env.HF_TOKEN_PATH) ?? join(hubHome, "token"),
  };
}

/**
 * Makes `folder` and its parents, and checks that files can be made in it. `purpose` completes "cannot …".
 * Throws permission_denied or disk_full with what to set instead.
 */
export function makeFolder(folder: string, purpose: string): void {
  const hint = "set HOME, or CARAVAN_DATA_DIR for caravan's own files and HF_HUB_CACHE for downloaded models";
  if (folder === NO_HOME || folder.startsWith(`${NO_HOME}/`)) {
    throw new CaravanError("permission_denied", `cannot ${purpose}: this user has no home folder`, { hint });
  }
  try {
    mkdirSync(folder, { recursive: true });
    accessSync(folder, constants.W_OK | constants.X_OK);
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? String(cause.code) : "";
    if (code === "ENOSPC" || code === "EDQUOT") {
      throw new CaravanError("disk_full", `cannot ${purpose}: the disk is full`, { where: folder, cause });
    }
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new CaravanError("permission_denied", `cannot ${purpose}: ${reason}`, {
      where: folder,
      hint,
      cause,
    });
  }
}
