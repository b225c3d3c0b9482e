// Ctrl-C and SIGTERM for commands that must tidy up: the first aborts a signal, so that half-written files go away; the
// second ends the program at once.

import { CaravanError } from "../errors.ts";

const EXIT_CODES = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 } as const;
type Ending = keyof typeof EXIT_CODES;

/** Runs `work`. When a signal ended it, the exit code is the one that shells expect. */
export async function interruptible(work: (signal: AbortSignal) => Promise<number>): Promise<number> {
  const abort = new AbortController();
  let ending: Ending | undefined;
  const handlers = (Object.keys(EXIT_CODES) as Ending[]).map((name) => {
    const handler = () => {
      if (ending !== undefined) process.exit(EXIT_CODES[name]);
      ending = name;
      abort.abort(new CaravanError("cancelled", "interrupted"));
    };
    process.on(name, handler);
    return () => process.off(name, handler);
  });
  try {
    return await work(abort.signal);
  } catch (thrown) {
    const cancelled = thrown instanceof CaravanError && thrown.code === "cancelled";
    if (ending === undefined || !cancelled) throw thrown;
    process.stderr.write(`caravan: ${thrown.toText()}\n`);
    return EXIT_CODES[ending];
  } finally {
    for (const remove of handlers) remove();
  }
}
