// A model's words on the page: code blocks and inline code, all else as it is written. Elements are made, HTML is never parsed.

import { make } from "./elements.js";

const FENCE = /^ {0,3}```[^\n`]*$/m;

export function render(text) {
  const parts = [];
  let rest = text;
  while (rest) {
    const opening = FENCE.exec(rest);
    if (!opening) {
      parts.push(...inline(rest));
      break;
    }
    parts.push(...inline(rest.slice(0, opening.index).replace(/\n+$/, "")));
    const after = rest.slice(opening.index + opening[0].length).replace(/^\n/, "");
    const closing = /^ {0,3}``` *$/m.exec(after);
    const code = closing ? after.slice(0, closing.index) : after;
    parts.push(make("pre", { tabIndex: 0 }, make("code", { text: code.replace(/\n$/, "") })));
    rest = closing ? after.slice(closing.index + closing[0].length).replace(/^\n+/, "") : "";
  }
  return parts;
}

function inline(text) {
  return text
    .split(/(`[^`\n]+`)/)
    .filter(Boolean)
    .map((part) => (part.length > 2 && part.startsWith("`") && part.endsWith("`") ? make("code", { text: part.slice(1, -1) }) : part));
}
