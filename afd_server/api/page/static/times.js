// How long output tokens take: the gaps between tokens as bars, the means of requests that ended as dots, the promise as a line.

import { byId, fillLegend, makeSvg } from "./elements.js";
import { short } from "./numbers.js";

const HEIGHT = 132;
const LEFT = 6, RIGHT = 6, TOP = 16, BOTTOM = 34; // of the bars' area; the dots lie below it
const LEAST_FACTOR = 8; // from the left to the right edge, at least

export class Times {
  constructor() {
    this._place = byId("times-chart");
    this._svg = makeSvg("svg", { role: "img", "aria-label": "No tokens yet" });
    this._place.append(this._svg);
    this._last = null;
    new ResizeObserver(() => this.redraw()).observe(this._place);
  }

  show({ times, promises_ms: promises }) {
    this._last = { times, promise: promises.tpot ?? null };
    byId("times-value").textContent = short(times.p50_ms);
    byId("times-more").textContent = times.p99_ms === null ? "" : `p90 ${short(times.p90_ms)} · p99 ${short(times.p99_ms)} ms`;
    fillLegend(byId("times-legend"), [
      { label: "token gaps", colour: "batch-0" },
      { label: "request means", colour: "batch-1", shape: "dot" },
      ...(promises.tpot ? [{ label: `promise ${short(promises.tpot)} ms`, colour: "bad", shape: "dashed" }] : []),
    ]);
    this.redraw();
  }

  pause() {}

  redraw() {
    if (!this._last) return;
    const { times, promise } = this._last;
    const width = this._place.clientWidth || 300;
    this._svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const [low, high] = range(times, promise);
    const x = (ms) => LEFT + ((width - LEFT - RIGHT) * Math.log(ms / low)) / Math.log(high / low);
    const base = HEIGHT - BOTTOM;
    const most = Math.max(1, ...times.buckets.map(([, , count]) => count));
    const parts = [makeSvg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: base + 0.5, y2: base + 0.5 })];
    for (const [from, to, count] of times.buckets) {
      const height = Math.max(2, ((base - TOP) * count) / most);
      const late = promise !== null && from >= promise;
      const bar = makeSvg("rect", {
        class: late ? "bar late" : "bar",
        x: x(from) + 0.5, width: Math.max(1, x(to) - x(from) - 1), y: base - height, height, rx: 1.5,
      });
      bar.append(makeSvg("title", {}, `${short(from)} to ${short(to)} ms: ${count} tokens`));
      parts.push(bar);
    }
    for (const ms of times.requests_ms) {
      const dot = makeSvg("circle", { class: "request", cx: x(Math.min(Math.max(ms, low), high)), cy: base + 9, r: 4 });
      dot.append(makeSvg("title", {}, `a request: ${short(ms)} ms a token`));
      parts.push(dot);
    }
    for (const ms of ticks(low, high)) {
      parts.push(makeSvg("text", { x: x(ms), y: HEIGHT - 4, "text-anchor": "middle" }, `${ms} ms`));
    }
    if (promise !== null) {
      const at = x(promise);
      parts.push(makeSvg("line", { class: "promise", x1: at, x2: at, y1: TOP - 4, y2: base + 14 }));
      const anchor = at > width - 70 ? "end" : "start";
      parts.push(makeSvg("text", { class: "promise-label", x: at + (anchor === "end" ? -5 : 5), y: TOP - 4, "text-anchor": anchor }, "promise"));
    }
    this._svg.replaceChildren(...parts);
    this._svg.setAttribute("aria-label", times.p50_ms === null
      ? "No tokens in the last 60 seconds"
      : `Time per token: median ${short(times.p50_ms)} ms, 99th percentile ${short(times.p99_ms)} ms${promise ? `, promised ${short(promise)} ms` : ""}`);
  }
}

/** The edges in ms: what there is, the promise, and room for both. */
function range(times, promise) {
  const shown = [...times.buckets.flatMap(([from, to]) => [from, to]), ...times.requests_ms];
  if (promise !== null) shown.push(promise);
  if (!shown.length) return [1, 100];
  let low = Math.min(...shown) / 1.15, high = Math.max(...shown) * 1.25;
  const missing = LEAST_FACTOR / (high / low);
  if (missing > 1) {
    low /= Math.sqrt(missing);
    high *= Math.sqrt(missing);
  }
  return [low, high];
}

function ticks(low, high) {
  const found = [];
  for (let exponent = Math.floor(Math.log10(low)); exponent <= Math.ceil(Math.log10(high)); exponent += 1) {
    for (const digit of [1, 2, 5]) {
      const ms = Number((digit * 10 ** exponent).toPrecision(1));
      if (ms > low * 1.1 && ms < high / 1.1) found.push(ms);
    }
  }
  return found.length > 6 ? found.filter((ms) => String(ms).includes("1")) : found;
}
