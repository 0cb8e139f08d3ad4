// What changes over time: throughput, requests, KV use, over the last two minutes that this page has seen.

import { byId, fillLegend } from "./elements.js";
import { percent, short } from "./numbers.js";
import { colours } from "./theme.js";

const WINDOWS_S = [30, 60, 120]; // the smallest that holds all, then the last two minutes
const HEIGHT = 132;

const CHARTS = [
  {
    id: "throughput",
    series: [{ label: "output", colour: "batch-0", filled: true }, { label: "prompt", colour: "batch-1" }],
    values: (update) => [update.rates.output_tokens, update.rates.prompt_tokens],
    write: (value) => `${short(value)} tokens/s`,
    least: 10,
  },
  {
    id: "requests",
    series: [{ label: "running", colour: "batch-0", filled: true }, { label: "in the queue", colour: "batch-1" }],
    values: (update) => [update.requests.running, update.requests.waiting],
    write: short,
    axis: (value) => (Number.isInteger(value) ? short(value) : ""),
    least: 4,
  },
  {
    id: "kv",
    series: [{ label: "in use", colour: "batch-2", filled: true }],
    values: (update) => [update.kv_cache_usage],
    write: percent,
    axis: (value) => `${Math.round(100 * value)} %`,
    range: [0, 1],
  },
];

export class Charts {
  constructor() {
    this._charts = CHARTS.map((kind) => new TimeChart(kind));
  }

  show(update) {
    const now = performance.now() / 1000;
    for (const chart of this._charts) chart.add(now, chart.kind.values(update));
    byId("throughput-value").textContent = short(Math.round(update.rates.output_tokens));
    byId("running-value").textContent = short(update.requests.running);
    byId("waiting-value").textContent = short(update.requests.waiting);
    byId("kv-value").textContent = percent(update.kv_cache_usage);
  }

  /** Nothing is known from here on: the lines break. */
  pause() {
    const now = performance.now() / 1000;
    for (const chart of this._charts) chart.add(now, chart.kind.series.map(() => null));
  }

  redraw() {
    for (const chart of this._charts) chart.draw();
  }
}

class TimeChart {
  constructor(kind) {
    this.kind = kind;
    this._data = [[], ...kind.series.map(() => [])];
    this._place = byId(`${kind.id}-chart`);
    this._legend = byId(`${kind.id}-legend`);
    this._plot = null;
    this._place.setAttribute("role", "img");
    new ResizeObserver(() => this._fit()).observe(this._place);
    this.draw();
  }

  add(now, values) {
    this._data[0].push(now);
    values.forEach((value, index) => this._data[index + 1].push(value));
    while (this._data[0][0] < now - WINDOWS_S.at(-1) - 2) this._data.forEach((column) => column.shift());
    this._plot.setData(this._data);
    this._tell(null);
    const shown = this.kind.series.map(({ label }, index) => `${label} ${this.kind.write(values[index])}`);
    this._place.setAttribute("aria-label", `Over time; now: ${shown.join(", ")}`);
  }

  /** Anew, with the colours of now. */
  draw() {
    this._plot?.destroy();
    this._plot = new uPlot(this._options(), this._data, this._place);
    this._tell(null);
  }

  _range() {
    const times = this._data[0];
    const now = times.at(-1) ?? 0;
    return [now - (WINDOWS_S.find((seconds) => seconds >= now - times[0]) ?? WINDOWS_S.at(-1)), now];
  }

  _fit() {
    const width = this._place.clientWidth;
    if (width && this._plot.width !== width) this._plot.setSize({ width, height: HEIGHT });
  }

  /** The values at the pointer, or the last ones. */
  _tell(index) {
    const last = this._data[0].length - 1;
    const at = index ?? last;
    const ago = at >= 0 && index !== null ? Math.round(this._data[0][last] - this._data[0][at]) : 0;
    fillLegend(this._legend, this.kind.series.map(({ label, colour }, number) => {
      const value = index === null ? "" : ` ${this.kind.write(this._data[number + 1][at])}${ago ? `, ${ago} s ago` : ""}`;
      return { label: `${label}${value}`, colour };
    }));
  }

  _options() {
    const { kind } = this;
    const found = colours("muted", "line", ...kind.series.map(({ colour }) => colour));
    const axis = { stroke: found.muted, font: "11px system-ui, sans-serif", ticks: { show: false } };
    return {
      width: this._place.clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      padding: [8, 16, 0, 0],
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
      hooks: { setCursor: [(plot) => { if (this._data[0].length) this._tell(plot.cursor.idx ?? null); }] },
      scales: {
        x: { time: false, range: () => this._range() },
        y: { range: (_, low, high) => kind.range ?? [0, Math.max(kind.least, 1.15 * (high ?? 0))] },
      },
      axes: [
        {
          ...axis,
          size: 22,
          gap: 4,
          grid: { show: false },
          splits: (_, axisIndex, low, high) => [2 / 3, 1 / 3, 0].map((share) => high - share * (high - low)),
          values: (plot, splits) => splits.map((split) => {
            const ago = Math.round(plot.scales.x.max - split);
            return ago ? `−${ago} s` : "now";
          }),
        },
        {
          ...axis,
          size: 42,
          gap: 4,
          space: 30,
          grid: { stroke: found.line, width: 1 },
          values: (_, splits) => splits.map(kind.axis ?? short),
        },
      ],
      series: [
        {},
        ...kind.series.map(({ label, colour, filled }) => ({
          label,
          stroke: found[colour],
          width: 2,
          fill: filled ? translucent(found[colour]) : undefined,
          points: { show: false },
        })),
      ],
    };
  }
}

function translucent(colour) {
  return `color-mix(in srgb, ${colour} 16%, transparent)`;
}
