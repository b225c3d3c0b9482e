// The API on a loopback port with one scripted model that answers to any name, for programs that fuzz it.
//   bun test/openapi/server.ts KEY     prints the address, and serves until standard input ends; KEY administers

import { loopbackApi } from "../tools/loopback-api.ts";
import { MODEL, sayScript } from "../tools/scripted-models.ts";

const { models, server } = loopbackApi(sayScript("It is 15 °C."), { adminKeys: [process.argv[2] ?? ""] });
const { find, unload } = models;
models.find = (_name, options) => find(MODEL, options);
models.unload = async () => {
  const was = await unload(MODEL);
  models.info.state = "ready";
  return was;
};
process.stdout.write(`${server.url}\n`);
for await (const _ of Bun.stdin.stream());
await server.drain();
process.exit(0);
