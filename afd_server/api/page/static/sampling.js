// The fields of a request that a person may set here. What is left empty is not sent: the server's defaults hold.

import { byId, make } from "./elements.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 10, step: 0.05, hint: "0 is greedy" },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, hint: "above 0, to 1" },
  { name: "top_k", label: "Top-k", min: -1, step: 1, whole: true, hint: "0: all tokens" },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, hint: "0 to 1" },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, whole: true, hint: "all that fit" },
  { name: "seed", label: "Seed", step: 1, whole: true, hint: "random" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, hint: "-2 to 2" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, hint: "-2 to 2" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 10, step: 0.01, hint: "1: none" },
];

export class Sampling {
  /** onChange: after each change. */
  constructor(onChange) {
    this._form = byId("sampling-form");
    this._summary = byId("sampling-summary");
    this._inputs = new Map();
    this._system = make("textarea", { id: "system", rows: 2, placeholder: "none" });
    this._stop = make("input", { id: "stop-strings", type: "text", placeholder: "none; several with | between" });
    this._form.append(
      field("System prompt", this._system, true),
      ...FIELDS.map((each) => field(each.label, this._number(each))),
      field("Stop strings", this._stop, true),
    );
    this._form.addEventListener("submit", (event) => event.preventDefault());
    this._form.addEventListener("input", () => {
      this._summarise();
      onChange();
    });
  }

  get systemPrompt() {
    return this._system.value.trim();
  }

  /** Whether the browser finds every number in its range; it shows which is not. */
  check() {
    if (!this._form.checkValidity()) byId("sampling").open = true;
    return this._form.reportValidity();
  }

  values() {
    const values = {};
    for (const [name, input] of this._inputs) {
      if (input.value !== "" && Number.isFinite(input.valueAsNumber)) values[name] = input.valueAsNumber;
    }
    const stop = this._stop.value.split("|").filter(Boolean);
    if (stop.length) values.stop = stop;
    return values;
  }

  _number({ name, min, max, step, hint, whole }) {
    const input = make("input", { id: `sampling-${name}`, type: "number", placeholder: hint, inputMode: whole ? "numeric" : "decimal" });
    for (const [attribute, value] of Object.entries({ min, max, step: whole ? step : "any" })) {
      if (value !== undefined) input.setAttribute(attribute, value);
    }
    this._inputs.set(name, input);
    return input;
  }

  _summarise() {
    const set = Object.entries(this.values()).map(([name, value]) => `${name} ${Array.isArray(value) ? value.join("|") : value}`);
    if (this.systemPrompt) set.unshift("system prompt");
    this._summary.textContent = set.join(" · ");
  }
}

function field(label, input, whole = false) {
  return make("div", { className: whole ? "whole" : "" }, make("label", { text: label, htmlFor: input.id }), input);
}
