// The two questions that a download asks the hub: which commit a revision is, and which files that commit has.

import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import { COMMIT } from "../hub-cache.ts";
import type { HubLicence } from "../licence.ts";
import type { RemoteEntry } from "./plan.ts";
import { PassingFault, RetryBudget, type RetryLimits } from "./retry.ts";
import { openTransfer, type TransferOptions } from "./transfer.ts";

export interface HubApiOptions extends TransferOptions {
  retry: RetryLimits;
  onRetry?: (message: string) => void;
}

const MAX_JSON_BYTES = 64 * 1024 * 1024;
const MAX_PAGES = 100;

const INFO_SCHEMA = v.object({
  sha: v.pipe(v.string(), v.regex(COMMIT)),
  /** The head of the repository's page, as its authors wrote it: nothing in it is relied on. */
  cardData: v.fallback(
    v.nullish(
      v.object({
        license: v.fallback(v.nullish(v.string()), undefined),
        license_name: v.fallback(v.nullish(v.string()), undefined),
      }),
    ),
    undefined,
  ),
});

const size = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const TREE_SCHEMA = v.array(
  v.object({
    type: v.string(),
    path: v.string(),
    /** Git blob id; for LFS files that of the pointer. */
    oid: v.string(),
    size,
    lfs: v.nullish(v.object({ oid: v.pipe(v.string(), v.regex(/^[0-9a-f]{64}$/)), size })),
  }),
);

/** The commit that `revision` of model `id` stands for now, and what its page says of the licence. */
export async function fetchCommit(
  id: string,
  revision: string,
  options: HubApiOptions,
): Promise<{ commit: string; licence: HubLicence }> {
  const url = `${options.endpoint}/api/models/${id}/revision/${encodeURIComponent(revision)}`;
  const { sha, cardData } = (await fetchJson(url, INFO_SCHEMA, options)).value;
  const { license, license_name } = cardData ?? {};
  const name = license === "other" ? license_name : license;
  return { commit: sha, licence: { name: name ?? undefined } };
}

/** Every file of a commit, with sizes and hashes. */
export async function fetchTree(id: string, commit: string, options: HubApiOptions): Promise<RemoteEntry[]> {
  const entries: RemoteEntry[] = [];
  let url: string | undefined = `${options.endpoint}/api/models/${id}/tree/${commit}?recursive=true`;
  for (let page = 0; url !== undefined; page += 1) {
    if (page >= MAX_PAGES) throw badAnswer(url, `the list of files has more than ${MAX_PAGES} pages`);
    const answer: { value: v.InferOutput<typeof TREE_SCHEMA>; next: string | undefined } = await fetchJson(
      url,
      TREE_SCHEMA,
      options,
    );
    for (const { type, path, oid, size, lfs } of answer.value) {
      if (type === "file") entries.push({ path, size: lfs?.size ?? size, gitId: oid, sha256: lfs?.oid });
    }
    url = answer.next;
  }
  return entries;
}

/** GETs JSON and checks it. `next` is the page that the Link header names, which must be on the same server. */
async function fetchJson<S extends v.GenericSchema>(
  url: string,
  schema: S,
  options: HubApiOptions,
): Promise<{ value: v.InferOutput<S>; next: string | undefined }> {
  const budget = new RetryBudget(url, options.retry, options.signal, options.onRetry);
  for (;;) {
    try {
      const transfer = await openTransfer(url, undefined, options);
      const parts: Uint8Array[] = [];
      let bytes = 0;
      for await (const part of transfer.body) {
        bytes += part.byteLength;
        if (bytes > MAX_JSON_BYTES) throw badAnswer(url, "the answer is too large");
        parts.push(part);
      }
      const text = Buffer.concat(parts).toString("utf8");
      return { value: check(url, text, schema), next: nextPage(url, transfer.headers.get("link")) };
    } catch (error) {
      if (!(error instanceof PassingFault)) throw error;
      await budget.failed(error);
    }
  }
}

function check<S extends v.GenericSchema>(url: string, text: string, schema: S): v.InferOutput<S> {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    // A body cut short without an error looks like this too, so it is worth another try.
    throw new PassingFault("the hub's answer is not JSON", undefined, cause);
  }
  const parsed = v.safeParse(schema, value);
  if (parsed.success) return parsed.output;
  const issue = parsed.issues[0];
  const key = issue.path?.map((item) => String(item.key)).join(".") ?? "";
  throw badAnswer(url, `${key === "" ? "the answer" : key}: ${issue.message}`);
}

function nextPage(url: string, link: string | null): string | undefined {
  const target = /<([^>]+)>\s*;\s*rel="?next"?/.exec(link ?? "")?.[1];
  if (target === undefined) return undefined;
  const next = URL.canParse(target, url) ? new URL(target, url) : undefined;
  if (next?.origin !== new URL(url).origin) throw badAnswer(url, "the next page is on another server");
  return next.href;
}

function badAnswer(where: string, reason: string): CaravanError {
  return new CaravanError("download_failed", `the hub's answer makes no sense: ${reason}`, {
    where,
    hint: "is HF_ENDPOINT a Hugging Face hub?",
  });
}
