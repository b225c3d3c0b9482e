// Pulls one model in a process of its own, for tests that kill it or limit it. Arguments: id, chunk size in bytes.
// The environment says where the hub and its cache are. Prints the error's code when it fails.

import { asCaravanError } from "../../src/errors.ts";
import { pullModel } from "../../src/model/download/pull.ts";

const [id = "", chunk = "65536"] = process.argv.slice(2);
try {
  const result = await pullModel(id, { chunkBytes: Number(chunk), connections: 2 });
  console.log(result.path);
} catch (error) {
  const known = asCaravanError(error);
  console.log(known.code);
  console.error(known.toText());
  process.exitCode = 1;
}
