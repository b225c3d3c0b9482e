// Waits for a condition with a limit, so that tests need no sleeps.

/** Resolves once `condition` holds; throws with `what` after `limitMs`, by default enough for a machine that is busy with other work. */
export async function until(condition: () => boolean, what: string, limitMs = 20_000): Promise<void> {
  const deadline = performance.now() + limitMs;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`waited ${limitMs} ms in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}
