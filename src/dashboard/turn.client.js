// One turn of the conversation as it is shown: who speaks, the text (an answer's as Markdown), how far the model is, and the
// statistics at the end.
// @ts-check

import { copyButton, showMarkdown } from "/markdown.js";

/** How often the speed of an answer that is being written is shown anew. */
const SPEED_EVERY_MS = 500;

export class Turn {
  element = document.createElement("article");
  #body = document.createElement("div");
  #work = document.createElement("p");
  #stats = document.createElement("p");
  /** @type {HTMLElement} */
  #log;
  #text = "";
  /** @type {import("/markdown.js").Block[]} */
  #blocks = [];
  #frame = 0;
  #spokenMs = 0;

  /** @param {HTMLElement} log @param {"user" | "assistant"} role @param {string} name @param {string} text */
  constructor(log, role, name, text) {
    this.#log = log;
    this.element.className = `turn ${role}`;
    const who = document.createElement("div");
    who.className = "who";
    const speaker = document.createElement("span");
    speaker.textContent = name;
    who.append(speaker);
    this.#body.className = "text";
    this.#work.className = "work";
    this.#work.hidden = true;
    this.#stats.className = "stats";
    this.element.append(who, this.#body, this.#work, this.#stats);
    if (role === "user") this.#body.textContent = text;
    else {
      who.append(copyButton(() => this.#text, "Copy the answer"));
      this.add(text);
      this.#show();
    }
    log.append(this.element);
    log.scrollTop = log.scrollHeight;
  }

  get text() {
    return this.#text;
  }

  /** More of the answer. @param {string} text */
  add(text) {
    this.#text += text;
    // At most once a frame, however fast tokens come; a page in the background shows it later.
    if (this.#frame === 0) this.#frame = requestAnimationFrame(() => this.#show());
  }

  #show() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const log = this.#log;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    this.#blocks = showMarkdown(this.#body, this.#text, this.#blocks);
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  /** What happens before the first word. @param {string} text @param {number} [share] 0 to 1 */
  working(text, share) {
    this.#work.hidden = false;
    const bar = document.createElement("progress");
    bar.max = 1;
    if (share !== undefined) bar.value = share;
    bar.setAttribute("aria-label", text);
    this.#work.replaceChildren(bar, ` ${text}`);
    if (this.#text === "") this.#log.scrollTop = this.#log.scrollHeight;
  }

  /** While it writes. @param {number} tokens @param {number} sinceMs since the first */
  speed(tokens, sinceMs) {
    const now = performance.now();
    if (now - this.#spokenMs < SPEED_EVERY_MS && !this.#work.querySelector("progress")) return;
    this.#spokenMs = now;
    this.#work.hidden = false;
    const rate = sinceMs > 200 ? `, ${((tokens * 1000) / sinceMs).toFixed(1)} a second` : "";
    this.#work.textContent = `about ${tokens} ${tokens === 1 ? "token" : "tokens"}${rate}`;
  }

  /** The turn is over. @param {string} stats */
  end(stats) {
    this.#work.hidden = true;
    if (this.#frame !== 0) this.#show();
    this.#stats.textContent = stats;
    if (this.#log.lastElementChild === this.element) this.#log.scrollTop = this.#log.scrollHeight;
  }

  /** @param {string} message @param {string} advice */
  fail(message, advice) {
    this.#work.hidden = true;
    if (this.#frame !== 0) this.#show();
    this.element.classList.add("failed");
    const why = document.createElement("p");
    why.className = "why";
    why.textContent = message;
    this.#body.append(why);
    this.#stats.textContent = advice;
    this.#log.scrollTop = this.#log.scrollHeight;
  }
}
