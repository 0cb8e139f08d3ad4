// The lanes: what every worker did in the last steps, hop by hop. Time runs to the right; a lane is a worker.

import { byId, fillLegend } from "./elements.js";
import { microseconds, percent } from "./numbers.js";
import { colours } from "./theme.js";

const LANE = 34, GAP = 8, HEAD = 20, FOOT = 22;
const STRIP = 6; // below a lane's computing: its calls on the wire
const BATCHES = 4;
const COMPUTES = new Set(["attention", "send", "ffn", "sampling"]);
const WORDS = {
  attention: "attention", send: "hands its call over", ffn: "FFN", sampling: "sampling", bubble: "bubble: waits for an answer", queue: "queue: the call waits",
  "wire out": "wire, to the FFN worker", "wire back": "wire, back",
};
const COLOURS = ["text", "muted", "line", "wire", "sampling", "hatch", "shade", "batch-0", "batch-1", "batch-2", "batch-3"];

export class Lanes {
  constructor() {
    this._canvas = byId("lanes-canvas");
    this._tip = byId("lanes-tip");
    this._data = null; // the steps that are shown
    this._seen = 0; // when they came
    this._paused = false;
    this._boxes = [];
    this._steps = byId("lanes-steps");
    this._steps.addEventListener("change", () => this.redraw());
    byId("lanes-pause").addEventListener("click", (event) => {
      this._paused = !this._paused;
      event.currentTarget.setAttribute("aria-pressed", String(this._paused));
      event.currentTarget.textContent = this._paused ? "Go on" : "Pause";
    });
    this._canvas.addEventListener("pointermove", (event) => this._point(event));
    this._canvas.addEventListener("pointerleave", () => { this._tip.hidden = true; });
    new ResizeObserver(() => this.redraw()).observe(this._canvas.parentElement);
  }

  show({ lanes }) {
    if (lanes && !this._paused) {
      for (const { spans } of lanes.workers) {
        for (const span of spans) span[0] = lanes.names[span[0]];
      }
      this._data = lanes;
      this._seen = performance.now();
      byId("lanes-empty").hidden = true;
      this._canvas.hidden = false;
      this.redraw();
    }
    this._note();
  }

  pause() {}

  redraw() {
    if (!this._data) return;
    const view = this._view();
    this._fit(view.workers.length);
    this._draw(view);
    this._legend(view);
    this._describe(view);
    this._note();
  }

  /** The last so many of the steps that there are: where they begin, and the spans in them. */
  _view() {
    const { steps, workers, duration_us: duration } = this._data;
    const shown = steps.slice(-Number(this._steps.value));
    const from = shown[0][1];
    const within = workers.map((worker) => ({ ...worker, spans: worker.spans.filter(([, begin, length]) => begin + length > from) }));
    return { steps: shown, workers: within, from, to: duration, length: duration - from };
  }

  _note() {
    if (!this._data) return;
    const { length, steps } = this._view();
    const ago = Math.round((performance.now() - this._seen) / 1000);
    const parts = [`${steps.length} ${steps.length > 1 ? "steps" : "step"}, ${microseconds(length)}`];
    if (this._data.num_not_drawn) parts.push(`${this._data.num_not_drawn} more workers not drawn`);
    if (this._paused) parts.push("paused");
    else if (ago >= 3) parts.push(`${ago} s ago`);
    byId("lanes-note").textContent = parts.join(" · ");
  }

  _fit(count) {
    const width = this._canvas.parentElement.clientWidth;
    const height = HEAD + count * (LANE + GAP) + FOOT;
    const ratio = devicePixelRatio || 1;
    this._canvas.width = Math.round(width * ratio);
    this._canvas.height = Math.round(height * ratio);
    this._canvas.style.height = `${height}px`;
    this._context = this._canvas.getContext("2d");
    this._context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this._width = width;
    this._height = height;
    this._left = width < 520 ? 78 : 104;
  }

  // --- drawing --------------------------------------------------------------------------------------------------------

  _draw(view) {
    const pen = this._context;
    const paint = colours(...COLOURS);
    const x = (us) => this._left + ((this._width - this._left - 1) * (us - view.from)) / view.length;
    this._boxes = [];
    pen.clearRect(0, 0, this._width, this._height);
    pen.textBaseline = "middle";
    view.workers.forEach((worker, row) => this._drawLane(pen, paint, x, worker, HEAD + row * (LANE + GAP), view));
    this._drawSteps(pen, paint, x, view);
    this._drawAxis(pen, paint, x, view);
  }

  _drawLane(pen, paint, x, worker, top, view) {
    const high = LANE - STRIP - 2;
    pen.font = "12px ui-monospace, 'DejaVu Sans Mono', monospace";
    pen.fillStyle = paint.text;
    pen.textAlign = "left";
    pen.fillText(this._left < 100 ? worker.name.replace("attention", "attn") : worker.name, 0, top + high / 2 - 6);
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = paint.muted;
    pen.fillText(`${percent(busyShare(worker, view))} busy`, 0, top + high / 2 + 8);
    // All that is not computing is a bubble: of attention workers as recorded, of FFN workers what is between their calls.
    pen.fillStyle = paint.shade;
    pen.fillRect(x(view.from), top, x(view.to) - x(view.from), high);
    hatch(pen, paint.hatch, x(view.from), top, x(view.to) - x(view.from), high);
    for (const [name, begin, length, layer, batch, step] of worker.spans) {
      const left = Math.max(x(begin), this._left);
      const box = { left, width: Math.max(0.6, x(begin + length) - left), top, high, name, length, layer, batch, step };
      if (COMPUTES.has(name)) {
        pen.fillStyle = name === "sampling" ? paint.sampling : paint[`batch-${Math.max(0, batch) % BATCHES}`];
        pen.globalAlpha = name === "send" ? 0.6 : 1;
        pen.fillRect(left, top, box.width, high);
        pen.globalAlpha = 1;
      } else if (name === "queue" || name.startsWith("wire")) {
        Object.assign(box, { top: top + high + 2, high: STRIP });
        pen.fillStyle = name === "queue" ? paint[`batch-${Math.max(0, batch) % BATCHES}`] : paint.wire;
        pen.globalAlpha = name === "queue" ? 0.4 : 1;
        pen.fillRect(left, box.top + 1, box.width, STRIP - 2);
        pen.globalAlpha = 1;
      }
      this._boxes.push(box);
    }
    pen.strokeStyle = paint.line;
    pen.strokeRect(x(view.from) + 0.5, top + 0.5, x(view.to) - x(view.from) - 1, high - 1);
  }

  _drawSteps(pen, paint, x, view) {
    const bottom = this._height - FOOT;
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "left";
    pen.strokeStyle = pen.fillStyle = paint.muted;
    view.steps.forEach(([step, begin], index) => {
      const at = Math.round(x(begin)) + 0.5;
      const room = (view.steps[index + 1] ? x(view.steps[index + 1][1]) : this._width) - at;
      pen.beginPath();
      pen.setLineDash([3, 3]);
      pen.moveTo(at, 4);
      pen.lineTo(at, bottom);
      pen.stroke();
      pen.setLineDash([]);
      if (room > 66) pen.fillText(`step ${step.toLocaleString("en")}`, at + 5, 9);
    });
  }

  _drawAxis(pen, paint, x, view) {
    const tick = niceTick(view.length / Math.max(2, (this._width - this._left) / 90));
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = paint.muted;
    pen.strokeStyle = paint.line;
    for (let us = 0; us <= view.length; us += tick) {
      const at = x(view.from + us);
      pen.textAlign = us === 0 ? "left" : at > this._width - 30 ? "right" : "center";
      pen.fillText(tick >= 1000 ? `${us / 1000} ms` : `${us} µs`, at, this._height - 8);
      pen.beginPath();
      pen.moveTo(Math.round(at) + 0.5, this._height - FOOT);
      pen.lineTo(Math.round(at) + 0.5, this._height - FOOT + 4);
      pen.stroke();
    }
  }

  // --- words ----------------------------------------------------------------------------------------------------------

  _legend({ workers }) {
    const spans = workers.flatMap((worker) => worker.spans);
    const batches = new Set(spans.filter(([name]) => name === "attention").map(([, , , , batch]) => batch));
    const names = new Set(spans.map(([name]) => name));
    const entries = [...batches].sort().map((batch) => ({ label: `micro-batch ${batch}`, colour: `batch-${batch % BATCHES}` }));
    if (names.has("sampling")) entries.push({ label: "sampling", colour: "sampling" });
    entries.push({ label: "bubble", colour: "hatch", shape: "hatched" });
    if (names.has("wire out")) entries.push({ label: "on the wire", colour: "wire", shape: "thin" });
    if (names.has("queue")) entries.push({ label: "in the FFN worker's queue", colour: "batch-0", shape: "thin pale" });
    const key = JSON.stringify(entries);
    if (this._legendKey !== key) fillLegend(byId("lanes-legend"), entries);
    this._legendKey = key;
  }

  _describe(view) {
    const shares = view.workers.map((worker) => `${worker.name} computes ${percent(busyShare(worker, view))} of the time`);
    this._canvas.setAttribute("aria-label", `The last ${view.steps.length} steps, ${microseconds(view.length)}: ${shares.join(", ")}`);
  }

  _point(event) {
    const { left, top } = this._canvas.getBoundingClientRect();
    const x = event.clientX - left, y = event.clientY - top;
    const box = this._boxes.findLast((each) => x >= each.left - 1 && x <= each.left + each.width + 1 && y >= each.top && y <= each.top + each.high);
    this._tip.hidden = !box;
    if (!box) return;
    const parts = [WORDS[box.name] ?? box.name, microseconds(box.length), `step ${box.step}`];
    if (box.layer >= 0) parts.push(`layer ${box.layer}`);
    if (box.batch >= 0) parts.push(`micro-batch ${box.batch}`);
    this._tip.textContent = parts.join(" · ");
    this._tip.style.left = `${Math.max(0, Math.min(x + 12, this._width - this._tip.offsetWidth))}px`;
    this._tip.style.top = `${y + 16}px`;
  }
}

function busyShare({ spans }, { from, to, length }) {
  let busy = 0;
  for (const [name, begin, duration] of spans) {
    if (COMPUTES.has(name)) busy += Math.max(0, Math.min(begin + duration, to) - Math.max(begin, from));
  }
  return length ? Math.min(1, busy / length) : 0;
}

function hatch(pen, colour, left, top, width, high) {
  pen.save();
  pen.beginPath();
  pen.rect(left, top, width, high);
  pen.clip();
  pen.beginPath();
  for (let at = left - high; at < left + width; at += 6) {
    pen.moveTo(at, top + high);
    pen.lineTo(at + high, top);
  }
  pen.strokeStyle = colour;
  pen.lineWidth = 1;
  pen.stroke();
  pen.restore();
}

/** 1, 2 or 5 times a power of ten, at least this. */
function niceTick(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return power * ([1, 2, 5].find((factor) => factor * power >= least) ?? 10);
}
