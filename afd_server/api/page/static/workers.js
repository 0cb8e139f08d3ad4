// The table of workers. Rows stay in place while their workers do, so that a reader, or a screen reader, keeps its place.

import { byId, make } from "./elements.js";
import { percent, short, span } from "./numbers.js";

const TONES = { serving: "good", restarting: "caution", loading: "caution", draining: "caution", down: "bad" };
const COLUMNS = ["requests", "kv", "step", "bubbles", "restarts", "process"];

export class Workers {
  constructor() {
    this._body = byId("workers");
    this._rows = new Map();
  }

  show({ workers, worker_counts: counts }) {
    const names = new Set(workers.map((worker) => worker.name));
    for (const [name, row] of this._rows) {
      if (!names.has(name)) {
        row.element.remove();
        this._rows.delete(name);
      }
    }
    for (const worker of workers) this._row(worker.name).show(worker);
    const total = Object.values(counts).reduce((sum, count) => sum + count, 0);
    const notes = Object.entries(counts).filter(([, count]) => count).map(([state, count]) => `${count} ${state}`);
    if (total > workers.length) notes.push(`${total - workers.length} not listed`);
    byId("workers-note").textContent = notes.join(" · ");
  }

  pause() {}
  redraw() {}

  _row(name) {
    if (!this._rows.has(name)) {
      const row = new Row(name);
      this._rows.set(name, row);
      this._body.append(row.element);
    }
    return this._rows.get(name);
  }
}

class Row {
  constructor(name) {
    this._state = make("span", { className: "pill" });
    this._since = make("span", { className: "since" });
    this._reason = make("span", { className: "reason" });
    this._cells = Object.fromEntries(COLUMNS.map((column) => [column, make("td", { className: "number" })]));
    this.element = make("tr", {},
      make("td", { className: "name", text: name }),
      make("td", {}, this._state, " ", this._since, this._reason),
      ...Object.values(this._cells));
    this.element.dataset.worker = name;
  }

  show(worker) {
    this.element.dataset.state = worker.state;
    this._state.dataset.tone = TONES[worker.state] ?? "off";
    write(this._state, worker.state);
    write(this._since, span(worker.since_s));
    write(this._reason, worker.reason);
    this._reason.title = worker.reason; // three lines of it are shown
    const has = worker.running !== undefined;
    write(this._cells.requests, has ? `${worker.running}${worker.waiting ? ` + ${worker.waiting} waiting` : ""}` : "");
    write(this._cells.kv, has ? percent(worker.kv_cache_usage) : "");
    write(this._cells.step, worker.step_ms === undefined ? "" : `${short(worker.step_ms)} ms`);
    write(this._cells.bubbles, worker.bubble_share === undefined ? "" : percent(worker.bubble_share));
    write(this._cells.restarts, String(worker.restarts));
    write(this._cells.process, worker.pid === null ? "–" : String(worker.pid));
    this._cells.process.title = worker.node ? `on node ${worker.node}` : "";
  }
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
