// caravan rdma: lists this machine's RDMA devices as JSON. Started by the node and by doctor, because the system's library may hang and
// a process can be killed; not for people, who have `caravan doctor`.

import { ownRdmaDevices } from "../engine/rdma-devices.ts";
import type { Command } from "./command.ts";

export const rdma: Command = {
  name: "rdma",
  summary: "list this machine's RDMA devices (internal)",
  positionals: "",
  count: [0, 0],
  options: {},
  internal: true,
  run: () => {
    process.stdout.write(`${JSON.stringify(ownRdmaDevices())}\n`);
    return Promise.resolve(0);
  },
};
