// The conversation: asking, streaming, stopping. What is sent is what the curl command shows.

import { copy, byId, make } from "./elements.js";
import { eventsOf, problemOf } from "./events.js";
import { short } from "./numbers.js";
import { Sampling } from "./sampling.js";
import { render } from "./text.js";

const SUGGESTIONS = [
  "What is the capital of France?",
  "Explain in two sentences why attention and FFN layers like different hardware.",
  "Write a Python function that reverses a list.",
];

export class Chat {
  constructor(key) {
    this._key = key;
    this._settings = null;
    this._messages = []; // as they are sent: {role, content}
    this._asking = null; // an AbortController while an answer streams
    this._log = byId("messages");
    this._welcome = byId("welcome");
    this._draft = byId("draft");
    this._sampling = new Sampling(() => this._showCurl());
    this._listen();
    for (const text of SUGGESTIONS) {
      const button = make("button", { type: "button", text });
      button.addEventListener("click", () => this._send(text));
      byId("welcome").querySelector(".suggestions").append(button);
    }
  }

  open(settings) {
    this._settings = settings;
    this._showCurl();
  }

  _listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this._send(this._draft.value.trim());
    });
    byId("stop").addEventListener("click", () => this._asking?.abort());
    byId("new-chat").addEventListener("click", () => this._clear());
    byId("curl").addEventListener("toggle", () => this._showCurl());
    byId("copy-curl").addEventListener("click", (event) => {
      const command = byId("curl-command");
      copy(command.textContent, event.currentTarget, command);
    });
    this._draft.addEventListener("input", () => {
      this._fitDraft();
      this._showCurl();
    });
    this._draft.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this._send(this._draft.value.trim());
      }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this._asking?.abort();
    });
  }

  // --- asking ------------------------------------------------------------------------------------------------------

  _send(text) {
    if (!text || this._asking || !this._settings || !this._sampling.check()) return;
    this._draft.value = "";
    this._fitDraft();
    this._welcome.hidden = true;
    this._messages.push({ role: "user", content: text });
    this._log.append(make("div", { className: "message user" }, make("span", { className: "unseen", text: "You: " }), text));
    this._answer();
  }

  async _answer() {
    const answer = new Answer(this._settings.model);
    const messages = this._messages;
    this._log.querySelectorAll(".again").forEach((button) => button.remove());
    this._log.append(answer.element);
    this._log.scrollTop = this._log.scrollHeight;
    this._asking = new AbortController();
    this._showState();
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json", ...this._key.headers() },
        body: JSON.stringify(this._body(messages)),
        signal: this._asking.signal,
      });
      if (!response.ok) throw new Error(await problemOf(response));
      for await (const event of eventsOf(response)) {
        if (event.error) throw new Error(event.error.message);
        answer.take(event, () => this._follow());
      }
      answer.end();
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped");
      else answer.fail(error instanceof TypeError ? "The server cannot be reached." : error.message);
    }
    this._asking = null;
    if (messages === this._messages) { // no new chat has begun meanwhile
      if (answer.content) messages.push({ role: "assistant", content: answer.content });
      this._offer(answer);
      this._showUse(answer.usage);
    }
    this._showState();
    byId("announcer").textContent = answer.outcome;
    this._follow();
  }

  _offer(answer) {
    const again = make("button", { type: "button", className: "quiet again", text: answer.content ? "Ask again" : "Try again" });
    again.addEventListener("click", () => {
      if (this._asking || !this._sampling.check()) return;
      if (answer.content) this._messages.pop();
      answer.element.remove();
      this._answer();
    });
    const copying = make("button", { type: "button", className: "quiet", text: "Copy" });
    copying.addEventListener("click", () => copy(answer.content, copying, answer.text));
    answer.foot.prepend(...(answer.content ? [copying, again] : [again]));
  }

  _clear() {
    this._asking?.abort();
    this._messages = [];
    this._log.replaceChildren(this._welcome);
    this._welcome.hidden = false;
    byId("context-use").textContent = "";
    this._showState();
    this._draft.focus();
  }

  /** Scrolls with the text unless the reader has scrolled up. */
  _follow() {
    const below = this._log.scrollHeight - this._log.scrollTop - this._log.clientHeight;
    if (below < 80) this._log.scrollTop = this._log.scrollHeight;
  }

  // --- what is shown of the state -------------------------------------------------------------------------------------

  _showState() {
    const asking = this._asking !== null;
    const had = document.activeElement;
    byId("send").hidden = asking;
    byId("stop").hidden = !asking;
    byId("new-chat").disabled = !this._messages.length;
    if (asking && had === byId("send")) byId("stop").focus();
    if (!asking && had === byId("stop")) this._draft.focus();
    this._showCurl();
  }

  _showUse(usage) {
    if (!usage) return;
    const { max_model_len: most } = this._settings;
    byId("context-use").textContent = `${short(usage.total_tokens)} of ${short(most)} tokens`;
  }

  _fitDraft() {
    this._draft.style.height = "auto";
    this._draft.style.height = `${this._draft.scrollHeight + 2}px`;
  }

  // --- the request ----------------------------------------------------------------------------------------------------

  _body(messages) {
    const system = this._sampling.systemPrompt;
    return {
      model: this._settings.model,
      messages: system ? [{ role: "system", content: system }, ...messages] : messages,
      stream: true,
      stream_options: { include_usage: true },
      ...this._sampling.values(),
    };
  }

  _showCurl() {
    if (!byId("curl").open || !this._settings) return;
    const draft = this._draft.value.trim();
    const lastIsUser = this._messages.at(-1)?.role === "user";
    const next = draft || !(this._messages.length && lastIsUser) ? [{ role: "user", content: draft || "Hello!" }] : [];
    byId("curl-command").textContent = curl(this._body([...this._messages, ...next]), this._settings.asks_for_key);
  }
}

/** The shell command for a request; the key stays in the environment. */
export function curl(body, asksForKey) {
  const url = new URL("v1/chat/completions", document.baseURI).href;
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = asksForKey ? '  -H "Authorization: Bearer $AFD_API_KEY" \\\n' : "";
  return `curl -N '${url.replaceAll("'", "%27")}' \\\n${key}  -H 'Content-Type: application/json' \\\n  -d '${quoted}'`;
}

/** One answer while it grows: its text is drawn once a frame, whatever comes. */
class Answer {
  constructor(model) {
    this.content = "";
    this.outcome = "";
    this.usage = null;
    this.text = make("div", { className: "text" });
    this.foot = make("div", { className: "foot" });
    this.element = make("div", { className: "message assistant streaming" }, make("p", { className: "who", text: model }), this.text, this.foot);
    this._reasoning = "";
    this._reasoningText = null;
    this._began = performance.now();
    this._first = this._last = 0;
    this._tokens = 0;
    this._reason = "";
    this._frame = 0;
  }

  take(event, drawn) {
    if (event.usage) this.usage = event.usage;
    const choice = event.choices[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning } = choice.delta;
    if (content || reasoning) {
      this._last = performance.now();
      this._first ||= this._last;
      this._tokens += 1;
    }
    this.content += content ?? "";
    this._reasoning += reasoning ?? "";
    this._reason = choice.finish_reason ?? this._reason;
    this._frame ||= requestAnimationFrame(() => {
      this._draw();
      drawn();
    });
  }

  end(reason = this._reason) {
    const tokens = this.usage?.completion_tokens ?? this._tokens;
    const parts = [`${short(tokens)} tokens`];
    if (tokens > 1 && this._last > this._first) parts.push(`${short((1000 * (tokens - 1)) / (this._last - this._first))} tokens/s`);
    if (this._first) parts.push(`first after ${short(Math.round(this._first - this._began))} ms`);
    parts.push({ stop: "ended by itself", length: "cut at the limit", stopped: "stopped" }[reason] ?? reason);
    this._finish(reason === "stopped" ? "Answer stopped." : "Answer complete.");
    this.foot.append(make("span", { text: parts.filter(Boolean).join(" · ") }));
  }

  fail(problem) {
    this._finish(`The answer failed: ${problem}`);
    this.text.after(make("p", { className: "failure", text: problem }));
  }

  _finish(outcome) {
    cancelAnimationFrame(this._frame);
    this._draw();
    this.element.classList.remove("streaming");
    this.outcome = outcome;
  }

  _draw() {
    this._frame = 0;
    if (this._reasoning && !this._reasoningText) {
      this._reasoningText = make("div");
      this.text.before(make("details", { className: "reasoning" }, make("summary", { text: "Reasoning" }), this._reasoningText));
    }
    if (this._reasoningText) this._reasoningText.textContent = this._reasoning.trim();
    this.text.replaceChildren(...render(this.content));
  }
}
