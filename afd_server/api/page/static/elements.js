// Making elements and finding them. Text goes in as text only: nothing here, or anywhere on this page, parses HTML.

const SVG = "http://www.w3.org/2000/svg";

export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`there is no #${id}`);
  return found;
}

export function make(tag, { className, text, title, ...properties } = {}, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  if (title) element.title = title;
  Object.assign(element, properties);
  element.append(...children);
  return element;
}

export function makeSvg(tag, attributes = {}, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Entries of a legend: {label, colour: a variable's name, shape}. */
export function fillLegend(list, entries) {
  list.replaceChildren(
    ...entries.map(({ label, colour, shape = "" }) => {
      const swatch = make("i", { className: shape });
      swatch.style.setProperty("--swatch", `var(--${colour})`);
      return make("li", {}, swatch, label);
    }),
  );
}

/** Copies, and says so on the button. Where the page may not (no TLS), the text is selected instead. */
export async function copy(text, button, source) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    if (!source) return;
    getSelection().selectAllChildren(source);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = label; }, 1500);
}
