// What all views share: the data, names of groups, pictures, the choice of view and of colours.
const root = document.documentElement;
const element = (id) => document.getElementById(id);
const embedded = element("data");
const data = embedded ? JSON.parse(embedded.textContent) : window.scanFast;
const count = data ? data.name.length : 0;
const groupOf = new Map();
const memory = {
  // A browser may refuse storage to pages from disk.
  get(key) { try { return localStorage.getItem(key); } catch { return null; } },
  set(key, value) { try { value === null ? localStorage.removeItem(key) : localStorage.setItem(key, value); } catch { /* kept for this visit only */ } },
};

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// -- colours ----------------------------------------------------------------------------------------------------------

function isDark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function setTheme(theme) {
  if (theme) root.dataset.theme = theme;
  redraw();
}
let redraw = () => {};

// -- images -----------------------------------------------------------------------------------------------------------

// Writes a count as the rest of the page does.
const number = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const path = (row) => data.folders[data.folder[row]][0] + data.name[row];
function link(row) {
  const folder = data.folders[data.folder[row]][1];
  return folder ? folder + (data.href[row] ?? encodeURIComponent(data.name[row])) : "";
}
const inMarkup = new Map();
function thumbnail(row) {
  const known = data.thumb[row];
  if (known === 1) return inMarkup.get(row) ?? "";
  return known === 2 ? link(row) : known || "";
}
function confidence(row) {
  return data.confidence[row] < 0 ? "" : `${Math.round(data.confidence[row] / 10)} %`;
}
// Returns a picture of a row, or its name if there is none.
function picture(row, className = "") {
  const address = thumbnail(row);
  const name = () => make("span", { className: `absent ${className}`, textContent: data.name[row] });
  if (!address) return name();
  const image = make("img", { className, alt: data.name[row], loading: "lazy", decoding: "async" });
  if (address.startsWith("data:image/png") || address.endsWith(".png") && data.thumb[row] !== 2) image.classList.add("tiny");
  image.addEventListener("error", () => image.replaceWith(name()), { once: true });
  image.src = address;
  return image;
}

// -- names of groups --------------------------------------------------------------------------------------------------

const newNames = {};
const namesKey = data ? `scan-fast names ${data.digest}` : "";
function groupTitle(group) {
  return newNames[group] ?? groupOf.get(group)?.title ?? `group ${group}`;
}
const quoted = (text) => /^[\w.,+@%-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
function showNames() {
  for (const row of document.querySelectorAll("[data-group]")) {
    const group = Number(row.dataset.group);
    if (newNames[group] === undefined && !row.dataset.renamed) continue;
    row.querySelector(".title").textContent = groupTitle(group);
    row.dataset.renamed = "1";
  }
  const changed = Object.entries(newNames);
  element("keep").hidden = !changed.length;
  const words = changed.flatMap(([group, name]) => [group, quoted(name)]);
  element("keep-command").textContent = ["scan-fast name", quoted(element("run-folder").textContent), ...words].join(" ");
}
function rename(group, name) {
  const clean = name.replace(/[\u0000-\u001f\u007f-\u009f]/g, " ").trim().slice(0, 80);
  if (clean && clean !== groupOf.get(group)?.title) newNames[group] = clean;
  else delete newNames[group];
  memory.set(namesKey, Object.keys(newNames).length ? JSON.stringify(newNames) : null);
  showNames();
  redraw();
}

// -- views ------------------------------------------------------------------------------------------------------------

const openers = {};
function show(view) {
  for (const section of document.querySelectorAll(".view")) section.classList.toggle("current", section.dataset.name === view);
  for (const tab of document.querySelectorAll("[data-view]")) {
    if (tab.dataset.view === view) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  openers[view]?.();
}
const current = () => document.querySelector(".view.current")?.dataset.name;
