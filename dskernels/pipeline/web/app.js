"use strict";
// Two panels of controls, each with its chart, figures and memory curve.

const COLOURS = [
  { F: "#5b8ff9", B: "#2f9e6e", I: "#8fd3a8", W: "#f6c65b" },
  { F: "#9270ca", B: "#c2548a", I: "#e5a3c2", W: "#e8945a" },
];
const SLIDERS = [
  ["ranks", "ranks", 1, 16, 1],
  ["microbatches", "micro-batches", 1, 64, 1],
  ["f", "F", 0.1, 4, 0.1],
  ["bi", "Bi", 0.1, 4, 0.1],
  ["w", "W", 0.1, 4, 0.1],
  ["fb", "F&B", 0.1, 12, 0.1],
  ["latency", "transfer", 0, 2, 0.1],
];
const START = {
  a: { schedule: "1f1b", ranks: 8, microbatches: 20, f: 1, bi: 1, w: 1, fb: 3, latency: 0 },
  b: { schedule: "dualpipe", ranks: 8, microbatches: 20, f: 1, bi: 1, w: 1, fb: 3, latency: 0 },
};

function number(value) {
  return value === null ? "–" : String(Number(value.toPrecision(6)));
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

class Panel {
  constructor(id, state) {
    this.id = id;
    this.state = state;
    this.inputs = {};
    this.root = document.getElementById(id);
    this.build();
    this.update();
  }

  build() {
    const select = element("select", { id: `${this.id}-schedule`, "aria-label": "schedule" });
    for (const [name, family] of Object.entries(Pipeline.FAMILIES)) {
      select.append(element("option", { value: name }, family.title));
    }
    select.value = this.state.schedule;
    select.addEventListener("input", () => this.change("schedule", select.value));
    const controls = element("div", { class: "controls" }, select);
    for (const [key, label, min, max, step] of SLIDERS) {
      const input = element("input", {
        type: "range", id: `${this.id}-${key}`, min, max, step, value: this.state[key],
      });
      const shown = element("output", { for: input.id }, String(this.state[key]));
      input.addEventListener("input", () => {
        shown.textContent = input.value;
        this.change(key, Number(input.value));
      });
      this.inputs[key] = { input, shown };
      controls.append(element("label", {}, element("span", {}, label), input, shown));
    }
    this.note = element("p", { class: "note", role: "status" });
    this.chart = element("canvas", { class: "chart" });
    this.curve = element("canvas", { class: "curve" });
    this.figures = element("dl", {});
    this.tip = element("p", { class: "tip" });
    this.chart.addEventListener("mousemove", (event) => this.hover(event));
    this.chart.addEventListener("mouseleave", () => { this.tip.textContent = " "; });
    this.root.append(controls, this.note, this.figures, this.chart, this.tip, this.curve);
  }

  change(key, value) {
    this.state[key] = value;
    this.update();
    document.dispatchEvent(new Event("panel"));
  }

  costs() {
    const { f, bi, w, fb, latency } = this.state;
    // Equal work: the sliders price 1/ranks of the model; a schedule with V stages a rank pays
    // 1/V of it per action.
    const share = document.getElementById("equal").checked
      ? 1 / Pipeline.FAMILIES[this.state.schedule].perRank : 1;
    return { f: f * share, bi: bi * share, w: w * share, fb: fb * share, latency };
  }

  update() {
    const { schedule, ranks, microbatches } = this.state;
    const size = Pipeline.legal(schedule, ranks, microbatches);
    this.note.textContent = size.note || " ";
    const list = Pipeline.make(schedule, size.ranks, size.microbatches);
    this.result = Pipeline.simulate(list, this.costs());
    this.writeFigures();
    this.draw();
  }

  writeFigures() {
    const r = this.result;
    const worst = Math.max(...r.bubble);
    const unit = 1 / Pipeline.FAMILIES[r.schedule.name].perRank;
    const rows = {
      makespan: ["makespan", number(r.makespan)],
      bubble: ["bubble (worst rank)", `${number(worst)} = ${(100 * worst / r.makespan).toFixed(1)}%`],
      ranks: ["bubble by rank", r.bubble.map(number).join(" ")],
      formula: [`formula ${r.formulaText}`, number(r.formula)],
      span: ["bubble in a rank's span", r.spanBubble.map(number).join(" ")],
      peak: [
        unit < 1 ? `peak activations, in 1/${1 / unit} stages` : "peak activations, in stages",
        r.peak.join(" "),
      ],
      copies: ["copies of the parameters", String(r.schedule.placement.length)],
    };
    this.figures.replaceChildren();
    for (const [key, [label, value]] of Object.entries(rows)) {
      this.figures.append(
        element("dt", {}, label), element("dd", { id: `${this.id}-${key}-value` }, value));
    }
    const off = r.formula !== null && Math.abs(r.formula - worst) > 1e-6 * r.makespan;
    document.getElementById(`${this.id}-formula-value`).classList.toggle("off", off);
  }

  surface(canvas, height) {
    const ratio = window.devicePixelRatio || 1;
    const width = this.root.clientWidth - 24;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.clearRect(0, 0, width, height);
    context.font = "10px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    return { context, width };
  }

  // Both charts share one time axis, so that bubbles compare at a glance.
  span() {
    const all = Object.values(panels).map((panel) => panel.result.makespan);
    return Math.max(this.result.makespan, ...all);
  }

  draw() {
    const { rows } = this.result;
    const row = rows.length > 10 ? 16 : 22;
    const pitch = row + 3;
    const { context: c, width } = this.surface(this.chart, rows.length * pitch + 18);
    const left = 26;
    const scale = (width - left - 4) / this.span();
    this.geometry = { left, scale, pitch };
    rows.forEach((boxes, r) => {
      const y = r * pitch;
      c.fillStyle = "#dfe3ea";
      c.fillRect(left, y, this.result.makespan * scale, row);
      c.fillStyle = "#555";
      c.fillText(String(r), left / 2, y + row / 2);
      for (const box of boxes) this.drawBox(c, box, left + box.start * scale, y, scale, row);
    });
    c.fillStyle = "#555";
    const base = rows.length * pitch + 8;
    const step = 10 ** Math.floor(Math.log10(this.span())) / 2;
    for (let t = 0; t <= this.span() * 1.0001; t += step) {
      c.fillText(number(t), Math.min(left + t * scale, width - 10), base);
    }
    this.drawMemory(left, scale);
  }

  drawBox(c, { start, end, action }, x, y, scale, row) {
    const w = (end - start) * scale;
    const parts = action.parts || [action];
    parts.forEach((atom, i) => {
      const h = row / parts.length;
      c.fillStyle = COLOURS[atom.direction][atom.op];
      c.fillRect(x, y + i * h, Math.max(w - 0.6, 0.5), h);
      const label = String(atom.mb);
      if (w > 6 * label.length + 1 && h > 9) {
        c.fillStyle = "#10131a";
        c.fillText(label, x + w / 2, y + (i + 0.5) * h + 0.5);
      }
    });
  }

  drawMemory(left, scale) {
    const height = 90;
    const { context: c, width } = this.surface(this.curve, height);
    const every = Object.values(panels).flatMap((panel) =>
      panel.result.peak.map((p) => p / Pipeline.FAMILIES[panel.result.schedule.name].perRank));
    const unit = 1 / Pipeline.FAMILIES[this.result.schedule.name].perRank;
    const top = Math.max(1, ...every, ...this.result.peak.map((p) => p * unit));
    const level = (held) => height - 4 - (held * unit / top) * (height - 14);
    this.result.memory.forEach((curve, r) => {
      c.strokeStyle = `hsl(${215 - 190 * r / Math.max(1, this.result.memory.length - 1)} 65% 45%)`;
      c.globalAlpha = 0.75;
      c.beginPath();
      c.moveTo(left, level(0));
      let before = 0;
      for (const [t, held] of curve) {
        c.lineTo(left + t * scale, level(before));
        c.lineTo(left + t * scale, level(held));
        before = held;
      }
      c.lineTo(Math.min(width, left + this.result.makespan * scale), level(before));
      c.stroke();
    });
    c.globalAlpha = 1;
    c.fillStyle = "#555";
    c.fillText(number(top), left / 2, level(top / unit) + 4);
    c.fillText("0", left / 2, level(0) - 4);
  }

  hover(event) {
    const { left, scale, pitch } = this.geometry;
    const bounds = this.chart.getBoundingClientRect();
    const t = (event.clientX - bounds.left - left) / scale;
    const row = this.result.rows[Math.floor((event.clientY - bounds.top) / pitch)] || [];
    const box = row.find(({ start, end }) => start <= t && t < end);
    this.tip.textContent = box
      ? `${(box.action.parts || [box.action])
        .map((a) => `${a.op === "I" ? "Bi" : a.op} of stage ${a.stage}, micro-batch ${a.mb}`)
        .join(" with ")}: ${number(box.start)} to ${number(box.end)}`
      : " ";
  }
}

const panels = {};
panels.a = new Panel("a", START.a);
panels.b = new Panel("b", START.b);

function redraw() {
  for (const panel of Object.values(panels)) panel.draw();
}
document.addEventListener("panel", redraw);
window.addEventListener("resize", redraw);
document.getElementById("equal").addEventListener("input", () => {
  for (const panel of Object.values(panels)) panel.update();
  redraw();
});
redraw();
