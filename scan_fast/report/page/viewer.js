// One image at a time, large: the original if the page may show it, else its thumbnail.
let sequence = [];
let place = 0;

function openFrom(event, rows) {
  const from = event.target.closest("[data-row]");
  // With a modifier, a link opens the file itself, as links do.
  if (!from || event.ctrlKey || event.metaKey || event.shiftKey || event.button > 0) return;
  event.preventDefault();
  openViewer(Number(from.dataset.row), rows);
}

function openViewer(row, rows) {
  sequence = rows;
  place = Math.max(0, rows.indexOf(row));
  if (rows[place] !== row) sequence = [row];
  fillViewer();
  const viewer = element("viewer");
  if (!viewer.open) viewer.showModal();
}

function fillViewer() {
  const row = sequence[place];
  const address = link(row), small = thumbnail(row);
  const frame = element("viewer-frame");
  const image = make("img", { alt: path(row), decoding: "async" });
  const fallBack = () => {
    if (!small) return frame.replaceChildren(make("span", { className: "absent", textContent: data.name[row] }));
    const view = picture(row, "small");
    view.removeAttribute("loading");
    return frame.replaceChildren(view);
  };
  image.addEventListener("error", fallBack, { once: true });
  if (/\.(jpe?g|jpe|jfif|a?png|gif|webp|avif|bmp)$/i.test(address)) {
    image.src = address;
    frame.replaceChildren(image);
  } else fallBack();
  const chips = make("div", { className: "chips" });
  const group = data.group[row];
  const swatch = make("span", { className: "swatch" });
  swatch.style.setProperty("--color", groupOf.get(group).color);
  const open = make("a", { href: "#images" }, swatch, groupTitle(group));
  open.addEventListener("click", (event) => { event.preventDefault(); element("viewer").close(); openGroup(group); });
  chips.append(make("span", {}, open));
  const facts = [["confidence", confidence(row)], ["label", data.labels ? data.labels[data.label[row]] : ""]];
  if (copyOf.has(row)) facts.push(["copies", `${data.copies[copyOf.get(row)].length - 1} more`]);
  if (odd.has(row)) facts.push(["", "odd one out"]);
  for (const [name, value] of facts) {
    if (value) chips.append(make("span", {}, make("span", { className: "soft", textContent: name ? `${name} ` : "" }), value));
  }
  const title = address ? make("a", { href: address, target: "_blank", textContent: path(row) }) : make("b", { textContent: path(row) });
  element("viewer-text").replaceChildren(title, chips);
  element("viewer-back").disabled = place === 0;
  element("viewer-on").disabled = place === sequence.length - 1;
}

function step(by) {
  const next = place + by;
  if (next < 0 || next >= sequence.length) return;
  place = next;
  fillViewer();
}

function startViewer() {
  const viewer = element("viewer");
  element("viewer-close").addEventListener("click", () => viewer.close());
  element("viewer-back").addEventListener("click", () => step(-1));
  element("viewer-on").addEventListener("click", () => step(1));
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
}
