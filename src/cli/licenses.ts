// caravan licenses: the licences of caravan and of everything inside the executable.

import notice from "../../NOTICE.txt" with { type: "text" };
import type { Command } from "./command.ts";

export const licenses: Command = {
  name: "licenses",
  summary: "print the licences of what this program contains",
  positionals: "",
  count: [0, 0],
  options: {},
  async run() {
    process.stdout.write(notice);
    return 0;
  },
};
