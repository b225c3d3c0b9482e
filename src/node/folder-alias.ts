// How a node and `caravan run` on the same machine mean the same folder without a path in the API: a model that was
// opened from a folder outside the store answers to a name made from the folder's path.

import { createHash } from "node:crypto";
import { realpathSync } from "node:fs";

/** The same for every path that leads to the folder. Throws what realpath throws. */
export function folderAlias(path: string): string {
  return `folder:${createHash("sha256").update(realpathSync(path)).digest("hex").slice(0, 16)}`;
}
