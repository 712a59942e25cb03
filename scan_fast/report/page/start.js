// Start: nothing here runs if the page has lost its data, and then it stays as it is without scripts.
function route() {
  const wanted = location.hash.slice(1);
  const group = /^group-(\d+)$/.exec(wanted);
  const known = [...document.querySelectorAll(".view")].some((section) => section.dataset.name === wanted);
  show(known ? wanted : "overview");
  if (group) element(wanted)?.scrollIntoView();
  else if (wanted) scrollTo(0, Math.min(scrollY, document.querySelector(".tabs").offsetTop));
}

function startOverview() {
  const inStrips = [...document.querySelectorAll(".strip [data-row]")];
  for (const list of document.querySelectorAll(".strip")) {
    const rows = [...list.querySelectorAll("[data-row]")].map((view) => Number(view.dataset.row));
    list.addEventListener("click", (event) => openFrom(event, rows));
  }
  for (const view of inStrips) if (view.src) inMarkup.set(Number(view.dataset.row), view.src);
  const listed = [...document.querySelectorAll(".listed")];
  for (const view of listed) view.querySelector(".frame").append(picture(Number(view.dataset.row)));
  for (const list of document.querySelectorAll(".tiles")) {
    const rows = [...list.querySelectorAll("[data-row]")].map((view) => Number(view.dataset.row));
    list.addEventListener("click", (event) => openFrom(event, rows));
  }
  document.addEventListener("click", (event) => {
    const open = event.target.closest("[data-open]");
    if (!open || !groupOf.has(Number(open.dataset.open))) return;
    event.preventDefault();
    openGroup(Number(open.dataset.open));
  });
  for (const button of document.querySelectorAll("[data-rename]")) button.addEventListener("click", () => askName(button));
  element("keep-copy").addEventListener("click", () => navigator.clipboard?.writeText(element("keep-command").textContent));
  element("keep-drop").addEventListener("click", () => { for (const group of Object.keys(newNames)) rename(Number(group), ""); });
}

function askName(button) {
  const group = Number(button.dataset.rename);
  const input = make("input", { className: "rename-input", value: newNames[group] ?? "", placeholder: groupTitle(group), maxLength: 80 });
  input.setAttribute("aria-label", `Name of group ${group}`);
  let open = true;
  const done = (keep) => {
    if (!open) return; // to leave the document is to lose the focus, which ends the input a second time
    open = false;
    if (keep) rename(group, input.value);
    input.replaceWith(button);
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") done(true);
    if (event.key === "Escape") done(false);
  });
  input.addEventListener("blur", () => done(true));
  button.replaceWith(input);
  input.focus();
}

function start() {
  const theme = memory.get("scan-fast theme");
  if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  if (!data) {
    element("lost-data").hidden = false;
    return;
  }
  for (const known of data.groups) groupOf.set(known.id, known);
  try {
    Object.assign(newNames, JSON.parse(memory.get(namesKey) ?? "{}"));
  } catch { /* not ours */ }
  // A view is no target to scroll to.
  for (const section of document.querySelectorAll(".view")) {
    section.dataset.name = section.id;
    section.removeAttribute("id");
  }
  root.classList.add("js");
  startOverview();
  startGallery();
  startViewer();
  startMap();
  showNames();
  element("theme").addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    memory.set("scan-fast theme", next);
    setTheme(next);
  });
  addEventListener("hashchange", route);
  route();
}

start();
