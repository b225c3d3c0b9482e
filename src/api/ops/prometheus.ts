// Counters and histograms as Prometheus reads them (text format 0.0.4). A metric knows its help text and label names;
// values live beside it, one series for each set of label values. Callers bound the label values.

/** Values of a metric's labels, in the order of its names. */
export type LabelValues = readonly string[];

interface Described {
  name: string;
  help: string;
  labels: readonly string[];
}

/** Only grows. Its samples end in `_total`, as the format wants it. */
export class Counter {
  readonly #series = new Map<string, { labels: LabelValues; value: number }>();

  constructor(readonly about: Described) {}

  add(labels: LabelValues, amount = 1): void {
    const key = labels.join("\0");
    const series = this.#series.get(key);
    if (series === undefined) this.#series.set(key, { labels, value: amount });
    else series.value += amount;
  }

  text(): string {
    return samples(this.about, "counter", `${this.about.name}_total`, [...this.#series.values()]);
  }
}

/** The observations of one set of label values. */
export class HistogramSeries {
  /** Observations in each bucket alone; the last one is above every bound. */
  readonly counts: Float64Array;
  sum = 0;

  constructor(
    readonly labels: LabelValues,
    readonly bounds: readonly number[],
  ) {
    this.counts = new Float64Array(bounds.length + 1);
  }

  observe(value: number): void {
    const { bounds, counts } = this;
    let at = 0;
    while (at < bounds.length && value > (bounds[at] ?? 0)) at += 1;
    counts[at] = (counts[at] ?? 0) + 1;
    this.sum += value;
  }
}

export class Histogram {
  readonly #series = new Map<string, HistogramSeries>();

  /** `bounds`: upper bounds of the buckets, rising. */
  constructor(
    readonly about: Described,
    readonly bounds: readonly number[],
  ) {}

  observe(labels: LabelValues, value: number): void {
    this.of(labels).observe(value);
  }

  /** The series of these label values: looked up once by who observes with every token. */
  of(labels: LabelValues): HistogramSeries {
    const key = labels.join("\0");
    let series = this.#series.get(key);
    if (series === undefined) {
      series = new HistogramSeries(labels, this.bounds);
      this.#series.set(key, series);
    }
    return series;
  }

  text(): string {
    const { name, labels: names } = this.about;
    const lines = head(this.about, "histogram");
    for (const { labels, counts, sum } of this.#series.values()) {
      let below = 0;
      counts.forEach((count, index) => {
        below += count;
        const bound = this.bounds[index];
        const le = bound === undefined ? "+Inf" : String(bound);
        lines.push(`${name}_bucket${labelText([...names, "le"], [...labels, le])} ${below}`);
      });
      lines.push(
        `${name}_sum${labelText(names, labels)} ${sum}`,
        `${name}_count${labelText(names, labels)} ${below}`,
      );
    }
    return ended(lines);
  }
}

/** A value that is read when it is asked for. */
export function gauge(
  about: Described,
  series: readonly { labels: LabelValues; value: number }[],
  type: "gauge" | "counter" = "gauge",
): string {
  return samples(about, type, type === "counter" ? `${about.name}_total` : about.name, series);
}

function samples(
  about: Described,
  type: "gauge" | "counter",
  sampleName: string,
  series: readonly { labels: LabelValues; value: number }[],
): string {
  const lines = head({ ...about, name: sampleName }, type);
  for (const { labels, value } of series)
    lines.push(`${sampleName}${labelText(about.labels, labels)} ${value}`);
  return ended(lines);
}

function head({ name, help }: Described, type: string): string[] {
  return [`# HELP ${name} ${help.replace(/\\/g, "\\\\").replace(/\n/g, "\\n")}`, `# TYPE ${name} ${type}`];
}

function ended(lines: readonly string[]): string {
  return lines.map((line) => `${line}\n`).join("");
}

function labelText(names: readonly string[], values: LabelValues): string {
  if (names.length === 0) return "";
  const pairs = names.map((name, index) => `${name}="${escapeLabel(values[index] ?? "")}"`);
  return `{${pairs.join(",")}}`;
}

function escapeLabel(value: string): string {
  return value.replace(/\\/g, "\\\\").replace(/"/g, '\\"').replace(/\n/g, "\\n");
}
