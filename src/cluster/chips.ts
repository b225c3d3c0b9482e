// Memory bandwidth of chips by their makers' data sheets, for clusters that are described and not measured.

/** Name as the system gives it without the maker, and bytes/s. Chips that come in two widths are named with their GPU cores. */
const SHEETS: readonly [name: string, bandwidth: number][] = [
  ["M1", 68.25e9],
  ["M1 Pro", 200e9],
  ["M1 Max", 400e9],
  ["M1 Ultra", 800e9],
  ["M2", 100e9],
  ["M2 Pro", 200e9],
  ["M2 Max", 400e9],
  ["M2 Ultra", 800e9],
  ["M3", 100e9],
  ["M3 Pro", 150e9],
  ["M3 Max 30-core", 300e9],
  ["M3 Max 40-core", 400e9],
  ["M3 Ultra", 819e9],
  ["M4", 120e9],
  ["M4 Pro", 273e9],
  ["M4 Max 32-core", 410e9],
  ["M4 Max 40-core", 546e9],
];

const BY_NAME: ReadonlyMap<string, number> = new Map(
  SHEETS.map(([name, bandwidth]) => [name.toLowerCase(), bandwidth]),
);

/** Bytes/s of memory; undefined for a chip that is not in the table. */
export function sheetBandwidth(chip: string): number | undefined {
  return BY_NAME.get(
    chip
      .toLowerCase()
      .replace(/^apple\s+/, "")
      .replace(/\s+/g, " ")
      .trim(),
  );
}

export function knownChips(): string[] {
  return SHEETS.map(([name]) => name);
}
