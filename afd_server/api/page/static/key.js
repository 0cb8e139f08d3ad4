// The API key: asked for when the server wants one, kept in sessionStorage, sent as a header and never in an address.

import { byId } from "./elements.js";

const STORED = "afd-api-key";

export class AccessKey {
  constructor() {
    this.onChange = () => {};
    this._dialog = byId("key-dialog");
    this._input = byId("key");
    byId("key-button").addEventListener("click", () => this._ask());
    byId("key-cancel").addEventListener("click", () => this._dialog.close());
    byId("key-forget").addEventListener("click", () => {
      sessionStorage.removeItem(STORED);
      location.reload();
    });
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this._try(this._input.value.trim());
    });
  }

  /** Begins: tells of the server's settings by onChange, at once or when there is a key that opens them. */
  async open() {
    const settings = await this._settings(this._stored);
    if (settings === null) {
      setTimeout(() => this.open(), 2000);
      return;
    }
    byId("key-button").hidden = !settings.asks_for_key;
    if (settings.may_ask) this.onChange(settings);
    else this._ask(this._stored ? "The key that this tab had is not accepted any more." : "");
  }

  headers() {
    return this._stored ? { Authorization: `Bearer ${this._stored}` } : {};
  }

  get _stored() {
    return sessionStorage.getItem(STORED) ?? "";
  }

  _ask(problem = "") {
    byId("key-error").textContent = problem;
    byId("key-forget").hidden = !this._stored;
    this._input.value = "";
    this._dialog.showModal();
    this._input.focus();
  }

  async _try(given) {
    const settings = await this._settings(given);
    if (settings?.may_ask) {
      sessionStorage.setItem(STORED, given);
      this._dialog.close();
      this.onChange(settings);
      return;
    }
    byId("key-error").textContent = settings ? "The server does not know this key." : "The server cannot be reached.";
    this._input.select();
  }

  async _settings(given) {
    try {
      const headers = given ? { Authorization: `Bearer ${given}` } : {};
      const response = await fetch("page/settings.json", { headers, cache: "no-store" });
      return response.ok ? await response.json() : null;
    } catch {
      return null; // the server cannot be reached, or the key cannot be a header
    }
  }
}
