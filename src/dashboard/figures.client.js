// Throughput and latency of this node over time, from /metrics, and its last requests. Points are kept in the page only.
// @ts-check

import { element, row, svg } from "/requests.js";

const EVERY_MS = 2000;
/** Five minutes. */
const POINTS = 150;
const WIDTH = 600;
const HEIGHT = 120;

const view = element("figures", HTMLElement);
const plots = element("plots", HTMLDivElement);

/** Counters of all models together at one time. @typedef {{ at: number, tokens: number, tokenSeconds: number, firsts: number, firstSeconds: number, running: number, waiting: number }} Reading */
/** @type {Reading | undefined} */
let last;

const SERIES = [
  { title: "Tokens a second", unit: "tokens/s", of: rate },
  { title: "Time between tokens", unit: "ms", of: between },
  { title: "Time to first token", unit: "ms", of: first },
  { title: "Requests that run or wait", unit: "requests", of: load },
].map((each) => ({ ...each, points: noPoints() }));

/** @returns {(number | null)[]} */
function noPoints() {
  return [];
}

/** @param {Reading} a @param {Reading} b */
function rate(a, b) {
  return ((b.tokens - a.tokens) / (b.at - a.at)) * 1000;
}
/** @param {Reading} a @param {Reading} b */
function between(a, b) {
  return b.tokens > a.tokens ? ((b.tokenSeconds - a.tokenSeconds) / (b.tokens - a.tokens)) * 1000 : null;
}
/** @param {Reading} a @param {Reading} b */
function first(a, b) {
  return b.firsts > a.firsts ? ((b.firstSeconds - a.firstSeconds) / (b.firsts - a.firsts)) * 1000 : null;
}
/** @param {Reading} _ @param {Reading} b */
function load(_, b) {
  return b.running + b.waiting;
}

/** @param {string} text Prometheus's text form @returns {Reading} */
function read(text) {
  /** @param {string} name */
  const sum = (name) => {
    let total = 0;
    for (const line of text.split("\n"))
      if (line.startsWith(`${name}{`) || line.startsWith(`${name} `))
        total += Number(line.slice(line.lastIndexOf(" ")));
    return total;
  };
  return {
    at: performance.now(),
    tokens: sum("vllm:inter_token_latency_seconds_count"),
    tokenSeconds: sum("vllm:inter_token_latency_seconds_sum"),
    firsts: sum("vllm:time_to_first_token_seconds_count"),
    firstSeconds: sum("vllm:time_to_first_token_seconds_sum"),
    running: sum("vllm:num_requests_running"),
    waiting: sum("vllm:num_requests_waiting"),
  };
}

/** @param {(typeof SERIES)[number]} series */
function plot({ title, unit, points }) {
  const known = points.filter((value) => value !== null);
  const top = Math.max(...known, 0);
  const now = points.at(-1);
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const words = (/** @type {number} */ value) => value.toLocaleString("en", { maximumFractionDigits: 1 });
  caption.textContent = `${title}: ${now === null || now === undefined ? "nothing now" : `${words(now)} ${unit}`}, most ${words(top)} ${unit}`;
  const picture = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    role: "img",
    "aria-label": caption.textContent,
    class: "plot",
    preserveAspectRatio: "none",
  });
  picture.append(svg("line", { x1: 0, y1: HEIGHT - 1, x2: WIDTH, y2: HEIGHT - 1, class: "axis" }));
  let path = "";
  let open = false;
  points.forEach((value, i) => {
    if (value === null) {
      open = false;
      return;
    }
    const x = ((POINTS - points.length + i) / (POINTS - 1)) * WIDTH;
    const y = HEIGHT - 2 - (top === 0 ? 0 : (value / top) * (HEIGHT - 8));
    path += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    if (!open) path += `l0.1 0`;
    open = true;
  });
  picture.append(svg("path", { d: path, class: "line" }));
  figure.append(caption, picture);
  return figure;
}

/** @typedef {{ received_at: string, model?: string, state: string, usage: { prompt_tokens: number, cached_tokens: number, completion_tokens: number }, phases: { name: string, start_ms: number, ms: number }[], choices: { engine?: { decode_ms: number }, tokens: number }[] }} Trace */

/** @param {Trace} trace */
function requestRow(trace) {
  const end = (/** @type {string} */ name) => {
    const phase = trace.phases.find((each) => each.name === name);
    return phase === undefined ? "" : `${Math.round(phase.start_ms + phase.ms)} ms`;
  };
  const { prompt_tokens: prompt, cached_tokens: cached, completion_tokens: answer } = trace.usage;
  const time = new Date(trace.received_at).toLocaleTimeString("en-GB");
  return row([
    time,
    trace.model ?? "",
    trace.state,
    `${prompt}`,
    `${cached}`,
    `${answer}`,
    end("first_token"),
    end("reply"),
  ]);
}

/** Tells the cluster's part of the page how fast each model answered last. @param {Trace[]} traces */
function tellSpeeds(traces) {
  /** @type {Map<string, number>} */
  const speeds = new Map();
  for (const { model, choices } of [...traces].reverse()) {
    const choice = choices[0];
    const ms = choice?.engine?.decode_ms ?? 0;
    if (model !== undefined && choice !== undefined && ms > 0 && choice.tokens > 1)
      speeds.set(model, ((choice.tokens - 1) / ms) * 1000);
  }
  dispatchEvent(new CustomEvent("figures", { detail: speeds }));
}

/** False after the node has refused: until a person looks at the figures again. */
let allowed = true;
/** The list of requests is the administrator's. */
let listed = true;

async function look() {
  if (!allowed && view.hidden) return;
  try {
    const reply = await fetch("/metrics");
    allowed = reply.ok;
    if (!reply.ok) return;
    take(read(await reply.text()));
    if (!view.hidden) plots.replaceChildren(...SERIES.map(plot));
    if (!listed) return;
    const list = await fetch("/requests");
    listed = list.ok;
    if (!list.ok) return;
    const { data } = await list.json();
    tellSpeeds(data);
    element("requests", HTMLTableElement).tBodies[0]?.replaceChildren(...data.slice(0, 20).map(requestRow));
  } catch {
    // The chat's part of the page says that the node is not there; the next look may find it again.
  }
}

/** @param {Reading} reading */
function take(reading) {
  if (last !== undefined)
    for (const series of SERIES) {
      series.points.push(series.of(last, reading));
      if (series.points.length > POINTS) series.points.shift();
    }
  last = reading;
}

new MutationObserver(() => {
  listed = true;
  void look();
}).observe(view, { attributes: true, attributeFilter: ["hidden"] });
void look();
setInterval(() => {
  if (document.visibilityState === "visible") void look();
}, EVERY_MS);
