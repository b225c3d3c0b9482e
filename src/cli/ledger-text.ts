// A node's memory in `caravan cluster status`: what is loaded, and what of further models would fit.

import * as v from "valibot";
import { formatBytes } from "./progress.ts";

const bytes = v.number();

/** As in GET /cluster/state, nodes[].ledger. */
export const LedgerSchema = v.object({
  planned: bytes,
  reserved: bytes,
  free: bytes,
  loaded: v.array(
    v.object({ instance: v.string(), model: v.string(), rank: v.number(), bytes, busy: v.boolean() }),
  ),
  next: v.array(
    v.object({
      model: v.string(),
      bytes,
      default_context: v.number(),
      context_that_fits: v.number(),
      unload: v.array(v.string()),
      missing: bytes,
    }),
  ),
});
export type Ledger = v.InferOutput<typeof LedgerSchema>;

/** Lines without indentation. */
export function ledgerLines({ planned, free, loaded, next }: Ledger): string[] {
  const lines = [`memory for models: ${formatBytes(free)} of ${formatBytes(planned)} left`];
  for (const { model, rank, bytes: size, busy } of loaded)
    lines.push(`loaded: ${model}, rank ${rank}, ${formatBytes(size)}${busy ? "" : ", idle"}`);
  for (const each of next) {
    const { model, bytes: size, default_context: context, context_that_fits: fits, unload, missing } = each;
    if (missing > 0) {
      lines.push(
        `next: ${model} needs ${formatBytes(size)} with a context of ${context}: ${formatBytes(missing)} missing`,
      );
    } else if (unload.length > 0) {
      const names = unload.map((id) => loaded.find(({ instance }) => instance === id)?.model ?? id);
      lines.push(`next: ${model} with a context of ${context} after unloading ${names.join(", ")}`);
    } else lines.push(`next: ${model}, context up to ${fits}`);
  }
  return lines;
}
