// The page's program: a chat with the node's own API. Text from models and people is only ever put in as text.
// @ts-check

import { element, failure, HEADERS, linesOf, messageOf } from "/requests.js";
import { Turn } from "/turn.js";

/** @typedef {{ role: "system" | "user" | "assistant", content: string }} Message */

const model = element("model", HTMLSelectElement);
const state = element("state", HTMLParagraphElement);
const settings = element("settings", HTMLFormElement);
const settingsToggle = element("settings-toggle", HTMLButtonElement);
const log = element("log", HTMLDivElement);
const ask = element("ask", HTMLFormElement);
const promptBox = element("prompt", HTMLTextAreaElement);
const send = element("send", HTMLButtonElement);
const stopButton = element("stop", HTMLButtonElement);
const again = element("again", HTMLButtonElement);
const clear = element("clear", HTMLButtonElement);
const key = element("key", HTMLInputElement);

const LOOK_AGAIN_MS = 3000;
/** While an answer is waited for. */
const WATCH_MS = 700;
/** Lines of the prompt's box before it scrolls. */
const MOST_LINES = 8;

/** @type {Message[]} */
let conversation = [];
/** @type {AbortController | undefined} */
let running;

/** Gives the key for a cookie, which the browser keeps and scripts cannot read; the field is emptied. */
async function login() {
  if (key.value === "") return;
  try {
    const body = JSON.stringify({ key: key.value });
    const reply = await fetch("/login", { method: "POST", headers: HEADERS, body });
    if (!reply.ok) throw await failure(reply);
    key.value = "";
    key.placeholder = "accepted";
  } catch (error) {
    state.textContent = messageOf(error);
    return;
  }
  await lookAtModels();
}

/** Fills the model list and says what the chosen one is doing. */
async function lookAtModels() {
  try {
    const reply = await fetch("/v1/models", { headers: HEADERS });
    if (!reply.ok) throw await failure(reply);
    const { data } = await reply.json();
    const ids = data.map((/** @type {{ id: string }} */ each) => each.id);
    if (ids.join("\n") !== [...model.options].map((option) => option.value).join("\n")) {
      const before = model.value || sessionStorage.getItem("model");
      model.replaceChildren(
        ...ids.map((/** @type {string} */ id) => new Option(id, id, false, id === before)),
      );
    }
    const chosen = data.find((/** @type {{ id: string }} */ each) => each.id === model.value);
    state.textContent =
      chosen === undefined ? "No model is here yet: run `caravan pull MODEL`." : describe(chosen);
    send.disabled = chosen === undefined || running !== undefined;
    return chosen;
  } catch (thrown) {
    state.textContent = messageOf(thrown);
  }
  return undefined;
}

/** @param {{ state: string, progress?: number, context_length?: number, policy?: { mode: string, reason: string }, error?: string }} info */
function describe(info) {
  if (info.state === "loading") return `loading, ${Math.floor((info.progress ?? 0) * 100)} %`;
  if (info.state === "failed") return `failed: ${info.error ?? "unknown reason"}`;
  if (info.state !== "ready") return "loads with the first message";
  const context =
    info.context_length === undefined ? "" : `, context ${info.context_length.toLocaleString("en")} tokens`;
  return `ready${context}${info.policy === undefined ? "" : `, ${info.policy.mode}`}`;
}

/** @param {"user" | "assistant"} role @param {string} text @param {string} [name] */
function addTurn(role, text, name = model.value) {
  log.querySelector(".welcome")?.remove();
  return new Turn(log, role, role === "user" ? "You" : name, text);
}

/** Options of the settings form that are filled in. */
function sampling() {
  /** @type {Record<string, number>} */
  const options = {};
  for (const [id, name] of [
    ["temperature", "temperature"],
    ["top-p", "top_p"],
    ["max-tokens", "max_completion_tokens"],
    ["seed", "seed"],
  ]) {
    const { value } = element(/** @type {string} */ (id), HTMLInputElement);
    if (value !== "") options[/** @type {string} */ (name)] = Number(value);
  }
  return options;
}

/** `data:` objects of a stream, and how much of the prompt is computed, which comes as comments.
 * @param {ReadableStream<BufferSource>} body */
async function* events(body) {
  for await (const line of linesOf(body)) {
    if (line.startsWith("data: {")) yield { data: JSON.parse(line.slice("data: ".length)) };
    const prefill = /^: prefill (\d+)\/(\d+)/.exec(line);
    if (prefill !== null) yield { read: Number(prefill[1]), of: Number(prefill[2]) };
  }
}

/** Says that the model loads, as long as nothing has come. @param {Turn} turn @param {() => boolean} silent */
async function watchLoading(turn, silent) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, WATCH_MS));
    if (!silent()) return;
    const info = await lookAtModels();
    if (!silent()) return;
    if (info?.state === "loading") turn.working(`loading ${info.id}`, info.progress ?? 0);
  }
}

/** Sends the conversation and shows the answer as it comes. */
async function answer() {
  const abort = new AbortController();
  running = abort;
  toggle();
  const turn = addTurn("assistant", "");
  const started = performance.now();
  let firstMs = 0;
  let pieces = 0;
  let heard = false;
  turn.working("waiting");
  void watchLoading(turn, () => !heard && running === abort);
  try {
    const system = element("system", HTMLTextAreaElement).value.trim();
    const messages = system === "" ? conversation : [{ role: "system", content: system }, ...conversation];
    const reply = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: HEADERS,
      signal: abort.signal,
      body: JSON.stringify({
        model: model.value,
        messages,
        ...sampling(),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!reply.ok || reply.body === null) throw await failure(reply);
    let stats = "";
    for await (const { data: event, read, of } of events(reply.body)) {
      heard = true;
      if (event === undefined) {
        turn.working(
          `reading the prompt, ${read?.toLocaleString("en")} of ${of?.toLocaleString("en")} tokens`,
          of ? (read ?? 0) / of : 0,
        );
        continue;
      }
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta?.content ?? "";
      if (delta !== "") {
        if (firstMs === 0) firstMs = performance.now() - started;
        pieces += 1;
        turn.add(delta);
        turn.speed(pieces, performance.now() - started - firstMs);
      }
      if (event.usage) stats = statistics(event.usage, firstMs, performance.now() - started - firstMs);
    }
    turn.end(stats);
    conversation.push({ role: "assistant", content: turn.text });
  } catch (thrown) {
    if (abort.signal.aborted) {
      turn.end("stopped");
      conversation.push({ role: "assistant", content: turn.text });
    } else turn.fail(messageOf(thrown), "Regenerate tries again.");
  } finally {
    running = undefined;
    keep();
    toggle();
    void lookAtModels();
    promptBox.focus();
  }
}

/** @param {{ prompt_tokens: number, completion_tokens: number, prompt_tokens_details?: { cached_tokens: number } }} usage
 * @param {number} firstMs @param {number} writingMs */
function statistics(usage, firstMs, writingMs) {
  const { prompt_tokens: asked, completion_tokens: made } = usage;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const known = cached > 0 ? ` (${cached} cached)` : "";
  const speed = made > 1 && writingMs > 0 ? `, ${(((made - 1) * 1000) / writingMs).toFixed(1)} tokens/s` : "";
  return `${asked} tokens read${known}, first after ${(firstMs / 1000).toFixed(2)} s; ${made} tokens written${speed}`;
}

/** Keeps the conversation for a reload of this tab. */
function keep() {
  try {
    sessionStorage.setItem("conversation", JSON.stringify(conversation));
  } catch {
    // Too large for the browser's storage: then a reload begins anew.
  }
}

/** What an earlier load of this tab kept. */
function restore() {
  try {
    /** @type {unknown} */
    const kept = JSON.parse(sessionStorage.getItem("conversation") ?? "[]");
    if (!Array.isArray(kept)) return;
    conversation = kept.filter(
      (each) => (each?.role === "user" || each?.role === "assistant") && typeof each.content === "string",
    );
  } catch {
    return; // nothing that can be read: a new conversation
  }
  const name = sessionStorage.getItem("model") ?? "model";
  for (const { role, content } of conversation) if (role !== "system") addTurn(role, content, name).end("");
}

function toggle() {
  const busy = running !== undefined;
  send.hidden = busy;
  stopButton.hidden = !busy;
  again.disabled = busy || conversation.length === 0;
  clear.disabled = busy || conversation.length === 0;
}

/** The box grows with what is written into it. */
function fit() {
  promptBox.rows = Math.min(MOST_LINES, Math.max(2, promptBox.value.split("\n").length));
}

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = promptBox.value.trim();
  if (text === "" || running !== undefined || model.value === "") return;
  promptBox.value = "";
  fit();
  conversation.push({ role: "user", content: text });
  addTurn("user", text);
  keep();
  void answer();
});
promptBox.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask.requestSubmit();
});
promptBox.addEventListener("input", fit);
stopButton.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
again.addEventListener("click", () => {
  if (running !== undefined) return;
  if (conversation.at(-1)?.role === "assistant") conversation.pop();
  log.lastElementChild?.remove();
  void answer();
});
clear.addEventListener("click", () => {
  conversation = [];
  keep();
  log.replaceChildren();
  welcome();
  toggle();
  promptBox.focus();
});
settingsToggle.addEventListener("click", () => {
  settings.hidden = !settings.hidden;
  settingsToggle.setAttribute("aria-expanded", String(!settings.hidden));
});
settings.addEventListener("submit", (event) => event.preventDefault());
model.addEventListener("change", () => {
  sessionStorage.setItem("model", model.value);
  void lookAtModels();
});
key.addEventListener("change", () => void login());

function welcome() {
  const text = document.createElement("p");
  text.className = "welcome";
  text.textContent =
    "A model on this machine answers. Programs can ask too: the address of this page with /v1 behind it speaks OpenAI's API.";
  log.append(text);
}

/** Shows the part of the page that the address names: chat, cluster or figures. */
function showView() {
  const wanted = location.hash.slice(1);
  const view = wanted === "cluster" || wanted === "figures" ? wanted : "chat";
  for (const id of ["cluster", "figures"]) element(id, HTMLElement).hidden = view !== id;
  element("chat", HTMLElement).hidden = view !== "chat";
  ask.hidden = view !== "chat";
  for (const id of ["chat", "cluster", "figures"]) {
    const link = element(`to-${id}`, HTMLAnchorElement);
    if (id === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

addEventListener("hashchange", showView);
showView();
restore();
if (conversation.length === 0) welcome();
toggle();
void lookAtModels();
setInterval(() => {
  if (document.visibilityState === "visible" && running === undefined) void lookAtModels();
}, LOOK_AGAIN_MS);
