// The models on this machine's disk as the API changes them: pulls from the hub, and deletes.

import type { ModelLibrary } from "../api/ops/model-library.ts";
import type { Logger } from "../log.ts";
import { pullModel } from "../model/download/pull.ts";
import { type ModelStore, removable, removeModel } from "../model/store.ts";

export function modelLibrary(store: () => ModelStore, log: Logger): ModelLibrary {
  return {
    async pull(name, { signal, onProgress }) {
      const { totalBytes } = await pullModel(name, {
        signal,
        onProgress,
        hub: store().hub,
        onRetry: (message) => log.warn(message, { model: name }),
      });
      return { bytes: totalBytes };
    },
    check(name) {
      removable(store(), name);
    },
    async remove(name) {
      return removeModel(store(), name).bytes;
    },
  };
}
