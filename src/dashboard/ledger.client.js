// Each node's memory for models as a bar and in words: what is loaded, and under it where the chosen next model would go, what would be
// unloaded for it, and the context that fits.
// @ts-check

import { element, gigabytes, svg } from "/requests.js";

/** @typedef {{ instance: string, model: string, rank: number, bytes: number, busy: boolean }} Loaded */
/** @typedef {{ model: string, bytes: number, default_context: number, context_that_fits: number, unload: string[], missing: number }} Next */
/** @typedef {{ planned: number, reserved: number, free: number, loaded: Loaded[], next: Next[] }} Ledger */
/** @typedef {{ id: string, name: string, ledger?: Ledger }} Node */

const part = element("memory", HTMLDivElement);
const choice = element("next-model", HTMLSelectElement);
const list = element("ledgers", HTMLUListElement);

/** Of the bars' own units; the node with the most memory for models takes all of the width. */
const WIDTH = 1000;
const NOW = { y: 0, height: 16 };
const THEN = { y: 20, height: 8 };

/** @type {Node[]} */
let latest = [];

/** Shows the ledgers of the nodes that have one. @param {Node[]} nodes */
export function showLedgers(nodes) {
  latest = nodes.filter(({ ledger }) => ledger !== undefined);
  part.hidden = latest.length === 0;
  const models = [...new Set(latest.flatMap(({ ledger }) => ledger?.next.map(({ model }) => model) ?? []))];
  const known = [...choice.options].map(({ value }) => value);
  // A list that is open under the finger stays.
  if (known.join("\n") !== models.join("\n")) {
    const { value } = choice;
    choice.replaceChildren(...models.map((model) => new Option(model, model)));
    if (models.includes(value)) choice.value = value;
  }
  choice.disabled = models.length === 0;
  draw();
}

function draw() {
  const most = Math.max(1, ...latest.map(({ ledger }) => ledger?.planned ?? 0));
  list.replaceChildren(
    ...latest.flatMap(({ name, ledger }) => (ledger === undefined ? [] : [ledgerItem(name, ledger, most)])),
  );
}

/** @param {string} name @param {Ledger} ledger @param {number} most bytes of the widest bar */
function ledgerItem(name, ledger, most) {
  const next = ledger.next.find(({ model }) => model === choice.value);
  const li = document.createElement("li");
  const title = document.createElement("strong");
  title.textContent = name;
  const words = document.createElement("span");
  words.textContent = `${gigabytes(ledger.free)} of ${gigabytes(ledger.planned)} left`;
  li.append(title, words, bar(name, ledger, next, most), line(loadedWords(ledger)));
  if (next !== undefined) li.append(line(nextWords(ledger, next)));
  return li;
}

/** @param {string} text */
function line(text) {
  const made = document.createElement("span");
  made.className = "line faint";
  made.textContent = text;
  return made;
}

/** @param {string} name @param {Ledger} ledger @param {Next | undefined} next @param {number} most */
function bar(name, { planned, loaded }, next, most) {
  const made = svg("svg", {
    ...{ viewBox: `0 0 ${WIDTH} 28`, preserveAspectRatio: "none", class: "ledger", role: "img" },
    "aria-label": `memory for models of ${name}; the words beside it say the same`,
  });
  /** @param {number} bytes */
  const units = (bytes) => (bytes / most) * WIDTH;
  /** @param {{ y: number, height: number }} row @param {number} from @param {number} bytes @param {string} kind @param {string} said */
  const block = (row, from, bytes, kind, said) => {
    const rect = svg("rect", { ...row, x: units(from), width: units(bytes), class: kind });
    rect.append(svg("title", {}, said));
    made.append(rect);
  };
  block(NOW, 0, planned, "room", `${gigabytes(planned)} for models`);
  // What would go lies at the end, above the place of what comes.
  const goes = (/** @type {Loaded} */ { instance }) => next?.unload.includes(instance) === true;
  let end = 0;
  let kept = 0;
  for (const each of [...loaded.filter((rank) => !goes(rank)), ...loaded.filter(goes)]) {
    const kind = goes(each) ? "goes" : each.busy ? "busy" : "idle";
    block(NOW, end, each.bytes, kind, `${rankWords(each)}${goes(each) ? ", would be unloaded" : ""}`);
    end += each.bytes;
    if (!goes(each)) kept = end;
  }
  if (next !== undefined) {
    const fits = next.missing === 0;
    const from = fits ? kept : end;
    // What has no room is cut off where the memory ends.
    const bytes = Math.min(next.bytes, Math.max(0, planned - from));
    block(THEN, from, bytes, fits ? "comes" : "misses", nextWords({ loaded }, next));
  }
  return made;
}

/** @param {Loaded} rank */
function rankWords({ model, rank, bytes, busy }) {
  return `${model}${rank === 0 ? "" : `, rank ${rank}`}, ${gigabytes(bytes)}, ${busy ? "in use" : "idle"}`;
}

/** @param {Ledger} ledger */
function loadedWords({ loaded }) {
  return loaded.length === 0 ? "Nothing is loaded." : `Loaded: ${loaded.map(rankWords).join("; ")}.`;
}

/** @param {Pick<Ledger, "loaded">} ledger @param {Next} next */
function nextWords(
  { loaded },
  { model, bytes, default_context: context, context_that_fits: fits, unload, missing },
) {
  const asked = `${model} with a context of ${tokens(context)} takes ${gigabytes(bytes)}`;
  const shorter = fits > 0 && fits < context ? ` A context of ${tokens(fits)} fits as it is.` : "";
  if (missing > 0) return `${asked}: ${gigabytes(missing)} missing.${shorter}`;
  if (unload.length === 0) return `${asked}; contexts up to ${tokens(fits)} fit.`;
  const names = unload.map((id) => loaded.find(({ instance }) => instance === id)?.model ?? id);
  return `${asked} and fits after unloading ${names.join(", ")}.${shorter}`;
}

/** @param {number} count */
function tokens(count) {
  return count.toLocaleString("en-GB");
}

choice.addEventListener("change", draw);

const key = element("ledger-key", HTMLParagraphElement);
for (const [kind, said] of [
  ["busy", "in use"],
  ["idle", "idle"],
  ["goes", "would be unloaded"],
  ["comes", "the next model"],
  ["misses", "not enough room"],
]) {
  const box = svg("svg", { viewBox: "0 0 10 10", class: "swatch ledger", "aria-hidden": "true" });
  box.append(svg("rect", { width: 10, height: 10, class: kind ?? "" }));
  const each = document.createElement("span");
  each.append(box, said ?? "");
  key.append(each, " ");
}
