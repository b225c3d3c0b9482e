// Models on this machine's disk: what each is doing, loading and unloading, and downloading with progress.
// @ts-check

import { askApi, element, failure, gigabytes, HEADERS, linesOf, messageOf } from "/requests.js";

/** @typedef {{ id: string, state: string, progress?: number, error?: string }} Model */

const EVERY_MS = 1000;

const view = element("cluster", HTMLElement);
const list = element("models", HTMLUListElement);
const state = element("pull-state", HTMLParagraphElement);
const progress = element("pull-progress", HTMLProgressElement);
const startButton = element("pull-start", HTMLButtonElement);
const stopButton = element("pull-stop", HTMLButtonElement);

/** Bytes of memory, and measured tokens/s, by model. @type {Map<string, number>} */
let memory = new Map();
/** @type {Map<string, number>} */
const speeds = new Map();

/** @type {AbortController | undefined} */
let pulling;

/** @param {Model} model */
function modelItem(model) {
  const li = document.createElement("li");
  const loaded = model.state === "ready" || model.state === "loading";
  const what = model.state === "failed" ? `failed: ${model.error ?? "unknown reason"}` : model.state;
  const name = document.createElement("span");
  name.textContent = `${model.id}: ${what}`;
  li.append(name);
  const bytes = memory.get(model.id);
  const speed = speeds.get(model.id);
  const facts = [
    bytes === undefined ? "" : `${gigabytes(bytes)} of memory`,
    speed === undefined ? "" : `measured ${speed.toFixed(1)} tokens/s`,
  ].filter((text) => text !== "");
  if (facts.length > 0) {
    const told = document.createElement("span");
    told.className = "faint";
    told.textContent = facts.join(", ");
    li.append(told);
  }
  if (model.state === "loading") {
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = model.progress ?? 0;
    bar.setAttribute("aria-label", `Loading ${model.id}`);
    li.append(bar, `${Math.floor((model.progress ?? 0) * 100)} %`);
  }
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = loaded ? "Unload" : "Load";
  button.setAttribute("aria-label", `${button.textContent} ${model.id}`);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const body = JSON.stringify({ model: model.id });
      await askApi(loaded ? "/models/unload" : "/models/load", { method: "POST", body });
    } catch (thrown) {
      state.textContent = messageOf(thrown);
    }
    await look();
  });
  li.append(button);
  return li;
}

/** What the list shows, so that it is made anew only when something has changed and a button under the finger stays. */
let shown = "";

async function look() {
  if (view.hidden) return;
  try {
    const { data } = await askApi("/v1/models");
    const said = JSON.stringify(
      data.map((/** @type {Model} */ each) => [
        ...[each.id, each.state, each.progress, each.error],
        ...[memory.get(each.id), speeds.get(each.id)?.toFixed(1)],
      ]),
    );
    if (said === shown) return;
    shown = said;
    list.replaceChildren(...data.map(modelItem));
  } catch (thrown) {
    state.textContent = messageOf(thrown);
  }
}

element("pull", HTMLFormElement).addEventListener("submit", async (event) => {
  event.preventDefault();
  const name = element("pull-name", HTMLInputElement).value.trim();
  if (name === "" || pulling !== undefined) return;
  pulling = new AbortController();
  startButton.disabled = true;
  stopButton.hidden = false;
  state.textContent = `Asking the hub for ${name} …`;
  try {
    const body = JSON.stringify({ model: name });
    const reply = await fetch("/models/pull", {
      method: "POST",
      headers: HEADERS,
      body,
      signal: pulling.signal,
    });
    if (!reply.ok || reply.body === null) throw await failure(reply);
    for await (const line of linesOf(reply.body)) {
      if (line.trim() === "") continue;
      const report = JSON.parse(line);
      if (report.status === "failed") throw new Error(report.error?.message ?? "the download failed");
      if (report.status === "success") {
        state.textContent = `${name} is here.`;
        continue;
      }
      const { done_bytes: done, total_bytes: total } = report;
      progress.hidden = !(total > 0);
      progress.value = total > 0 ? done / total : 0;
      if (total > 0) state.textContent = `${name}: ${gigabytes(done)} of ${gigabytes(total)}`;
    }
  } catch (thrown) {
    state.textContent = pulling.signal.aborted
      ? `The download of ${name} is stopped; the next one goes on there.`
      : messageOf(thrown);
  }
  pulling = undefined;
  progress.hidden = true;
  startButton.disabled = false;
  stopButton.hidden = true;
  await look();
});
stopButton.addEventListener("click", () => pulling?.abort());

addEventListener("figures", (event) => {
  if (!(event instanceof CustomEvent)) return;
  for (const [model, speed] of event.detail.speeds) speeds.set(model, speed);
  memory = event.detail.memory.models;
});
new MutationObserver(() => void look()).observe(view, { attributes: true, attributeFilter: ["hidden"] });
void look();
setInterval(() => {
  if (document.visibilityState === "visible") void look();
}, EVERY_MS);
