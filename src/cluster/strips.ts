// Sets of bytes of a file as strips: so many bytes, again and again at a fixed distance. A run of bytes is one strip; a slice of a matrix's
// columns is one strip a row, in four numbers whatever the matrix's height. Union, difference, and cutting into pieces. Pure.

/**
 * Strip i, of `rows`, has the bytes [start + i * stride, start + i * stride + length). length and rows are at least 1; the stride is above
 * the length where there is more than one strip, and equals it where there is one.
 */
export type Strips = readonly [start: number, length: number, stride: number, rows: number];

/** Strips of another stride than others are looked at one by one up to this many. */
const MOST_APART = 64;

export function run(start: number, end: number): Strips {
  return [start, end - start, end - start, 1];
}

/** The same bytes in the form above; strips that touch are one. Empty where length or rows is 0. */
export function stripsOf(start: number, length: number, stride: number, rows: number): Strips[] {
  if (length <= 0 || rows <= 0) return [];
  if (rows === 1 || stride === length) return [run(start, start + length * rows)];
  return [[start, length, stride, rows]];
}

export function endOf([start, length, stride, rows]: Strips): number {
  return start + (rows - 1) * stride + length;
}

export function stripBytes(list: Iterable<Strips>): number {
  let sum = 0;
  for (const [, length, , rows] of list) sum += length * rows;
  return sum;
}

/**
 * What of `wanted` is not in `held`: never a byte that is not wanted, and every wanted byte that is not held. Where the two have different strides
 * and both many strips, what both have may be in the result.
 */
export function withoutStrips(wanted: Strips, held: Strips): Strips[] {
  if (held[0] >= endOf(wanted) || endOf(held) <= wanted[0]) return [wanted];
  if (wanted[3] === 1) return held[3] === 1 ? runWithoutRun(wanted, held) : runWithoutStrips(wanted, held);
  if (held[3] === 1) return withoutEach(wanted, aligned(held, wanted[0], wanted[2]), difference);
  if (wanted[2] === held[2]) return difference(wanted, held);
  if (wanted[3] <= MOST_APART) return strip(wanted).flatMap((one) => withoutStrips(one, held));
  return held[3] <= MOST_APART ? withoutEach(wanted, strip(held), withoutStrips) : [wanted];
}

/** As withoutStrips, for lists. What `wanted` has twice is in the result once. */
export function missingStrips(wanted: readonly Strips[], held: readonly Strips[]): Strips[] {
  const missing: Strips[] = [];
  for (const each of wanted) {
    let left: Strips[] = [each];
    const end = endOf(each);
    for (const list of [held, missing])
      for (const known of list)
        if (known[0] < end && endOf(known) > each[0])
          left = left.flatMap((part) => withoutStrips(part, known));
    missing.push(...left);
  }
  return missing;
}

/** The same set with fewer members where some touch: the next rows of others, or the next columns, or runs. Sorted. */
export function joinedStrips(list: readonly Strips[]): Strips[] {
  return addStrips([], list);
}

/** What joinedStrips has given, and more. */
export function addStrips(joined: readonly Strips[], more: readonly Strips[]): Strips[] {
  const all = [...joined];
  for (const each of more) {
    let one = each;
    for (;;) {
      const at = all.findIndex((other) => union(other, one) !== undefined);
      const other = all[at];
      const both = other === undefined ? undefined : union(other, one);
      if (both === undefined) break;
      all.splice(at, 1);
      one = both;
    }
    all.push(one);
  }
  return all.sort((a, b) => a[0] - b[0]);
}

/** Cut, in order, into lists of at most `mostBytes` and `mostStrips` each; strips are cut between rows where they can be. */
export function cutStrips(
  list: readonly Strips[],
  { mostBytes, mostStrips }: { mostBytes: number; mostStrips: number },
): Strips[][] {
  const lists: Strips[][] = [];
  const queue = list.toReversed();
  let last: Strips[] = [];
  let room = mostBytes;
  for (let each = queue.pop(); each !== undefined; each = queue.pop()) {
    if (room === 0 || last.length >= mostStrips) {
      lists.push(last);
      last = [];
      room = mostBytes;
    }
    const [piece, ...rest] = split(each, room, mostBytes);
    queue.push(...rest.toReversed());
    if (piece === undefined) room = 0;
    else {
      last.push(piece);
      room -= piece[1] * piece[3];
    }
  }
  if (last.length > 0) lists.push(last);
  return lists;
}

/** What fits into `room`, if anything, and what is left. */
function split(strips: Strips, room: number, mostBytes: number): [Strips | undefined, ...Strips[]] {
  const [start, length, stride, rows] = strips;
  if (length * rows <= room) return [strips];
  if (rows === 1) return [run(start, start + room), run(start + room, start + length)];
  const fit = Math.floor(room / length);
  const rest = (done: number) => stripsOf(start + done * stride, length, stride, rows - done);
  if (fit > 0) return [stripsOf(start, length, stride, fit)[0], ...rest(fit)];
  // A strip that never fits is cut like any run.
  if (length > mostBytes) return [run(start, start + room), run(start + room, start + length), ...rest(1)];
  return [undefined, strips];
}

function runs(start: number, end: number): Strips[] {
  return end > start ? [run(start, end)] : [];
}

function runWithoutRun(wanted: Strips, held: Strips): Strips[] {
  const [first, end] = [wanted[0], endOf(wanted)];
  return [...runs(first, Math.min(end, held[0])), ...runs(Math.max(first, endOf(held)), end)];
}

/** What lies in front, between and behind; a strip that sticks out of the run is a run beside it. */
function runWithoutStrips(wanted: Strips, held: Strips): Strips[] {
  const [first, end] = [wanted[0], endOf(wanted)];
  const [start, length, stride, rows] = held;
  const top = Math.max(0, Math.ceil((first - start) / stride));
  const bottom = Math.min(rows, Math.floor((end - start - length) / stride) + 1);
  const row = (i: number) => run(start + i * stride, start + i * stride + length);
  const beside = [top - 1, Math.max(top, bottom)].filter((i) => i >= 0 && i < rows).map(row);
  const left = withoutEach(wanted, beside, withoutStrips);
  if (top >= bottom) return left;
  const [from, to] = [start + top * stride, start + (bottom - 1) * stride + length];
  return left.flatMap((part) =>
    part[0] > from || endOf(part) < to
      ? [part]
      : [
          ...runs(part[0], from),
          ...stripsOf(from + length, stride - length, stride, bottom - top - 1),
          ...runs(to, endOf(part)),
        ],
  );
}

function withoutEach(
  wanted: Strips,
  held: readonly Strips[],
  without: (wanted: Strips, held: Strips) => Strips[],
): Strips[] {
  return held.reduce<Strips[]>((left, each) => left.flatMap((part) => without(part, each)), [wanted]);
}

function strip([start, length, stride, rows]: Strips): Strips[] {
  return Array.from({ length: rows }, (_, i) => run(start + i * stride, start + i * stride + length));
}

/** A run as strips at the distance `stride` from `origin`: what is in front of a whole row, whole rows, what is behind. The strips may be as long
 * as the stride. */
function aligned(held: Strips, origin: number, stride: number): Strips[] {
  const [first, end] = [held[0], endOf(held)];
  const from = origin + Math.ceil((first - origin) / stride) * stride;
  const to = origin + Math.floor((end - origin) / stride) * stride;
  if (from > to) return [[first, end - first, stride, 1]];
  const rows = (to - from) / stride;
  return [
    ...runs(first, from).map(([start, length]): Strips => [start, length, stride, 1]),
    ...(rows > 0 ? [[from, stride, stride, rows] as const] : []),
    ...runs(to, end).map(([start, length]): Strips => [start, length, stride, 1]),
  ];
}

/** Both at one distance, no strip longer than that. A held strip may reach into two wanted ones. */
function difference(wanted: Strips, held: Strips): Strips[] {
  const [start, length, , rows] = wanted;
  const stride = Math.max(wanted[2], held[2]);
  const shift = Math.floor((held[0] - start) / stride);
  const column = held[0] - start - shift * stride;
  for (const [by, at] of [
    [shift, column],
    [shift + 1, column - stride],
  ] as const) {
    const [left, right] = [Math.max(0, at), Math.min(length, at + held[1])];
    const [top, bottom] = [Math.max(0, by), Math.min(rows, by + held[3])];
    if (left >= right || top >= bottom) continue;
    const part = (row: number, count: number, from: number, to: number): Strips[] =>
      count <= 0 || to <= from ? [] : [[start + row * stride + from, to - from, stride, count]];
    return [
      ...part(0, top, 0, length),
      ...part(top, bottom - top, 0, left),
      ...part(top, bottom - top, right, length),
      ...part(bottom, rows - bottom, 0, length),
    ].flatMap((each) => difference(each, held));
  }
  return stripsOf(start, length, stride, rows);
}

/** Both as one; undefined where that is not one list of strips, or would be one only by chance. */
function union(a: Strips, b: Strips): Strips | undefined {
  const [first, second] = a[0] <= b[0] ? [a, b] : [b, a];
  const [start, length, , rows] = first;
  if (rows === 1 && second[3] === 1)
    return second[0] <= start + length ? run(start, Math.max(endOf(first), endOf(second))) : undefined;
  const stride = rows > 1 ? first[2] : second[2];
  if (second[3] > 1 && second[2] !== stride) return undefined;
  if (second[0] === start + length && second[3] === rows && length + second[1] <= stride)
    return stripsOf(start, length + second[1], stride, rows)[0];
  if (second[0] === start + rows * stride && second[1] === length)
    return stripsOf(start, length, stride, rows + second[3])[0];
  return undefined;
}
