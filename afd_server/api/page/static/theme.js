// Light, dark, or as the system has it; and the colours of the style sheet for what is drawn on a canvas.

const NAMES = { auto: "as the system has it", light: "light", dark: "dark" };
const STORED = "afd-theme";

/** onChange is called whenever colours are other ones than before. */
export function followTheme(button, onChange) {
  let theme = localStorage.getItem(STORED);
  if (!(theme in NAMES)) theme = "auto";
  const apply = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.dataset.theme = theme;
    button.title = `Colours: ${NAMES[theme]}`;
    button.setAttribute("aria-label", button.title);
    onChange();
  };
  button.addEventListener("click", () => {
    const names = Object.keys(NAMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    localStorage.setItem(STORED, theme);
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
  apply();
}

/** The colours that these variables stand for now. */
export function colours(...names) {
  const probe = document.createElement("i");
  document.body.append(probe);
  const found = {};
  for (const name of names) {
    probe.style.color = `var(--${name})`;
    found[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return found;
}
