// Tokens of preprocessed Metal source, each with the file and line that it came from.

export interface Token {
  text: string;
  start: number;
  end: number;
  file: string;
  line: number;
}

const TOKEN =
  /"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[A-Za-z_]\w*|\.?\d(?:[eEpP][+-]|[\w.])*|::|->|\+\+|--|<<=|>>=|&&|\|\||[-+*/%&|^=<>!]=|\S/g;
const LINE_MARKER = /^# (\d+) "(.*?)"/;

/** `source` is the preprocessor's output, with its `# line "file"` markers. */
export function tokenize(source: string): Token[] {
  const tokens: Token[] = [];
  let file = "?";
  let line = 1;
  let start = 0;
  for (const text of source.split("\n")) {
    const marker = LINE_MARKER.exec(text);
    if (marker) {
      line = Number(marker[1]);
      file = marker[2] ?? "?";
    } else {
      if (!text.startsWith("#"))
        for (const found of text.matchAll(TOKEN)) {
          const at = start + found.index;
          tokens.push({ text: found[0], start: at, end: at + found[0].length, file, line });
        }
      line++;
    }
    start += text.length + 1;
  }
  return tokens;
}

export class SourceError extends Error {}

/** Reads tokens by index; past the end is an empty token. */
export class TokenList {
  readonly #tokens: readonly Token[];

  constructor(tokens: readonly Token[]) {
    this.#tokens = tokens;
  }

  get length(): number {
    return this.#tokens.length;
  }

  at(index: number): Token {
    return this.#tokens[index] ?? { text: "", start: 0, end: 0, file: "?", line: 0 };
  }

  text(index: number): string {
    return this.#tokens[index]?.text ?? "";
  }

  /** Index of the bracket that closes the one at `open`. */
  closing(open: number): number {
    const opens = this.text(open);
    const closes = { "(": ")", "[": "]", "{": "}" }[opens];
    let depth = 0;
    for (let i = open; i < this.length; i++) {
      if (this.text(i) === opens) depth++;
      else if (this.text(i) === closes && --depth === 0) return i;
    }
    throw new SourceError(`${this.at(open).file}:${this.at(open).line}: error: '${opens}' is never closed`);
  }

  /** Index of the '>' that closes the '<' at `open`. */
  closingAngle(open: number): number {
    let depth = 0;
    for (let i = open; i < this.length; i++) {
      const text = this.text(i);
      if (text === "<") depth++;
      else if (text === ">" && --depth === 0) return i;
      else if (text === "(") i = this.closing(i);
    }
    throw new SourceError(`${this.at(open).file}:${this.at(open).line}: error: '<' is never closed`);
  }

  slice(from: number, to: number): Token[] {
    return this.#tokens.slice(from, to);
  }
}

/** Splits at commas that are outside brackets. */
export function splitAtCommas(tokens: readonly Token[]): Token[][] {
  const parts: Token[][] = [];
  let part: Token[] = [];
  let depth = 0;
  for (const token of tokens) {
    if ("([{<".includes(token.text)) depth++;
    if (")]}>".includes(token.text)) depth--;
    if (token.text === "," && depth === 0) {
      parts.push(part);
      part = [];
    } else part.push(token);
  }
  if (part.length > 0) parts.push(part);
  return parts;
}

export interface Attribute {
  name: string;
  argument: string;
}

/** The [[attributes]] among tokens. */
export function attributesOf(tokens: readonly Token[]): Attribute[] {
  const list = new TokenList(tokens);
  const found: Attribute[] = [];
  for (let i = 0; i + 1 < list.length; i++) {
    if (list.text(i) !== "[" || list.text(i + 1) !== "[") continue;
    const end = list.closing(i);
    for (const part of splitAtCommas(list.slice(i + 2, end - 1)))
      found.push({
        name: part[0]?.text ?? "",
        argument: part
          .slice(2, -1)
          .map((token) => token.text)
          .join(""),
      });
    i = end;
  }
  return found;
}
