// Throughput and latency of this node over the last hour, from /history, and its last requests with their phases.
// @ts-check

import { element, gigabytes, messageOf, row, svg } from "/requests.js";

const EVERY_MS = 2000;
/** Of the plots' own units; they are stretched to the page. */
const WIDTH = 600;
const HEIGHT = 100;

const view = element("figures", HTMLElement);
const plots = element("plots", HTMLDivElement);

/** @typedef {{ at: number, tokens: number, prompt_tokens: number, inter_token_ms: number | null, first_token_ms: number | null, requests: number, failures: number, running: number }} Piece */
/** @typedef {{ piece_seconds: number, pieces: number, data: Piece[] }} History */
/** @typedef {{ title: string, unit: string, of: (piece: Piece | undefined, seconds: number) => number | null, whole?: boolean }} Series `whole`: means
 * nothing of a piece that is still being filled */

/** @type {Series[]} */
const SERIES = [
  {
    title: "Tokens a second",
    unit: "tokens/s",
    of: (piece, seconds) => (piece?.tokens ?? 0) / seconds,
    whole: true,
  },
  { title: "Time between tokens", unit: "ms", of: (piece) => piece?.inter_token_ms ?? null },
  { title: "Time to first token", unit: "ms", of: (piece) => piece?.first_token_ms ?? null },
  { title: "Requests at one time", unit: "requests", of: (piece) => piece?.running ?? 0 },
];

/** @param {number} value */
function words(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
}

/** The next number above that is easy to read: 1, 2, 5, 10 … @param {number} value */
function roundUp(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return ([1, 2, 5, 10].find((step) => step * power >= value) ?? 10) * power;
}

/** Pieces of the span that is chosen, oldest first; undefined: nothing happened in that time. @param {History} history */
function pieces(history) {
  const chosen = document.querySelector("#spans input:checked");
  const count = chosen instanceof HTMLInputElement ? Number(chosen.value) : history.pieces;
  const newest = history.data.at(-1)?.at ?? 0;
  const known = new Map(history.data.map((piece) => [piece.at, piece]));
  return Array.from({ length: count }, (_, i) => known.get(newest - (count - 1 - i) * history.piece_seconds));
}

/** @param {Series} series @param {(Piece | undefined)[]} shown @param {number} seconds of a piece */
function plot({ title, unit, of, whole }, shown, seconds) {
  const points = shown.map((piece, i) => (whole && i === shown.length - 1 ? null : of(piece, seconds)));
  const known = points.filter((value) => value !== null);
  const most = Math.max(...known, 0);
  const top = roundUp(most);
  // The newest piece is still being filled.
  const now = points.slice(-2).findLast((value) => value !== null) ?? null;
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = document.createElement("span");
  name.textContent = title;
  const value = document.createElement("strong");
  value.textContent = now === null ? "–" : `${words(now)} ${unit}`;
  caption.append(name, value);
  const minutes = Math.round((shown.length * seconds) / 60);
  const picture = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    role: "img",
    "aria-label": `${title}, the last ${minutes} minutes: ${now === null ? "nothing now" : `now ${words(now)}`}, at most ${words(most)} ${unit}`,
    class: "plot",
    preserveAspectRatio: "none",
  });
  for (const share of [0, 0.5, 1])
    picture.append(svg("line", { x1: 0, x2: WIDTH, y1: share * HEIGHT, y2: share * HEIGHT, class: "grid" }));
  const at = (/** @type {number} */ i) => ((i + 0.5) / points.length) * WIDTH;
  const height = (/** @type {number} */ each) => HEIGHT - (each / top) * HEIGHT;
  for (const run of runs(points)) {
    const line = run.map(([i, each]) => `${at(i).toFixed(1)} ${height(each).toFixed(1)}`).join("L");
    const first = at(run[0]?.[0] ?? 0).toFixed(1);
    const last = at(run.at(-1)?.[0] ?? 0).toFixed(1);
    picture.append(
      svg("path", { d: `M${first} ${HEIGHT}L${line}L${last} ${HEIGHT}Z`, class: "area" }),
      // A run of one point is a dot.
      svg("path", {
        d: `M${line}${run.length === 1 ? "l0.1 0" : ""}`,
        class: run.length === 1 ? "line dot" : "line",
      }),
    );
  }
  const axis = document.createElement("div");
  axis.className = "y";
  axis.append(label(words(top)), label(words(top / 2)), label("0"));
  const times = document.createElement("div");
  times.className = "x";
  times.append(label(`${minutes} min ago`), label("now"));
  figure.append(caption, axis, picture, times);
  return figure;
}

/** Stretches of points that are known. @param {(number | null)[]} points */
function runs(points) {
  /** @type {[number, number][][]} */
  const found = [];
  let open = false;
  points.forEach((value, i) => {
    if (value === null) {
      open = false;
      return;
    }
    if (!open) found.push([]);
    open = true;
    found.at(-1)?.push([i, value]);
  });
  return found;
}

/** @param {string} text */
function label(text) {
  const made = document.createElement("span");
  made.textContent = text;
  return made;
}

/** @typedef {{ received_at: string, model?: string, state: string, usage: { prompt_tokens: number, cached_tokens: number, completion_tokens: number }, phases: { name: string, start_ms: number, ms: number }[], choices: { engine?: { decode_ms: number }, tokens: number }[], error?: { message?: string } }} Trace */

const PHASES = new Map([
  ["body", "reading the request"],
  ["model", "loading the model"],
  ["prompt", "tokenizing"],
  ["first_token", "waiting and prefill"],
  ["generation", "generation"],
  ["reply", "sending"],
]);

/** The phases as a bar. @param {Trace} trace */
function phaseBar({ phases }) {
  const all = phases.reduce((sum, { ms }) => sum + ms, 0);
  const said = phases
    .filter(({ ms }) => ms >= 0.5)
    .map(({ name, ms }) => `${PHASES.get(name) ?? name} ${time(ms)}`)
    .join(", ");
  const bar = svg("svg", {
    viewBox: "0 0 100 10",
    class: "phases",
    role: "img",
    "aria-label": said === "" ? "less than a millisecond" : said,
    preserveAspectRatio: "none",
  });
  bar.append(svg("title", {}, said));
  let x = 0;
  for (const { name, ms } of phases) {
    const width = all === 0 ? 0 : (ms / all) * 100;
    bar.append(svg("rect", { x, y: 0, width, height: 10, class: `phase ${name}` }));
    x += width;
  }
  return bar;
}

/** @param {number} ms */
function time(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}

/** @param {Trace} trace */
function requestRow(trace) {
  const end = (/** @type {string} */ name) => {
    const phase = trace.phases.find((each) => each.name === name);
    return phase === undefined ? "" : time(phase.start_ms + phase.ms);
  };
  const { prompt_tokens: prompt, cached_tokens: cached, completion_tokens: answer } = trace.usage;
  const speed = speedOf(trace);
  const made = row([
    new Date(trace.received_at).toLocaleTimeString("en-GB"),
    trace.model ?? "",
    trace.state,
    `${prompt}`,
    `${cached}`,
    `${answer}`,
    speed === undefined ? "" : speed.toFixed(1),
    end("first_token"),
    end("reply"),
    phaseBar(trace),
  ]);
  if (trace.error?.message !== undefined) made.title = trace.error.message;
  return made;
}

/** Tokens a second of the first answer. @param {Trace} trace */
function speedOf({ choices }) {
  const choice = choices[0];
  const ms = choice?.engine?.decode_ms ?? 0;
  return choice !== undefined && ms > 0 && choice.tokens > 1 ? ((choice.tokens - 1) / ms) * 1000 : undefined;
}

/** Tells the other parts of the page how fast each model answered last, and what memory there is.
 * @param {Trace[]} traces @param {Memory} memory */
function tell(traces, memory) {
  /** @type {Map<string, number>} */
  const speeds = new Map();
  for (const trace of [...traces].reverse()) {
    const speed = speedOf(trace);
    if (trace.model !== undefined && speed !== undefined) speeds.set(trace.model, speed);
  }
  dispatchEvent(new CustomEvent("figures", { detail: { speeds, memory } }));
}

/** @typedef {{ total: number, available: number, models: Map<string, number> }} Memory */

/** @param {string} text Prometheus's text form @returns {Memory} */
function memoryOf(text) {
  /** @type {Memory} */
  const memory = { total: 0, available: 0, models: new Map() };
  for (const line of text.split("\n")) {
    const value = Number(line.slice(line.lastIndexOf(" ")));
    if (line.startsWith("caravan_machine_memory_bytes ")) memory.total = value;
    else if (line.startsWith("caravan_machine_memory_available_bytes ")) memory.available = value;
    const model = /^caravan_model_memory_bytes\{model_name="([^"\\]*)"/.exec(line)?.[1];
    if (model !== undefined) memory.models.set(model, value);
  }
  return memory;
}

/** @param {History} history @param {Memory} memory */
function showTotals(history, memory) {
  const sum = (/** @type {(piece: Piece) => number} */ of) =>
    history.data.reduce((all, piece) => all + of(piece), 0);
  const requests = sum((piece) => piece.requests);
  const failures = sum((piece) => piece.failures);
  element("totals", HTMLParagraphElement).textContent =
    `Last hour: ${requests} ${requests === 1 ? "request" : "requests"}${failures === 0 ? "" : `, ${failures} failed`}, ` +
    `${words(sum((piece) => piece.prompt_tokens))} tokens read, ${words(sum((piece) => piece.tokens))} written.` +
    (memory.total > 0
      ? ` Memory of this machine: ${gigabytes(memory.total - memory.available)} of ${gigabytes(memory.total)} in use.`
      : "");
}

/** False after the node has refused: until a person looks at the figures again. */
let allowed = true;
/** The list of requests is the administrator's. */
let listed = true;

async function look() {
  const seen = !view.hidden || !element("cluster", HTMLElement).hidden;
  if (!seen || (!allowed && view.hidden)) return;
  try {
    const [history, metrics] = await Promise.all([fetch("/history"), fetch("/metrics")]);
    allowed = history.ok && metrics.ok;
    if (!allowed) {
      element("totals", HTMLParagraphElement).textContent = "This node asks for a key: put it into Settings.";
      return;
    }
    const memory = memoryOf(await metrics.text());
    show(await history.json(), memory);
    /** @type {Trace[]} */
    let traces = [];
    const list = listed ? await fetch("/requests") : undefined;
    listed = list?.ok === true;
    if (list?.ok) traces = (await list.json()).data;
    tell(traces, memory);
    element("requests", HTMLTableElement).tBodies[0]?.replaceChildren(...traces.slice(0, 25).map(requestRow));
  } catch (thrown) {
    element("totals", HTMLParagraphElement).textContent = `The node does not answer: ${messageOf(thrown)}`;
  }
}

/** @param {History} history @param {Memory} memory */
function show(history, memory) {
  if (view.hidden) return;
  showTotals(history, memory);
  const shown = pieces(history);
  plots.replaceChildren(...SERIES.map((series) => plot(series, shown, history.piece_seconds)));
}

const key = element("phases-key", HTMLParagraphElement);
for (const [name, said] of PHASES) {
  const box = svg("svg", { viewBox: "0 0 10 10", class: "swatch", "aria-hidden": "true" });
  box.append(svg("rect", { width: 10, height: 10, class: `phase ${name}` }));
  const part = document.createElement("span");
  part.append(box, said);
  key.append(part, " ");
}

for (const id of ["figures", "cluster"])
  new MutationObserver(() => {
    listed = true;
    void look();
  }).observe(element(id, HTMLElement), { attributes: true, attributeFilter: ["hidden"] });
element("spans", HTMLFieldSetElement).addEventListener("change", () => void look());
void look();
setInterval(() => {
  if (document.visibilityState === "visible") void look();
}, EVERY_MS);
