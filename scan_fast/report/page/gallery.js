// The gallery: all images that the filters leave, of which only those near the window are in the document.
const filters = { text: "", group: -1, low: 0, high: 100, order: "sure", kind: "all" };
const copyOf = new Map();
let odd = new Set();
let matching = [];
let sections = [];
let lowerPaths = null;
const drawn = new Map();
const HEADING = 46, CAPTION = 24, GAP = 10;
const layout = { columns: 1, tile: 140, height: 0 };

function matches(row) {
  if (filters.group >= 0 && data.group[row] !== filters.group) return false;
  const percent = data.confidence[row] / 10;
  if (percent >= 0 && (percent < filters.low || (percent > filters.high && filters.high < 100))) return false;
  if (percent < 0 && filters.low > 0) return false;
  if (filters.kind === "copies" && !copyOf.has(row)) return false;
  if (filters.kind === "odd" && !odd.has(row)) return false;
  return !filters.text || lowerPaths[row].includes(filters.text);
}

function filter() {
  if (filters.text && !lowerPaths) lowerPaths = Array.from({ length: count }, (_, row) => path(row).toLowerCase());
  matching = [];
  for (let row = 0; row < count; row += 1) if (matches(row)) matching.push(row);
  const sure = data.confidence, names = data.name;
  const byName = (a, b) => (names[a] < names[b] ? -1 : names[a] > names[b] ? 1 : a - b);
  const orders = { sure: (a, b) => sure[b] - sure[a] || a - b, unsure: (a, b) => sure[a] - sure[b] || a - b, name: byName };
  matching.sort(filters.kind === "copies" ? (a, b) => copyOf.get(a) - copyOf.get(b) : orders[filters.order]);
  const found = new Map();
  if (filters.kind === "copies" || filters.kind === "odd") found.set(-1, matching);
  else {
    for (const known of data.groups) found.set(known.id, []);
    for (const row of matching) found.get(data.group[row]).push(row);
  }
  const ordered = [...found].filter(([, rows]) => rows.length).sort((a, b) => b[1].length - a[1].length || a[0] - b[0]);
  sections = ordered.map(([group, rows]) => ({ group, rows, top: 0 }));
  matching = sections.flatMap((section) => section.rows);
  const all = matching.length === count ? "" : ` of ${number(count)}`;
  element("counted").textContent = `${number(matching.length)}${all} images`;
}

function measure() {
  const width = element("gallery").clientWidth;
  const wanted = Number(element("size").value);
  layout.columns = Math.max(2, Math.floor((width + GAP) / (wanted + GAP)));
  layout.tile = (width - (layout.columns - 1) * GAP) / layout.columns;
  let top = 0;
  for (const section of sections) {
    section.top = top;
    top += HEADING + Math.ceil(section.rows.length / layout.columns) * (layout.tile + CAPTION + GAP) + 12;
  }
  layout.height = top;
  element("gallery").style.height = `${top}px`;
}

function heading(section) {
  const line = make("div", { className: "heading" });
  if (section.group < 0) line.append(filters.kind === "odd" ? "Odd ones out" : "Near-duplicates, copies side by side");
  else {
    line.append(make("span", { className: "swatch" }), groupTitle(section.group));
    line.style.setProperty("--color", groupOf.get(section.group).color);
  }
  line.append(make("span", { className: "soft", textContent: number(section.rows.length) }));
  line.style.top = `${section.top}px`;
  line.style.height = `${HEADING}px`;
  return line;
}

function tile(section, index) {
  const row = section.rows[index];
  const caption = make("span", { className: "caption" }, make("span", { textContent: data.name[row] }), make("span", { textContent: confidence(row) }));
  const view = picture(row);
  const made = make("a", { className: "tile", title: path(row) }, view, caption);
  const address = link(row);
  if (address) made.href = address;
  else made.tabIndex = 0;
  made.dataset.row = row;
  view.style.height = `${layout.tile}px`;
  made.style.width = `${layout.tile}px`;
  made.style.left = `${(index % layout.columns) * (layout.tile + GAP)}px`;
  made.style.top = `${section.top + HEADING + Math.floor(index / layout.columns) * (layout.tile + CAPTION + GAP)}px`;
  return made;
}

function drawGallery() {
  if (current() !== "images") return;
  const gallery = element("gallery");
  const from = -gallery.getBoundingClientRect().top - innerHeight / 2, to = from + 2 * innerHeight;
  const pitch = layout.tile + CAPTION + GAP;
  const wanted = new Set();
  for (const section of sections) {
    const rows = Math.ceil(section.rows.length / layout.columns), begin = section.top + HEADING;
    if (section.top > to || begin + rows * pitch < from) continue;
    const key = `${section.group} heading`;
    wanted.add(key);
    if (!drawn.has(key)) drawn.set(key, gallery.appendChild(heading(section)));
    const first = Math.max(0, Math.floor((from - begin) / pitch)), last = Math.min(rows, Math.ceil((to - begin) / pitch));
    for (let index = first * layout.columns; index < Math.min(last * layout.columns, section.rows.length); index += 1) {
      const row = section.rows[index];
      wanted.add(row);
      if (!drawn.has(row)) drawn.set(row, gallery.appendChild(tile(section, index)));
    }
  }
  for (const [key, made] of drawn) {
    if (wanted.has(key)) continue;
    made.remove();
    drawn.delete(key);
  }
}

function arrange() {
  for (const made of drawn.values()) made.remove();
  drawn.clear();
  measure();
  drawGallery();
}
function refilter() {
  filter();
  const low = filters.low, high = filters.high;
  element("range-text").textContent = low === 0 && high === 100 ? "" : `${low} to ${high} %`;
  if (current() === "images") arrange();
  if (current() === "map") redraw();
}

function startGallery() {
  data.copies.forEach((group, number) => group.forEach((row) => copyOf.set(row, number)));
  odd = new Set(data.odd);
  const groups = element("group");
  const fill = () => {
    groups.replaceChildren(make("option", { value: -1, textContent: "all groups" }));
    for (const known of data.groups) {
      groups.append(make("option", { value: known.id, textContent: `${groupTitle(known.id)} (${number(known.size)})` }));
    }
    groups.value = filters.group;
  };
  fill();
  let waiting = 0;
  const soon = (event, delay) => { clearTimeout(waiting); waiting = setTimeout(refilter, delay); };
  element("search").addEventListener("input", (event) => { filters.text = event.target.value.trim().toLowerCase(); soon(event, 150); });
  groups.addEventListener("change", () => { filters.group = Number(groups.value); refilter(); });
  for (const name of ["order", "kind"]) element(name).addEventListener("change", (event) => { filters[name] = event.target.value; refilter(); });
  const low = element("low"), high = element("high");
  low.addEventListener("input", (event) => { filters.low = Math.min(Number(low.value), filters.high); low.value = filters.low; soon(event, 60); });
  high.addEventListener("input", (event) => { filters.high = Math.max(Number(high.value), filters.low); high.value = filters.high; soon(event, 60); });
  element("size").addEventListener("input", () => { memory.set("scan-fast size", element("size").value); arrange(); });
  element("tools").addEventListener("submit", (event) => event.preventDefault());
  element("size").value = memory.get("scan-fast size") ?? (innerWidth < 600 ? 100 : 140);
  let asked = false;
  const onScroll = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; drawGallery(); });
  };
  addEventListener("scroll", onScroll, { passive: true });
  addEventListener("resize", () => { if (current() === "images") arrange(); });
  element("gallery").addEventListener("click", (event) => openFrom(event, matching));
  element("gallery").addEventListener("keydown", (event) => { if (event.key === "Enter") openFrom(event, matching); });
  openers.images = () => { fill(); filter(); arrange(); };
}

function openGroup(group) {
  if (!groupOf.has(group)) return;
  filters.group = group;
  element("kind").value = filters.kind = "all";
  location.hash = "images";
}
