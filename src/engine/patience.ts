// Waiting with a limit that is fair on a machine that is busy: only time in which this process ran counts, so that an answer that came
// while it stood still is read before anybody gives up on it.

const TICK_MS = 100;

/** The promise's value, or undefined after limitMs. Rejects as the promise does. */
export async function within<T>(promise: Promise<T>, limitMs: number): Promise<T | undefined> {
  let timer: ReturnType<typeof setInterval> | undefined;
  const late = new Promise<undefined>((resolve) => {
    let left = Math.ceil(limitMs / TICK_MS);
    timer = setInterval(() => {
      if (--left < 0) resolve(undefined);
    }, TICK_MS);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearInterval(timer);
  }
}
