// Markdown of answers as elements of the page: what models write most (code, lists, headings, tables, emphasis, links). Every
// piece of text becomes a text node, so nothing that a model writes is ever markup of ours; images are never fetched.
// @ts-check

// Each of these takes time in proportion to the line, whatever the line: a model may write anything.
const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const LANGUAGE = /^\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/s;
/** Without its blanks. */
const RULE = /^(?:-{3,}|\*{3,}|_{3,})$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^:?-+:?$/;
/** Lists and quotes deeper than this are shown as text. */
const MAX_DEPTH = 6;

/** @typedef {{ source: string, node: Element }} Block */

/** Shows `text` in `parent`. What an earlier call made of the same beginning stays, so that a stream costs its last block.
 * @param {HTMLElement} parent @param {string} text @param {Block[]} before what the last call for this parent returned
 * @returns {Block[]} */
export function showMarkdown(parent, text, before) {
  /** @type {Block[]} */
  const blocks = [];
  const sources = split(text.split("\n"));
  sources.forEach((lines, i) => {
    const source = lines.join("\n");
    const old = before[i];
    if (old !== undefined && old.source === source) {
      blocks.push(old);
      return;
    }
    const node = block(lines, 0);
    if (old === undefined) parent.append(node);
    else old.node.replaceWith(node);
    blocks.push({ source, node });
  });
  for (const old of before.slice(sources.length)) old.node.remove();
  return blocks;
}

/** Cuts lines into blocks. @param {string[]} lines @returns {string[][]} */
function split(lines) {
  /** @type {string[][]} */
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (blank(lines[i])) {
      i += 1;
      continue;
    }
    const end = endOf(lines, i);
    blocks.push(lines.slice(i, end));
    i = end;
  }
  return blocks;
}

/** @param {string | undefined} line */
function blank(line) {
  return line === undefined || line.trim() === "";
}

/** Behind the last line of the block that begins at `i`. @param {string[]} lines @param {number} i */
function endOf(lines, i) {
  const first = lines[i] ?? "";
  const fence = fenceOf(first)?.mark;
  let end = i + 1;
  if (fence !== undefined) {
    while (end < lines.length && !isClosing(lines[end] ?? "", fence)) end += 1;
    return Math.min(end + 1, lines.length);
  }
  if (headingOf(first) !== undefined || isRule(first)) return end;
  if (ITEM.test(first)) {
    // Blank lines belong to the list when an item or something indented follows.
    let text = end; // the first line from `end` on that is not blank
    while (end < lines.length) {
      const line = lines[end] ?? "";
      text = Math.max(text, end);
      while (text < lines.length && blank(lines[text])) text += 1;
      const next = lines[text];
      if (
        next === undefined ||
        !(ITEM.test(next) || /^\s{2,}\S/.test(next) || (!blank(line) && !begins(line)))
      )
        break;
      end += 1;
    }
    return end;
  }
  if (QUOTE.test(first)) {
    while (end < lines.length && QUOTE.test(lines[end] ?? "")) end += 1;
    return end;
  }
  if (isTable(lines, i)) {
    while (end < lines.length && (lines[end] ?? "").includes("|")) end += 1;
    return end;
  }
  while (end < lines.length && !blank(lines[end]) && !begins(lines[end] ?? "") && !isTable(lines, end))
    end += 1;
  return end;
}

/** The fence that a line opens: its marks, and the language behind them. @param {string} line */
function fenceOf(line) {
  const found = FENCE.exec(line);
  if (found === null) return undefined;
  const rest = line.slice(found[0].length);
  if (rest.includes("`")) return undefined;
  return { mark: found[1] ?? "```", language: LANGUAGE.exec(rest)?.[1] ?? "" };
}

/** The heading that a line is. @param {string} line */
function headingOf(line) {
  const level = HEADING.exec(line)?.[1]?.length;
  if (level === undefined) return undefined;
  let end = line.length;
  while (line[end - 1] === "#") end -= 1;
  return { level, text: line.slice(level, end).trim() };
}

/** @param {string} line */
function isRule(line) {
  return /^ {0,3}[-*_]/.test(line) && RULE.test(line.replace(/\s+/g, ""));
}

/** @param {string} line */
function isTableRule(line) {
  return cells(line).every((cell) => TABLE_RULE.test(cell));
}

/** Those of a table's line. @param {string} line */
function cells(line) {
  return line
    .trim()
    .replace(/^\||\|$/g, "")
    .split("|")
    .map((cell) => cell.trim());
}

/** @param {string} line @param {string} fence */
function isClosing(line, fence) {
  const trimmed = line.trim();
  return trimmed.length >= fence.length && trimmed === (fence[0] ?? "`").repeat(trimmed.length);
}

/** Whether a line ends the paragraph before it. @param {string} line */
function begins(line) {
  return (
    fenceOf(line) !== undefined || HEADING.test(line) || ITEM.test(line) || QUOTE.test(line) || isRule(line)
  );
}

/** @param {string[]} lines @param {number} i */
function isTable(lines, i) {
  const rule = lines[i + 1] ?? "";
  return (lines[i] ?? "").includes("|") && rule.includes("-") && rule.includes("|") && isTableRule(rule);
}

/** @param {string[]} lines @param {number} depth @returns {Element} */
function block(lines, depth) {
  const first = lines[0] ?? "";
  const fence = fenceOf(first);
  if (fence !== undefined) return code(lines, fence.mark, fence.language);
  const heading = headingOf(first);
  // The page has its own first and second levels.
  if (heading !== undefined) return filled(`h${Math.min(6, heading.level + 2)}`, heading.text);
  if (isRule(first)) return document.createElement("hr");
  if (ITEM.test(first) && depth < MAX_DEPTH) return listOf(lines, depth);
  if (QUOTE.test(first) && depth < MAX_DEPTH) {
    const quote = document.createElement("blockquote");
    const inner = lines.map((line) => QUOTE.exec(line)?.[1] ?? "");
    quote.append(...split(inner).map((each) => block(each, depth + 1)));
    return quote;
  }
  if (isTable(lines, 0)) return tableOf(lines);
  return filled("p", lines.join("\n"));
}

/** @param {string[]} lines @param {string} fence @param {string} language */
function code(lines, fence, language) {
  const closed = lines.length > 1 && isClosing(lines.at(-1) ?? "", fence);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const figure = document.createElement("div");
  figure.className = "code";
  const head = document.createElement("div");
  head.className = "code-head";
  const name = document.createElement("span");
  name.textContent = language === "" ? "text" : language;
  head.append(
    name,
    copyButton(() => text, "Copy the code"),
  );
  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  const inner = document.createElement("code");
  inner.textContent = text;
  pre.append(inner);
  figure.append(head, pre);
  return figure;
}

/** A button that puts a text into the clipboard. @param {() => string} text @param {string} label */
export function copyButton(text, label) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.textContent = "Copy";
  button.setAttribute("aria-label", label);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here";
    }
    setTimeout(() => {
      button.textContent = "Copy";
    }, 1500);
  });
  return button;
}

/** @param {string[]} lines @param {number} depth */
function listOf(lines, depth) {
  const marker = ITEM.exec(lines[0] ?? "");
  const ordered = /\d/.test(marker?.[2] ?? "");
  const indent = (marker?.[1] ?? "").length;
  const list = document.createElement(ordered ? "ol" : "ul");
  if (ordered) list.setAttribute("start", String(Number.parseInt(marker?.[2] ?? "1", 10)));
  /** @type {string[][]} */
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found !== null && (found[1] ?? "").length <= indent + 1) items.push([found[3] ?? ""]);
    else items.at(-1)?.push(line.replace(/^\s{1,4}/, ""));
  }
  for (const each of items) {
    const item = document.createElement("li");
    const [lead = [], ...rest] = split(each);
    // A single paragraph stands in the item itself.
    if (lead.length > 0 && !begins(lead[0] ?? "")) item.append(...inline(lead.join("\n")));
    else if (lead.length > 0) item.append(block(lead, depth + 1));
    item.append(...rest.map((more) => block(more, depth + 1)));
    list.append(item);
  }
  return list;
}

/** @param {string[]} lines */
function tableOf(lines) {
  const wrap = document.createElement("div");
  wrap.className = "wide";
  wrap.tabIndex = 0;
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const cell of cells(lines[0] ?? "")) {
    const th = filled("th", cell);
    th.setAttribute("scope", "col");
    head.append(th);
  }
  const body = table.createTBody();
  for (const line of lines.slice(2)) {
    const row = body.insertRow();
    for (const cell of cells(line)) row.append(filled("td", cell));
  }
  wrap.append(table);
  return wrap;
}

/** @param {string} name @param {string} text */
function filled(name, text) {
  const made = document.createElement(name);
  made.append(...inline(text));
  return made;
}

/** Code, strong, emphasis, links; the first that matches at each place. No part of it can be slow on any text. */
const INLINE =
  /(`{1,8})([^`]+)\1(?!`)|\*\*([^*\n]+)\*\*|__([^_\n]+)__|\*([^*\s][^*\n]*)\*|\[([^[\]\n]{1,500})\]\((https?:\/\/[^\s()<>]{1,2000})\)/g;

/** @param {string} text @returns {(string | Element)[]} */
function inline(text) {
  /** @type {(string | Element)[]} */
  const parts = [];
  let done = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, , quoted, strong, strongToo, emphasis, label, address] = match;
    if (match.index > done) parts.push(text.slice(done, match.index));
    done = match.index + whole.length;
    if (quoted !== undefined) {
      const made = document.createElement("code");
      made.textContent = quoted;
      parts.push(made);
    } else if (address !== undefined && label !== undefined) {
      const made = document.createElement("a");
      made.href = address;
      made.target = "_blank";
      made.rel = "noopener noreferrer nofollow";
      made.textContent = label;
      // Where it leads is told without asking.
      made.title = address;
      parts.push(made);
    } else {
      const made = document.createElement(emphasis === undefined ? "strong" : "em");
      made.textContent = strong ?? strongToo ?? emphasis ?? "";
      parts.push(made);
    }
  }
  if (done < text.length) parts.push(text.slice(done));
  return parts;
}
