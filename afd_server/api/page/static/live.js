// The live view's connection: open while the page is seen, opened again when it is lost, and what an update changes.

import { byId, make } from "./elements.js";
import { eventsOf, problemOf } from "./events.js";
import { Lanes } from "./lanes.js";
import { Charts } from "./charts.js";
import { Times } from "./times.js";
import { Workers } from "./workers.js";

const RETRY_MS = [500, 1000, 2000, 4000];
const HIDDEN_MS = 5000; // so long it goes on for a page that nobody sees

export class LiveView {
  constructor(key) {
    this._key = key;
    this._connection = null; // an AbortController
    this._hiding = 0;
    this._views = null; // made when there is something to show: charts want to be seen
    document.addEventListener("visibilitychange", () => this._visibilityChanged());
  }

  open(settings) {
    this._mayWatch = settings.may_watch;
    this._close();
    if (settings.may_watch) {
      this._connect();
      return;
    }
    byId("live").hidden = true;
    this._say("off", "Ready", settings.asks_for_key
      ? "The live view opens with an operator's key."
      : "Without --api-key, the live view is for browsers on the server's own host.");
  }

  redraw() {
    this._views?.forEach((view) => view.redraw());
  }

  _visibilityChanged() {
    clearTimeout(this._hiding);
    if (document.hidden) this._hiding = setTimeout(() => this._close(), HIDDEN_MS);
    else if (this._mayWatch && !this._connection) this._connect();
  }

  _close() {
    this._connection?.abort();
    this._connection = null;
  }

  async _connect() {
    const connection = (this._connection = new AbortController());
    for (let failures = 0; !connection.signal.aborted; failures += 1) {
      try {
        const response = await fetch("admin/live", { headers: this._key.headers(), signal: connection.signal });
        if (!response.ok) throw new Error(await problemOf(response));
        for await (const update of eventsOf(response)) {
          if (update.error) throw new Error(update.error.message);
          failures = 0;
          this._show(update);
        }
      } catch (error) {
        if (connection.signal.aborted) return;
        this._lost(error instanceof TypeError ? "The server cannot be reached." : error.message);
      }
      await new Promise((wake) => { setTimeout(wake, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]); });
    }
  }

  _lost(reason) {
    this._say("bad", "Not connected", `${reason} Trying again.`);
    this._views?.forEach((view) => view.pause());
  }

  _show(update) {
    byId("live").hidden = false;
    this._views ??= [new Lanes(), new Charts(), new Times(), new Workers()];
    this._views.forEach((view) => view.show(update));
    const troubles = update.problems.length;
    if (!update.serving) this._say("bad", "Not serving", update.change ?? "");
    else if (troubles) this._say("caution", "Degraded", update.change ?? "");
    else this._say("good", "Serving", update.change ?? "");
    const box = byId("problems");
    box.hidden = !troubles;
    const shown = update.problems.map((problem) => problem.replace(/ for [0-9.]+ s/, "")).join("\n");
    if (box.dataset.shown !== shown) { // not each second anew: it is read out
      box.dataset.shown = shown;
      box.replaceChildren(...update.problems.map((problem) => make("p", { text: problem })));
    }
  }

  _say(tone, state, note) {
    const pill = byId("health");
    pill.dataset.tone = tone;
    if (pill.textContent !== state) pill.textContent = state;
    const told = byId("live-note");
    if (told.textContent !== note) told.textContent = note;
  }
}
