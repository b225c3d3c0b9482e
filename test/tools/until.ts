// Waits for a condition with a limit, so that tests need no sleeps.

/** Resolves once `condition` holds; throws with `what` after `limitMs`. */
export async function until(condition: () => boolean, what: string, limitMs = 3000): Promise<void> {
  const deadline = performance.now() + limitMs;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`waited ${limitMs} ms in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}
