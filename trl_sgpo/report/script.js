"use strict";

// Theme: that of the system until the button says otherwise
const theme = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
function showTheme() {
  const dark = chosen ?? system.matches;
  theme.setAttribute("aria-pressed", String(dark));
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
}
theme.addEventListener("click", () => {
  chosen = theme.getAttribute("aria-pressed") !== "true";
  showTheme();
});
system.addEventListener("change", showTheme);
theme.hidden = false;
showTheme();

// Filters: every word must be in an item's text, and every choice must be its own
for (const form of document.querySelectorAll("form.filter")) {
  const items = [...document.querySelectorAll(`#${form.dataset.filters} > .item`)];
  const texts = items.map((item) => item.textContent.toLowerCase());
  const marks = new Map([...document.querySelectorAll("#map .mark")].map((mark) => [`s-${mark.dataset.id}`, mark]));
  const choices = [...form.querySelectorAll("select")];
  const output = form.querySelector("output");
  const filter = () => {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    items.forEach((item, index) => {
      const fits =
        words.every((word) => texts[index].includes(word)) &&
        choices.every((choice) => choice.selectedIndex === 0 || item.dataset[choice.name] === choice.value);
      item.hidden = !fits;
      marks.get(item.id)?.classList.toggle("dim", !fits);
      shown += fits;
    });
    output.textContent = `${shown} of ${items.length} shown`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
}

// A link to a strategy opens it, also where a filter hides it
function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.hidden = false;
    target.open = true;
    target.scrollIntoView();
    target.querySelector("summary").focus();
  }
}
addEventListener("hashchange", openTarget);
openTarget();

// The map is one stop of the Tab key; arrow keys go from mark to mark
const map = document.getElementById("map");
map?.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const marks = [...map.querySelectorAll(".mark")];
  const at = marks.indexOf(document.activeElement);
  if (!step || at < 0) return;
  event.preventDefault();
  const next = marks[(at + step + marks.length) % marks.length];
  marks[at].setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
});
