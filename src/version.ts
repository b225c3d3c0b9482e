// The version that `caravan --version` prints and the API reports.

import manifest from "../package.json";

export const VERSION: string = manifest.version;
