// What the parts of the page share: finding elements, asking the API, and making text.
// @ts-check

export const HEADERS = { "content-type": "application/json" };

/** @template {Element} T @param {string} id @param {new () => T} type @returns {T} */
export function element(id, type) {
  const found = document.getElementById(id);
  if (!(found instanceof type)) throw new Error(`the page has no ${id}`);
  return found;
}

/** The error that a reply speaks of. @param {Response} reply */
export async function failure(reply) {
  const body = await reply.json().catch(() => undefined);
  const message = body?.error?.message ?? `the server answered ${reply.status}`;
  return new Error(reply.status === 401 ? `${message} Put it into Settings.` : message);
}

/** The API's answer as JSON. @param {string} path @param {RequestInit} [init] */
export async function askApi(path, init) {
  const reply = await fetch(path, { headers: HEADERS, ...init });
  if (!reply.ok) throw await failure(reply);
  return await reply.json();
}

/** @param {unknown} thrown */
export function messageOf(thrown) {
  return thrown instanceof Error ? thrown.message : String(thrown);
}

/** Lines of a reply as they come. @param {ReadableStream<BufferSource>} body */
export async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop() ?? "";
    yield* lines;
  }
}

/** A table row of texts and elements. @param {(string | Node)[]} cells */
export function row(cells) {
  const tr = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement("td");
    td.append(cell);
    tr.append(td);
  }
  return tr;
}

/** @template {keyof SVGElementTagNameMap} K @param {K} name @param {Record<string, string | number>} attributes @param {string} [text] */
export function svg(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text !== undefined) made.textContent = text;
  return made;
}

/** @param {number} bytes */
export function gigabytes(bytes) {
  return `${(bytes / 1e9).toFixed(bytes < 1e10 ? 1 : 0)} GB`;
}
