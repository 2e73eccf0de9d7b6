// <ds-embedding-map data-map="JSON of pages/map_points.py">: images as points in three dimensions. The drawing follows the page
// that `dermis explain embeddings` writes. The view and what is chosen are kept when the server sends the map again.
(() => {
  "use strict";
  const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c7a00", "#882255"];
  const SHAPES = ["square", "triangle", "diamond", "disc", "cross", "star"];
  const TRAINING = "#8a929c";
  const FIRST = [0.87, 0, 0.5, 0.17, 0.94, -0.29, -0.47, 0.34, 0.81];
  const TURN = 0.12; // radians of a key or a button
  const NEIGHBOURS = 9;
  const BY = { class: "Class", source: "Source", verdict: "Verdict" };
  const kept = { turn: FIRST.slice(), zoom: 0, x: 0, y: 0, by: "class", hidden: new Set(), chosen: null, pictures: false, training: true, moved: false };
  let numbered = 0;

  const element = (name, text = "", attributes = {}) => {
    const made = document.createElement(name);
    if (text) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const darker = (colour) => `rgb(${[1, 3, 5].map((k) => Math.round(parseInt(colour.slice(k, k + 2), 16) * 0.55)).join(",")})`;

  function outline(pen, shape, x, y, r) {  // the path of a mark of radius r
    pen.beginPath();
    const corners = (list) => { list.forEach(([a, b], k) => (k ? pen.lineTo(x + a * r, y + b * r) : pen.moveTo(x + a * r, y + b * r))); pen.closePath(); };
    if (shape === "disc") pen.arc(x, y, r * 0.95, 0, 2 * Math.PI);
    else if (shape === "square") corners([[-0.85, -0.85], [0.85, -0.85], [0.85, 0.85], [-0.85, 0.85]]);
    else if (shape === "triangle") corners([[0, -1.1], [1, 0.8], [-1, 0.8]]);
    else if (shape === "diamond") corners([[0, -1.2], [1, 0], [0, 1.2], [-1, 0]]);
    else if (shape === "cross") corners([[-0.35, -1], [0.35, -1], [0.35, -0.35], [1, -0.35], [1, 0.35], [0.35, 0.35], [0.35, 1], [-0.35, 1], [-0.35, 0.35], [-1, 0.35], [-1, -0.35], [-0.35, -0.35]]);
    else corners(Array.from({ length: 10 }, (_, k) => { const a = Math.PI * (k / 5 - 0.5), l = k % 2 ? 0.5 : 1.2; return [l * Math.cos(a), l * Math.sin(a)]; }));
  }
  function paint(pen, shape, colour, x, y, r) {
    outline(pen, shape, x, y, r);
    pen.fillStyle = colour; pen.fill();
    pen.strokeStyle = darker(colour); pen.lineWidth = 1; pen.stroke();
  }
  function ring(pen, x, y, r) {  // training images
    pen.beginPath(); pen.arc(x, y, r, 0, 2 * Math.PI);
    pen.globalAlpha = 0.16; pen.fillStyle = TRAINING; pen.fill();
    pen.globalAlpha = 0.75; pen.strokeStyle = TRAINING; pen.lineWidth = 1; pen.stroke();
    pen.globalAlpha = 1;
  }
  function swatch(draw) {
    const canvas = element("canvas", "", { width: "32", height: "32", class: "ds-em-swatch", "aria-hidden": "true" });
    draw(canvas.getContext("2d"));
    return canvas;
  }
  function within(x, y, line) {  // whether a point is inside a closed line, by the even-odd rule
    let inside = false;
    for (let k = 0, before = line.length - 1; k < line.length; before = k++) {
      const [x1, y1] = line[k], [x2, y2] = line[before];
      if (y1 > y !== y2 > y && x < (x2 - x1) * (y - y1) / (y2 - y1) + x1) inside = !inside;
    }
    return inside;
  }
  function save(blob, name) {
    const link = element("a", "", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  class EmbeddingMap extends HTMLElement {
    static observedAttributes = ["data-map"];

    connectedCallback() {
      this.emptied = new MutationObserver(() => { if (!this.firstElementChild) this.schedule(); });
      this.emptied.observe(this, { childList: true });
      this.schedule();
    }
    attributeChangedCallback() { this.schedule(); }
    disconnectedCallback() { this.emptied?.disconnect(); this.release(); }
    release() { this.ends?.abort(); this.resizes?.disconnect(); this.themes?.disconnect(); }

    // Gradio compares the children of an element with those that the server has sent, which are none, and removes the others. So
    // the map is built after that.
    schedule() {
      if (this.pending) return;
      this.pending = true;
      queueMicrotask(() => { this.pending = false; if (this.isConnected) this.show(); });
    }

    show() {
      this.release();
      this.ends = new AbortController();
      this.data = JSON.parse(this.dataset.map);
      this.points = this.data.points;
      this.selected = new Set();
      this.chosen = -1;
      this.loop = [];
      this.lasso = false;
      const reach = [...this.points.map((p) => p.at), ...this.data.cubes].map((p) => Math.hypot(p[0], p[1], p[2])).sort((a, b) => a - b);
      this.unit = 1 / Math.max(1e-6, reach[Math.floor(0.98 * (reach.length - 1))] || 1);
      this.sheet = null;
      this.build();
      const named = this.points.findIndex((p) => p.id === kept.chosen);
      this.choose(named >= 0 ? named : this.data.chosen ?? -1);
      this.resizes = new ResizeObserver(() => (kept.moved ? this.redraw() : this.fit()));
      this.resizes.observe(this.canvas);
      this.themes = new MutationObserver(() => this.redraw());
      this.themes.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
      if (this.data.sheet) {
        const sheet = new Image();
        sheet.onload = () => { this.sheet = sheet; this.choose(this.chosen); };
        sheet.src = this.data.sheet;
      }
    }

    labels(by = kept.by) { return [...new Set(this.points.map((p) => p[by]))].sort((a, b) => a.localeCompare(b)); }
    look(point) {
      const place = this.ranks.get(point[kept.by]);
      return [SHAPES[place % SHAPES.length], PALETTE[place % PALETTE.length]];
    }
    isShown(point) { return Object.keys(BY).every((by) => !kept.hidden.has(`${by}:${point[by]}`)); }

    // -- the parts of the page
    build() {
      const keys = `ds-em-keys-${++numbered}`, plot = element("div", "", { class: "ds-em-plot" });
      this.canvas = element("canvas", "", {
        tabindex: "0", role: "application", "aria-describedby": keys,
        "aria-label": `Map of ${window.dermisCounted(this.points.length, "image")} in three dimensions`,
      });
      this.pen = this.canvas.getContext("2d");
      this.hoverBox = element("div", "", { class: "ds-em-hover", "aria-hidden": "true" });
      this.hoverBox.hidden = true;
      const zooms = element("div", "", { class: "ds-em-zoom", role: "group", "aria-label": "View" });
      zooms.append(this.button("Fit", () => this.fit()), this.button("+", () => this.zoom(1.25), "Zoom in"), this.button("−", () => this.zoom(0.8), "Zoom out"),
        this.button("←", () => this.rotate(-TURN, 0), "Rotate left"), this.button("→", () => this.rotate(TURN, 0), "Rotate right"),
        this.button("↑", () => this.rotate(0, -TURN), "Rotate up"), this.button("↓", () => this.rotate(0, TURN), "Rotate down"));
      this.addButton = this.button("Add to the selection", () => this.toggle(this.chosen));
      this.centreButton = this.button("Show in the middle", () => this.centre(this.chosen));
      plot.append(this.canvas, this.hoverBox, zooms);

      const side = element("div", "", { class: "ds-em-side" });
      const by = element("select"), label = element("label", "Colour and shape", { class: "ds-em-field" });
      for (const [value, words] of Object.entries(BY)) by.append(element("option", words, { value }));
      by.value = kept.by;
      by.addEventListener("change", () => { kept.by = by.value; this.legend(); this.redraw(); });
      label.append(by);
      this.legendBox = element("fieldset");
      this.selectedWords = element("p", "", { class: "ds-muted", role: "status" });
      this.lassoButton = this.button("Draw around images", () => this.setLasso(!this.lasso));
      this.lassoButton.setAttribute("aria-pressed", "false");
      this.clearButton = this.button("Clear", () => this.select(() => false));
      const picking = element("div", "", { class: "ds-actions" }), saving = element("div", "", { class: "ds-actions" });
      picking.append(this.lassoButton, this.button("Select all shown", () => this.select(() => true)), this.clearButton);
      saving.append(this.button("Save as CSV", () => this.saveTable()), this.button("Save as PNG", () => this.savePicture()));
      const search = element("input", "", { type: "search", autocomplete: "off", spellcheck: "false" });
      const find = element("label", "Find an image", { class: "ds-em-field" });
      find.append(search);
      this.found = element("p", "", { class: "ds-muted", role: "status" });
      search.addEventListener("input", () => this.find(search.value));
      search.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); this.find(search.value); } });
      const steps = element("div", "", { class: "ds-actions" });
      steps.append(this.button("Previous image", () => this.step(-1)), this.button("Next image", () => this.step(1)));
      this.about = element("section", "", { "aria-label": "Chosen image", "aria-live": "polite", class: "ds-em-about" });
      const help = element("details", "", { class: "ds-more" });
      help.append(element("summary", "Keyboard and mouse"), element("p",
        "On the map: arrow keys or dragging rotate, with Shift they shift; plus, minus or the wheel (after a click, or with Ctrl) zoom; 0 fits the view. " +
        "Enter chooses the image nearest to the middle, N and P the next and the previous one, Escape none. L begins to draw around images. " +
        "Buttons do the same: those on the map, and those of the chosen image.",
        { class: "ds-muted", id: keys }));
      side.append(label, this.legendBox, find, this.found, steps, this.about, element("h3", "Select and save"), picking, this.selectedWords, saving, help);

      const frame = element("div", "", { class: "ds-em" });
      frame.append(plot, side);
      this.replaceChildren(frame);
      this.legend();
      this.showSelected();
      this.listen();
    }

    button(words, act, label = "") {
      const made = element("button", words, { type: "button", class: "ds-button", ...(label ? { "aria-label": label } : {}) });
      made.addEventListener("click", act);
      return made;
    }

    legend() {
      this.ranks = new Map(this.labels().map((label, rank) => [label, rank]));
      const line = (words, checked, mark, change) => {
        const label = element("label", "", { class: "ds-em-line" }), box = element("input", "", { type: "checkbox" });
        box.checked = checked;
        box.addEventListener("change", () => { change(box.checked); this.showSelected(); this.redraw(); });
        label.append(box, swatch(mark), element("span", words));
        return label;
      };
      const lines = [...this.ranks].map(([label, rank]) => {
        const name = `${kept.by}:${label}`, count = this.points.filter((p) => p[kept.by] === label).length;
        return line(`${label} (${count})`, !kept.hidden.has(name),
          (pen) => paint(pen, SHAPES[rank % SHAPES.length], PALETTE[rank % PALETTE.length], 16, 16, 10),
          (checked) => (checked ? kept.hidden.delete(name) : kept.hidden.add(name)));
      });
      if (this.data.cubes.length || this.data.positions.length) lines.push(
        line("training images", kept.training, (pen) => ring(pen, 16, 16, 12), (checked) => { kept.training = checked; }));
      if (this.data.sheet) lines.push(
        line("draw the images themselves", kept.pictures, (pen) => { pen.strokeStyle = TRAINING; pen.strokeRect(5, 5, 22, 22); },
          (checked) => { kept.pictures = checked; }));
      this.legendBox.replaceChildren(element("legend", `${BY[kept.by]}: what is shown`), ...lines);
    }

    // -- drawing
    projected() {
      const m = kept.turn, width = this.canvas.clientWidth, height = this.canvas.clientHeight;
      const scale = 0.42 * Math.min(width, height) * (kept.zoom || 1);
      const place = (p) => {
        const [a, b, c] = [p[0] * this.unit, p[1] * this.unit, p[2] * this.unit];
        const z = m[6] * a + m[7] * b + m[8] * c, far = 3 / Math.max(0.4, 3 - z);
        return [width / 2 + kept.x + scale * far * (m[0] * a + m[1] * b + m[2] * c),
                height / 2 + kept.y - scale * far * (m[3] * a + m[4] * b + m[5] * c), z, far * scale];
      };
      this.screen = this.points.map((p) => place(p.at));
      this.cubes = this.data.cubes.map(place);
      this.dots = this.data.positions.map(place);
    }

    draw() {
      const ratio = window.devicePixelRatio || 1, canvas = this.canvas, pen = this.pen;
      const width = canvas.clientWidth, height = canvas.clientHeight;
      if (!width || !height) return;
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
      }
      this.projected();
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, width, height);
      const most = Math.max(1, ...this.data.cubes.map((cube) => cube[3]));
      const items = [];
      if (kept.training) {
        this.dots.forEach((s) => items.push([s[2], () => { pen.fillStyle = TRAINING; pen.fillRect(s[0] - 1, s[1] - 1, 2, 2); }]));
        this.cubes.forEach((s, k) => items.push([s[2] - 0.001, () =>
          ring(pen, s[0], s[1], 0.5 * this.data.side * this.unit * s[3] * Math.sqrt(this.data.cubes[k][3] / most))]));
      }
      const r = Math.max(4, Math.min(8, 90 / Math.sqrt(this.points.length))) * Math.sqrt(kept.zoom || 1);
      this.points.forEach((point, i) => {
        if (this.isShown(point)) items.push([this.screen[i][2], () => this.paintPoint(i, Math.min(16, r))]);
      });
      items.sort((a, b) => a[0] - b[0]);
      for (const item of items) item[1]();
      if (this.chosen >= 0) this.drawChosen(Math.min(16, r));
      if (this.loop.length > 1) {
        pen.strokeStyle = getComputedStyle(document.body).color; pen.lineWidth = 1.5; pen.setLineDash([5, 4]);
        pen.beginPath(); this.loop.forEach(([x, y], k) => (k ? pen.lineTo(x, y) : pen.moveTo(x, y)));
        pen.closePath(); pen.stroke(); pen.setLineDash([]);
      }
    }

    paintPoint(i, r) {
      const [x, y] = this.screen[i], [shape, colour] = this.look(this.points[i]), pen = this.pen;
      const rest = this.selected.size > 0 && !this.selected.has(i);
      if (kept.pictures && this.sheet && this.points[i].picture && !rest) {
        const side = 4 * r;
        pen.fillStyle = colour; pen.fillRect(x - side / 2 - 2, y - side / 2 - 2, side + 4, side + 4);
        this.thumbnail(pen, i, x - side / 2, y - side / 2, side);
        paint(pen, shape, colour, x - side / 2 + 3, y - side / 2 + 3, 5);
      } else paint(pen, shape, colour, x, y, rest ? r / 2.5 : r);
    }

    thumbnail(pen, i, x, y, side) {
      const t = this.data.pixels, columns = this.data.columns;
      pen.imageSmoothingQuality = "high";
      pen.drawImage(this.sheet, (i % columns) * t, Math.floor(i / columns) * t, t, t, x, y, side, side);
    }

    drawChosen(r) {
      const pen = this.pen, [x, y] = this.screen[this.chosen];
      pen.strokeStyle = getComputedStyle(document.body).color; pen.lineWidth = 1;
      for (const [j] of this.near) if (this.isShown(this.points[j])) {
        pen.beginPath(); pen.moveTo(x, y); pen.lineTo(this.screen[j][0], this.screen[j][1]); pen.stroke();
      }
      pen.lineWidth = 2.5; pen.beginPath(); pen.arc(x, y, (kept.pictures ? 2.9 : 1) * r + 5, 0, 2 * Math.PI); pen.stroke();
    }

    redraw() {
      if (!this.waiting) { this.waiting = true; requestAnimationFrame(() => { this.waiting = false; if (this.isConnected) this.draw(); }); }
    }

    // -- moving
    rotate(dx, dy) {  // radians to the right and down, about the axes of the screen
      const [c, s, e, t] = [Math.cos(dx), Math.sin(dx), Math.cos(dy), Math.sin(dy)];
      const by = [c, 0, s, s * t, e, -c * t, -s * e, t, c * e], m = kept.turn, next = [];
      for (let r = 0; r < 3; r++) for (let q = 0; q < 3; q++)
        next.push(by[3 * r] * m[q] + by[3 * r + 1] * m[3 + q] + by[3 * r + 2] * m[6 + q]);
      // Accumulated rounding would turn the rotation into a shear, so the rows are made orthonormal again.
      const unit = (v) => { const l = Math.hypot(...v); return v.map((x) => x / l); };
      const a = unit(next.slice(0, 3)), raw = next.slice(3, 6), d = a[0] * raw[0] + a[1] * raw[1] + a[2] * raw[2];
      const b = unit(raw.map((x, q) => x - d * a[q]));
      kept.turn = [...a, ...b, a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
      this.redraw();
    }
    zoom(factor) { kept.moved = true; kept.zoom = Math.min(40, Math.max(0.2, (kept.zoom || 1) * factor)); this.redraw(); }
    shift(dx, dy) { kept.moved = true; kept.x += dx; kept.y += dy; this.redraw(); }
    centre(i) {
      if (i < 0) return;
      this.projected();
      this.shift(this.canvas.clientWidth / 2 - this.screen[i][0], this.canvas.clientHeight / 2 - this.screen[i][1]);
    }
    fit() {  // zoom and shift so that what is shown fills the canvas
      const width = this.canvas.clientWidth, height = this.canvas.clientHeight;
      if (!width || !height) return;
      Object.assign(kept, { zoom: 1, x: 0, y: 0, moved: false });
      this.projected();
      const shown = [...this.screen.filter((_, i) => this.isShown(this.points[i])), ...(kept.training ? this.cubes : [])];
      if (!shown.length) return;
      const range = (k) => { const v = shown.map((s) => s[k]).sort((a, b) => a - b), cut = Math.floor(0.01 * v.length); return [v[cut], v[v.length - 1 - cut]]; };
      const [left, right] = range(0), [top, bottom] = range(1);
      kept.zoom = Math.min(40, Math.max(0.2, Math.min(0.84 * width / Math.max(1, right - left), 0.84 * height / Math.max(1, bottom - top))));
      kept.x = kept.zoom * (width - left - right) / 2; kept.y = kept.zoom * (height - top - bottom) / 2;
      this.redraw();
    }

    // -- choosing
    pointAt(x, y, reach) {
      let best = -1, nearest = reach * reach;
      this.screen?.forEach((s, i) => {
        if (!this.isShown(this.points[i])) return;
        const d = (s[0] - x) ** 2 + (s[1] - y) ** 2;
        if (d < nearest || (d === nearest && best >= 0 && s[2] > this.screen[best][2])) { best = i; nearest = d; }
      });
      return best;
    }
    neighbours(i) {
      const from = this.points[i].at;
      return this.points.map((p, j) => [j, Math.hypot(...p.at.map((v, k) => v - from[k]))]).filter(([j]) => j !== i)
        .sort((a, b) => a[1] - b[1]).slice(0, NEIGHBOURS);
    }
    facts(point) {
      const found = [["Class", point.class], ["Source", point.source], ["Verdict", point.verdict]];
      if (point.distance !== undefined) found.push(["Distance", `${point.distance.toFixed(2)}, percentile ${point.percentile}`]);
      return found;
    }
    picture(i, side, alt) {  // a thumbnail as an image of its own, for people who do not see the canvas
      if (!this.sheet || !this.points[i].picture) return null;
      const canvas = element("canvas", "", { width: String(side), height: String(side), role: "img", "aria-label": alt });
      this.thumbnail(canvas.getContext("2d"), i, 0, 0, side);
      return canvas;
    }
    choose(i) {
      this.chosen = i;
      kept.chosen = i < 0 ? null : this.points[i].id;
      if (i < 0) {
        this.near = [];
        this.about.replaceChildren(element("p", "No image is chosen. Click one, or use the buttons above.", { class: "ds-muted" }));
        this.redraw();
        return;
      }
      const point = this.points[i], list = element("dl", "", { class: "ds-facts" });
      for (const [name, value] of this.facts(point)) {
        const row = element("div");
        row.append(element("dt", name), element("dd", value));
        list.append(row);
      }
      const links = element("div", "", { class: "ds-actions" });
      links.append(...point.links.map(([href, words]) => element("a", words, { href, class: "ds-button" })));
      const here = element("div", "", { class: "ds-actions" });
      here.append(this.addButton, this.centreButton);
      this.near = this.neighbours(i);
      const near = element("ol", "", { class: "ds-em-near" });
      near.append(...this.near.map(([j, distance]) => {
        const item = element("li"), other = this.points[j];
        const go = this.button("", () => { this.choose(j); this.about.querySelector(".ds-em-near button")?.focus(); });
        const image = this.picture(j, 64, "");
        if (image) { image.setAttribute("aria-hidden", "true"); image.removeAttribute("role"); image.removeAttribute("aria-label"); go.append(image); }
        go.append(element("span", `${other.id}; ${other.verdict.toLowerCase()}; distance ${distance.toFixed(2)}`));
        item.append(go);
        return item;
      }));
      const parts = [element("h3", point.id), this.picture(i, 128, `Thumbnail of ${point.id}`), list, here, links];
      if (this.near.length) parts.push(element("h3", "Nearest images of the map"), near);
      this.about.replaceChildren(...parts.filter(Boolean));
      this.showSelected();
      this.redraw();
    }
    step(by) {
      const count = this.points.length;
      for (let k = 1; k <= count; k++) {
        const i = (((this.chosen + by * k) % count) + count) % count;
        if (this.isShown(this.points[i])) return this.choose(i);
      }
    }
    find(text) {
      const words = text.trim().toLowerCase();
      if (!words) { this.found.textContent = ""; return; }
      const matches = this.points.map((p, i) => [p, i]).filter(([p]) => this.isShown(p) && `${p.id} ${p.class} ${p.verdict} ${p.source}`.toLowerCase().includes(words)).map(([, i]) => i);
      this.found.textContent = matches.length ? `${matches.length} found; Enter shows the next one` : "No image has this text.";
      if (matches.length) this.choose(matches[(matches.indexOf(this.chosen) + 1) % matches.length]);
    }

    // -- selecting and saving
    select(test) {
      this.selected = new Set(this.points.map((_, i) => i).filter((i) => this.isShown(this.points[i]) && test(i)));
      this.showSelected();
      this.redraw();
    }
    toggle(i) {  // select an image, or no longer
      if (i < 0) return;
      if (!this.selected.delete(i)) this.selected.add(i);
      this.showSelected();
      this.redraw();
    }
    showSelected() {
      const shown = this.points.filter((p) => this.isShown(p)).length;
      this.addButton.textContent = this.selected.has(this.chosen) ? "Remove from the selection" : "Add to the selection";
      this.clearButton.disabled = this.selected.size === 0;
      this.selectedWords.textContent = this.selected.size ? `${this.selected.size} selected.` : `Nothing is selected: a file has ${window.dermisCounted(shown, "image")}, all that are shown.`;
    }
    setLasso(on) {
      this.lasso = on;
      this.lassoButton.setAttribute("aria-pressed", String(on));
      this.canvas.classList.toggle("ds-em-selecting", on);
    }
    table() {
      const cell = (value) => {  // a leading = + - @ would be a formula in a spreadsheet
        const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
        return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
      };
      const parts = this.data.explained.map((_, k) => `component_${k + 1}`);
      const lines = [["image", "source", "class", "verdict", "distance", "percentile", "images", ...parts].join(",")];
      this.points.forEach((p, i) => {
        if (!this.isShown(p) || (this.selected.size && !this.selected.has(i))) return;
        lines.push([cell(p.id), cell(p.source), cell(p.class), cell(p.verdict), p.distance ?? "", p.percentile ?? "", 1, ...p.at].join(","));
      });
      if (kept.training && !this.selected.size) for (const [x, y, z, count] of this.data.cubes)
        lines.push(["", "training images in a cube", "", "", "", "", count, x, y, z, ...parts.slice(3).map(() => "")].join(","));
      return `${lines.join("\n")}\n`;
    }
    saveTable() { save(new Blob([this.table()], { type: "text/csv" }), "map.csv"); }
    savePicture() {
      this.draw();
      const ratio = window.devicePixelRatio || 1, copy = document.createElement("canvas"), pen = copy.getContext("2d");
      const names = [...this.ranks.keys()];
      copy.width = this.canvas.width; copy.height = this.canvas.height + Math.round(26 * ratio * (names.length + (kept.training ? 1 : 0)) + 12 * ratio);
      pen.fillStyle = getComputedStyle(document.body).backgroundColor;
      pen.fillRect(0, 0, copy.width, copy.height);
      pen.drawImage(this.canvas, 0, 0);
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.font = "14px system-ui, sans-serif"; pen.textBaseline = "middle";
      let y = this.canvas.height / ratio + 16;
      const write = (words) => { pen.fillStyle = getComputedStyle(document.body).color; pen.fillText(words, 38, y); y += 26; };
      names.forEach((name, rank) => { paint(pen, SHAPES[rank % SHAPES.length], PALETTE[rank % PALETTE.length], 22, y, 7); write(name); });
      if (kept.training) { ring(pen, 22, y, 8); write("training images"); }
      copy.toBlob((blob) => save(blob, "map.png"));
    }

    // -- what the visitor does
    hover(x, y) {
      const i = this.pointAt(x, y, 12), box = this.hoverBox;
      const cube = i < 0 && kept.training ? this.cubes?.findIndex((s) => Math.hypot(s[0] - x, s[1] - y) < 8) ?? -1 : -1;
      box.hidden = i < 0 && cube < 0;
      if (box.hidden) return;
      if (i >= 0) {
        const point = this.points[i];
        box.replaceChildren(...[this.picture(i, 128, point.id), element("b", point.id), ...this.facts(point).map(([name, value]) => element("div", `${name}: ${value}`))].filter(Boolean));
      } else box.replaceChildren(element("div", `About ${window.dermisCounted(this.data.cubes[cube][3], "training image is", "training images are")} in this cube.`));
      box.style.left = `${Math.max(0, Math.min(x + 14, this.canvas.clientWidth - box.offsetWidth - 4))}px`;
      box.style.top = `${Math.max(4, Math.min(y + 14, this.canvas.clientHeight - box.offsetHeight - 4))}px`;
    }
    listen() {
      const canvas = this.canvas, pointers = new Map(), options = { signal: this.ends.signal };
      let travelled = 0;
      const on = (name, act, more = {}) => canvas.addEventListener(name, act, { ...options, ...more });
      on("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
        if (pointers.size === 1) travelled = 0;
        if (this.lasso) this.loop = [[event.offsetX, event.offsetY]];
      });
      on("pointermove", (event) => {
        const before = pointers.get(event.pointerId), now = [event.offsetX, event.offsetY];
        if (!before) { this.hover(...now); return; }
        const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
        travelled += Math.hypot(dx, dy);
        pointers.set(event.pointerId, now);
        if (this.lasso) { this.loop.push(now); this.redraw(); return; }
        if (pointers.size === 2) {
          const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
          const apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
          this.zoom(apart(now) / Math.max(1, apart(before)));
        } else if (event.shiftKey || event.buttons === 2) this.shift(dx, dy);
        else this.rotate(dx * 0.008, dy * 0.008);
        this.hoverBox.hidden = true;
      });
      for (const name of ["pointerup", "pointercancel"]) on(name, (event) => {
        pointers.delete(event.pointerId);
        if (this.lasso) {
          const line = this.loop;
          this.loop = [];
          if (name === "pointerup" && line.length > 2) this.select((i) => within(this.screen[i][0], this.screen[i][1], line));
          this.setLasso(false);
          this.redraw();
        } else if (name === "pointerup" && travelled < 4) this.choose(this.pointAt(event.offsetX, event.offsetY, 14));
      });
      on("pointerleave", () => { this.hoverBox.hidden = true; });
      on("contextmenu", (event) => event.preventDefault());
      on("wheel", (event) => {
        if (!event.ctrlKey && document.activeElement !== canvas) return;  // the page scrolls
        event.preventDefault();
        this.zoom(Math.exp(-event.deltaY * 0.0015));
      }, { passive: false });
      on("keydown", (event) => {
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
        const acts = {
          "+": () => this.zoom(1.15), "=": () => this.zoom(1.15), "-": () => this.zoom(1 / 1.15), "0": () => { kept.turn = FIRST.slice(); this.fit(); },
          Enter: () => this.choose(this.pointAt(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity)),
          n: () => this.step(1), p: () => this.step(-1), Escape: () => { this.setLasso(false); this.choose(-1); }, l: () => this.setLasso(!this.lasso),
        };
        const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
        if (arrows[key]) {
          const [dx, dy] = arrows[key];
          if (event.shiftKey) this.shift(24 * dx, 24 * dy); else this.rotate(TURN * dx, TURN * dy);
        } else if (acts[key]) acts[key]();
        else return;
        event.preventDefault();
      });
    }
  }
  customElements.define("ds-embedding-map", EmbeddingMap);
})();
