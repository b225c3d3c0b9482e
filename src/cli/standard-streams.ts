// What happens when a command's output cannot be written: the reader of a pipe has left (`caravan models | head -1`), or
// the disk behind a redirection is full. Neither is worth a stack trace.

import { writeSync } from "node:fs";

/** Exit code of a program that a shell ended by SIGPIPE. */
const PIPE_EXIT_CODE = 141;

function codeOf(thrown: unknown): string {
  return thrown instanceof Error && "code" in thrown ? String(thrown.code) : "";
}

/** From now on a failure of standard output ends the program: silently when the reader has left, else with one line.
 * A failure of standard error is ignored: there is nowhere to report it. */
export function endWhenOutputFails(): void {
  process.stderr.on("error", () => undefined);
  process.stdout.on("error", (thrown: unknown) => {
    if (codeOf(thrown) === "EPIPE") process.exit(PIPE_EXIT_CODE);
    const reason = thrown instanceof Error ? thrown.message : String(thrown);
    try {
      writeSync(2, `caravan: the output cannot be written: ${reason}\n`);
    } catch {
      // Both are closed: the exit code is all that is left.
    }
    process.exit(1);
  });
}

/** For a program that serves on: what it prints is not its purpose. */
export function ignoreOutputFailures(): void {
  process.stderr.on("error", () => undefined);
  process.stdout.removeAllListeners("error").on("error", () => undefined);
}
