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
function addFilters() {
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
}
addFilters();

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
document.addEventListener("keydown", (event) => {
  const map = document.getElementById("map");
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const marks = [...(map?.querySelectorAll(".mark") ?? [])];
  const at = marks.indexOf(document.activeElement);
  if (!step || at < 0) return;
  event.preventDefault();
  const next = marks[(at + step + marks.length) % marks.length];
  marks[at].setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
});

// A page that is served while training fetches itself again, and keeps what is open, entered and focused
const watch = document.getElementById("watch");
const keyOf = (details) => details.id || details.querySelector("summary").textContent;
let tag = document.documentElement.dataset.tag;
function replaceContent(html) {
  const page = new DOMParser().parseFromString(html, "text/html");
  const states = new Map([...document.querySelectorAll("details")].map((each) => [keyOf(each), each.open]));
  for (const each of page.querySelectorAll("details")) each.open = states.get(keyOf(each)) ?? each.open;
  for (const form of document.querySelectorAll("form.filter")) {
    const next = page.querySelector(`form[data-filters=${form.dataset.filters}]`);
    for (const field of form.elements) {
      if (!field.name || !next) continue;
      const same = next.elements[field.name];
      same.value = field.value;
      if (same.selectedIndex < 0) same.selectedIndex = 0; // the choice is gone
    }
  }
  const fields = "a, button, input, select, summary, [tabindex]";
  const focused = document.querySelector("main").contains(document.activeElement);
  const at = focused ? [...document.querySelectorAll(`main :is(${fields})`)].indexOf(document.activeElement) : -1;
  for (const part of ["nav", "main", "footer"]) {
    document.querySelector(part).replaceWith(document.adoptNode(page.querySelector(part)));
  }
  addFilters();
  if (at >= 0) document.querySelectorAll(`main :is(${fields})`)[at]?.focus({ preventScroll: true });
}
async function refresh() {
  let state = "Live: refreshed while training writes";
  try {
    const answer = await fetch(location.pathname, { cache: "no-store", headers: { "If-None-Match": tag } });
    if (answer.status === 200) {
      replaceContent(await answer.text());
      tag = answer.headers.get("ETag");
    } else if (answer.status !== 304) {
      state = await answer.text();
    }
  } catch {
    state = "Not refreshed: trl-sgpo report --watch has ended";
  }
  if (watch.textContent !== state) watch.textContent = state;
  setTimeout(refresh, 2000);
}
if (watch) refresh();
