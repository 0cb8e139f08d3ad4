// The page's start: what the server asks for, then chat and live view. Each has its own file; this one ties them together.

import { Chat } from "./chat.js";
import { byId } from "./elements.js";
import { AccessKey } from "./key.js";
import { LiveView } from "./live.js";
import { followTheme } from "./theme.js";

const key = new AccessKey();
const chat = new Chat(key);
const live = new LiveView(key);

function showView(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll("[data-shows]")) {
    if (button.dataset.shows === name) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

function begin(settings) {
  const model = byId("model");
  model.hidden = false;
  model.textContent = model.title = settings.model;
  chat.open(settings);
  live.open(settings);
}

for (const button of document.querySelectorAll("[data-shows]")) {
  button.addEventListener("click", () => showView(button.dataset.shows));
}
followTheme(byId("theme-button"), () => live.redraw());
key.onChange = begin;
key.open();
