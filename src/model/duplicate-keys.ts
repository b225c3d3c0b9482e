// Finds a key that occurs twice in one JSON object. JSON.parse keeps the last of them without a word, so a file
// could describe a tensor twice and show each reader another one.

const QUOTE = 34;
const BACKSLASH = 92;

/**
 * The first duplicate key of any object in `json`, or undefined. `json` must already have been accepted by
 * JSON.parse: the scan relies on balanced brackets and closed strings. Linear in the length of the text.
 */
export function findDuplicateKey(json: string): string | undefined {
  const open: (Set<string> | undefined)[] = []; // one entry an open bracket; undefined for arrays
  let expectKey = false;
  for (let i = 0; i < json.length; i++) {
    const c = json.charCodeAt(i);
    if (c === QUOTE) {
      const end = stringEnd(json, i);
      const keys = open[open.length - 1];
      if (expectKey && keys !== undefined) {
        const raw = json.slice(i + 1, end);
        const key = raw.includes("\\") ? String(JSON.parse(`"${raw}"`)) : raw;
        if (keys.has(key)) return key;
        keys.add(key);
        expectKey = false;
      }
      i = end;
    } else if (c === 123 /* { */) {
      open.push(new Set());
      expectKey = true;
    } else if (c === 91 /* [ */) {
      open.push(undefined);
      expectKey = false;
    } else if (c === 125 /* } */ || c === 93 /* ] */) {
      open.pop();
      expectKey = false;
    } else if (c === 44 /* , */) {
      expectKey = open[open.length - 1] !== undefined;
    }
  }
  return undefined;
}

/** Index of the quote that closes the string opened at `start`. */
function stringEnd(json: string, start: number): number {
  let i = start + 1;
  while (i < json.length) {
    const c = json.charCodeAt(i);
    if (c === BACKSLASH) i += 2;
    else if (c === QUOTE) return i;
    else i++;
  }
  return json.length;
}
