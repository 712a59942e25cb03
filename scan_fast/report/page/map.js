// The map: points on a canvas, thumbnails where few are in sight.
const AS_PICTURES = 140, PICTURE = 44, NEAR = 14;
const camera = { x: 0, y: 0, zoom: 1 };
const pictures = new Map();
const seen = { rows: [], x: [], y: [] };

function startMap() {
  const canvas = element("canvas");
  if (!canvas || !data.x) return;
  const pen = canvas.getContext("2d");
  const hover = element("hover");
  let scale = 1, width = 0, height = 0, asked = false;

  const toX = (value) => (value / 9999 - 0.5) * Math.min(width, 1.6 * height) * 0.94 * camera.zoom + width / 2 + camera.x;
  const toY = (value) => (value / 9999 - 0.5) * height * 0.94 * camera.zoom + height / 2 + camera.y;

  function draw() {
    asked = false;
    if (current() !== "map") return;
    scale = devicePixelRatio || 1;
    width = canvas.clientWidth;
    height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const colors = new Map(data.groups.map((known) => [known.id, known.color]));
    const radius = Math.max(1.2, Math.min(5, 130 / Math.sqrt(count))) * Math.min(2.2, Math.sqrt(camera.zoom));
    seen.rows = []; seen.x = []; seen.y = [];
    const faded = [];
    for (let row = 0; row < count; row += 1) {
      const x = toX(data.x[row]), y = toY(data.y[row]);
      if (x < -PICTURE || y < -PICTURE || x > width + PICTURE || y > height + PICTURE) continue;
      if (matches(row)) { seen.rows.push(row); seen.x.push(x); seen.y.push(y); } else faded.push(x, y);
    }
    pen.globalAlpha = 0.25;
    pen.fillStyle = getComputedStyle(root).getPropertyValue("--soft");
    for (let i = 0; i < faded.length; i += 2) pen.fillRect(faded[i] - 1, faded[i + 1] - 1, 2, 2);
    pen.globalAlpha = 0.82;
    const close = seen.rows.length <= AS_PICTURES && camera.zoom > 1.2;
    let last = -1;
    for (let i = 0; i < seen.rows.length; i += 1) {
      const row = seen.rows[i], x = seen.x[i], y = seen.y[i];
      if (data.group[row] !== last) { last = data.group[row]; pen.fillStyle = colors.get(last); }
      if (close && drawPicture(row, x, y, colors.get(last))) continue;
      if (radius < 2) pen.fillRect(x - radius, y - radius, 2 * radius, 2 * radius);
      else { pen.beginPath(); pen.arc(x, y, radius, 0, 7); pen.fill(); }
    }
    pen.globalAlpha = 1;
  }

  function drawPicture(row, x, y, color) {
    const address = thumbnail(row);
    if (!address) return false;
    let image = pictures.get(row);
    if (!image) {
      if (pictures.size > 600) pictures.clear();
      image = new Image();
      image.onload = ask;
      image.src = address;
      pictures.set(row, image);
    }
    if (!image.complete || !image.naturalWidth) return false;
    const side = Math.min(image.naturalWidth, image.naturalHeight);
    pen.globalAlpha = 1;
    pen.fillRect(x - PICTURE / 2 - 2, y - PICTURE / 2 - 2, PICTURE + 4, PICTURE + 4);
    pen.drawImage(image, (image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2, side, side, x - PICTURE / 2, y - PICTURE / 2, PICTURE, PICTURE);
    pen.fillStyle = color;
    return true;
  }

  function ask() {
    if (!asked) { asked = true; requestAnimationFrame(draw); }
  }

  function nearest(x, y) {
    let best = -1, distance = NEAR * NEAR;
    const half = seen.rows.length <= AS_PICTURES && camera.zoom > 1.2 ? PICTURE / 2 : 0;
    for (let i = seen.rows.length - 1; i >= 0; i -= 1) {
      if (Math.abs(seen.x[i] - x) <= half && Math.abs(seen.y[i] - y) <= half) return seen.rows[i];
      const now = (seen.x[i] - x) ** 2 + (seen.y[i] - y) ** 2;
      if (now < distance) { distance = now; best = seen.rows[i]; }
    }
    return best;
  }

  function zoom(by, x = width / 2, y = height / 2) {
    const next = Math.min(200, Math.max(0.5, camera.zoom * by)), real = next / camera.zoom;
    camera.x = x - width / 2 - (x - width / 2 - camera.x) * real;
    camera.y = y - height / 2 - (y - height / 2 - camera.y) * real;
    camera.zoom = next;
    hover.hidden = true;
    ask();
  }

  function showHover(x, y) {
    const row = nearest(x, y);
    hover.hidden = row < 0;
    if (row < 0) return;
    if (hover.dataset.row !== String(row)) {
      hover.dataset.row = row;
      const view = picture(row);
      view.removeAttribute("loading");
      hover.replaceChildren(view, make("b", { textContent: groupTitle(data.group[row]) }), ` ${confidence(row)}`, make("br", {}), data.name[row]);
    }
    hover.style.left = `${x + 200 > width ? Math.max(0, x - 196) : x + 16}px`;
    hover.style.top = `${Math.max(6, Math.min(y + 12, height - hover.offsetHeight - 6))}px`;
  }

  const fingers = new Map();
  let moved = 0, spread = 0;
  const local = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, local(event));
    moved = spread = 0;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = local(event);
    const before = fingers.get(event.pointerId);
    if (!before) return showHover(x, y);
    moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
    fingers.set(event.pointerId, [x, y]);
    if (fingers.size === 2) {
      const [a, b] = [...fingers.values()];
      const now = Math.hypot(a[0] - b[0], a[1] - b[1]);
      if (spread) zoom(now / spread, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
      spread = now;
    } else if (moved > 4) {
      camera.x += x - before[0];
      camera.y += y - before[1];
      hover.hidden = true;
      ask();
    }
    return undefined;
  });
  canvas.addEventListener("pointerup", (event) => {
    fingers.delete(event.pointerId);
    const row = moved <= 4 ? nearest(...local(event)) : -1;
    if (row >= 0) openViewer(row, seen.rows.slice());
  });
  canvas.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => { hover.hidden = true; });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 150), ...local(event));
  }, { passive: false });
  element("zoom-in").addEventListener("click", () => zoom(1.6));
  element("zoom-out").addEventListener("click", () => zoom(1 / 1.6));
  element("zoom-all").addEventListener("click", () => { Object.assign(camera, { x: 0, y: 0, zoom: 1 }); ask(); });
  addEventListener("resize", ask);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ask);

  function fillLegend() {
    element("legend").replaceChildren(...data.groups.map((known) => {
      const swatch = make("span", { className: "swatch" });
      swatch.style.setProperty("--color", known.color);
      const button = make("button", { type: "button" }, swatch, groupTitle(known.id));
      button.setAttribute("aria-pressed", filters.group === known.id);
      button.addEventListener("click", () => {
        filters.group = filters.group === known.id ? -1 : known.id;
        element("group").value = filters.group;
        fillLegend();
        ask();
      });
      return make("li", {}, button);
    }));
  }
  redraw = ask;
  openers.map = () => { fillLegend(); draw(); };
}
