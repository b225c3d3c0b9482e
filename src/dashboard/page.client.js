// The page's program: a chat with the node's own API. Text from models and people is only ever put in as text.
// @ts-check

import { element, failure, HEADERS, linesOf } from "/requests.js";

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
    state.textContent = error instanceof Error ? error.message : String(error);
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
  } catch (thrown) {
    state.textContent = thrown instanceof Error ? thrown.message : String(thrown);
  }
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

/** @param {"user" | "assistant"} role @param {string} text */
function addTurn(role, text) {
  if (conversation.length <= 1) log.querySelector(".welcome")?.remove();
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : model.value;
  const body = document.createElement("p");
  body.className = "text";
  body.textContent = text;
  const stats = document.createElement("p");
  stats.className = "stats";
  turn.append(who, body, stats);
  log.append(turn);
  log.scrollTop = log.scrollHeight;
  return { turn, body, stats };
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

/** `data:` objects of a stream. @param {ReadableStream<BufferSource>} body */
async function* events(body) {
  for await (const line of linesOf(body))
    if (line.startsWith("data: {")) yield JSON.parse(line.slice("data: ".length));
}

/** Sends the conversation and shows the answer as it comes. */
async function answer() {
  const abort = new AbortController();
  running = abort;
  toggle();
  const { turn, body, stats } = addTurn("assistant", "");
  const started = performance.now();
  let firstMs = 0;
  let text = "";
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
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta?.content ?? "";
      if (delta !== "") {
        if (firstMs === 0) firstMs = performance.now() - started;
        const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        text += delta;
        body.textContent = text;
        if (atEnd) log.scrollTop = log.scrollHeight;
      }
      if (event.usage) {
        const seconds = (performance.now() - started - firstMs) / 1000;
        const { prompt_tokens: asked, completion_tokens: made } = event.usage;
        const speed = made > 1 && seconds > 0 ? `, ${((made - 1) / seconds).toFixed(1)} tokens/s` : "";
        stats.textContent = `${asked} tokens read, first after ${(firstMs / 1000).toFixed(2)} s; ${made} tokens written${speed}`;
      }
    }
    conversation.push({ role: "assistant", content: text });
  } catch (thrown) {
    if (abort.signal.aborted) {
      stats.textContent = "stopped";
      conversation.push({ role: "assistant", content: text });
    } else {
      turn.classList.add("failed");
      stats.textContent = "Regenerate tries again.";
      body.textContent = `${text}${text === "" ? "" : "\n"}${thrown instanceof Error ? thrown.message : thrown}`;
    }
  } finally {
    running = undefined;
    toggle();
    void lookAtModels();
    promptBox.focus();
  }
}

function toggle() {
  const busy = running !== undefined;
  send.hidden = busy;
  stopButton.hidden = !busy;
  again.disabled = busy || conversation.length === 0;
  clear.disabled = busy || conversation.length === 0;
}

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = promptBox.value.trim();
  if (text === "" || running !== undefined || model.value === "") return;
  promptBox.value = "";
  conversation.push({ role: "user", content: text });
  addTurn("user", text);
  void answer();
});
promptBox.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask.requestSubmit();
});
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
welcome();
void lookAtModels();
setInterval(() => {
  if (document.visibilityState === "visible" && running === undefined) void lookAtModels();
}, LOOK_AGAIN_MS);
