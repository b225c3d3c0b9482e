// A line plot as SVG text: a logarithmic x axis, a y axis from zero, bars for spreads. No scripts, no outside requests.

export interface PlotPoint {
  x: number;
  y: number;
  /** Ends of the spread. */
  low?: number;
  high?: number;
}

export interface PlotSeries {
  name: string;
  points: readonly PlotPoint[];
  /** A limit rather than a measurement: drawn dashed. */
  dashed?: boolean;
}

export interface Plot {
  title: string;
  x: string;
  y: string;
  series: readonly PlotSeries[];
}

const WIDTH = 560;
const HEIGHT = 320;
const MARGIN = { left: 64, right: 16, top: 34, bottom: 46 };
const COLORS = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2"];

export function escapeHtml(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

/** Empty text when no series has a point. */
export function plotSvg(plot: Plot): string {
  const points = plot.series.flatMap((series) => series.points);
  if (points.length === 0) return "";
  const xs = [...new Set(points.map(({ x }) => x))].sort((a, b) => a - b);
  const scale = xScale(xs);
  const top = niceTop(Math.max(...points.map(({ y, high }) => Math.max(y, high ?? 0))));
  const yOf = (value: number): number =>
    HEIGHT - MARGIN.bottom - (value / top) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const parts = [
    `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" width="${WIDTH}" height="${HEIGHT}" role="img" aria-label="${escapeHtml(plot.title)}">`,
    text(WIDTH / 2, 18, plot.title, "middle", "title"),
    text(WIDTH / 2, HEIGHT - 8, plot.x, "middle"),
    `<text transform="translate(14 ${HEIGHT / 2}) rotate(-90)" text-anchor="middle">${escapeHtml(plot.y)}</text>`,
  ];
  for (let i = 0; i <= 4; i++) {
    const value = (top * i) / 4;
    const y = yOf(value).toFixed(1);
    parts.push(`<line class="grid" x1="${MARGIN.left}" x2="${WIDTH - MARGIN.right}" y1="${y}" y2="${y}"/>`);
    parts.push(text(MARGIN.left - 6, Number(y) + 4, shortNumber(value), "end"));
  }
  for (const x of xs) parts.push(text(scale(x), HEIGHT - MARGIN.bottom + 16, shortNumber(x), "middle"));
  plot.series.forEach((series, i) => {
    parts.push(drawSeries(series, COLORS[i % COLORS.length] ?? "#000", scale, yOf));
    const y = MARGIN.top + 14 * i + 4;
    parts.push(
      `<circle cx="${WIDTH - MARGIN.right - 6}" cy="${y - 4}" r="4" fill="${COLORS[i % COLORS.length]}"/>`,
      text(WIDTH - MARGIN.right - 14, y, series.name, "end"),
    );
  });
  return `${parts.join("\n")}\n</svg>`;
}

function drawSeries(
  { points, dashed }: PlotSeries,
  color: string,
  scale: (x: number) => number,
  yOf: (y: number) => number,
): string {
  const sorted = points.toSorted((a, b) => a.x - b.x);
  const path = sorted.map(({ x, y }) => `${scale(x).toFixed(1)},${yOf(y).toFixed(1)}`).join(" ");
  const parts = [
    `<polyline fill="none" stroke="${color}" stroke-width="2"${dashed ? ' stroke-dasharray="6 5"' : ""} points="${path}"/>`,
  ];
  if (dashed) return parts.join("");
  for (const { x, y, low, high } of sorted) {
    const at = scale(x).toFixed(1);
    if (low !== undefined && high !== undefined)
      parts.push(
        `<line stroke="${color}" x1="${at}" x2="${at}" y1="${yOf(low).toFixed(1)}" y2="${yOf(high).toFixed(1)}"/>`,
      );
    parts.push(`<circle cx="${at}" cy="${yOf(y).toFixed(1)}" r="3" fill="${color}"/>`);
  }
  return parts.join("");
}

/** Logarithmic between the least and the largest; one value stands in the middle. */
function xScale(xs: readonly number[]): (x: number) => number {
  const low = Math.log(xs[0] ?? 1);
  const span = Math.log(xs.at(-1) ?? 1) - low;
  const left = MARGIN.left + 16;
  const width = WIDTH - MARGIN.right - 16 - left;
  return (x) => (span === 0 ? left + width / 2 : left + ((Math.log(x) - low) / span) * width);
}

/** The smallest 1, 2, 2.5 or 5 times a power of ten that is not below `value`, a little head room included. */
function niceTop(value: number): number {
  if (value <= 0) return 1;
  const wanted = value * 1.05;
  const power = 10 ** Math.floor(Math.log10(wanted));
  return power * ([1, 2, 2.5, 5, 10].find((step) => step * power >= wanted) ?? 10);
}

function shortNumber(value: number): string {
  return value >= 10_000 ? `${Number((value / 1000).toFixed(1))}k` : String(Number(value.toPrecision(4)));
}

function text(x: number, y: number, words: string, anchor: string, kind = ""): string {
  return `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" text-anchor="${anchor}"${kind === "" ? "" : ` class="${kind}"`}>${escapeHtml(words)}</text>`;
}
