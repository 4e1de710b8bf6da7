"use strict";
// What a trace looked like after `count` steps: tokens, and for each position what wrote it last.
function canvasAfter(trace, row, count) {
  const ids = row.first.slice();
  const cause = ids.map(() => null); // {step, prob, edited}
  const fresh = new Set(), again = new Set();
  for (let s = 0; s < Math.min(count, row.steps.length); s++) {
    const isLast = s === count - 1;
    for (const at of row.steps[s].remasked) { ids[at] = trace.mask; cause[at] = null; if (isLast) again.add(at); }
    for (const c of row.steps[s].open) {
      if (!c.written) continue;
      ids[c.at] = c.token;
      cause[c.at] = { step: s, prob: c.prob, edited: c.held !== trace.mask };
      if (isLast) { fresh.add(c.at); again.delete(c.at); }
    }
  }
  return { ids, cause, fresh, again };
}
// One of eight shades for a share in [0, 1].
function shade(share) { return Math.max(0, Math.min(7, Math.floor(share * 8))); }
// What a step made of a position; undefined where the position was not open to it.
function openAt(row, step, at) { return step < 0 || step >= row.steps.length ? undefined : row.steps[step].open.find((c) => c.at === at); }
function percent(p) { return p === null ? "–" : (100 * p).toFixed(1) + "%"; }

const CELL = 16; // pixels of the heat map's bitmap

function element(tag, text, classes) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (classes) node.className = classes;
  return node;
}

class View {
  constructor(trace, app) {
    this.trace = trace; this.app = app; this.chosen = null;
    this.root = element("section", undefined, "trace");
    if (app.isPair) this.root.append(element("h2", trace.name));
    const facts = element("p", undefined, "facts");
    for (const [key, value] of trace.facts) { const span = element("span"); span.append(element("b", key), " " + value); facts.append(span); }
    this.canvas = element("div", undefined, "canvas");
    this.canvas.setAttribute("role", "group");
    this.canvas.setAttribute("aria-label", "canvas");
    this.legend = element("p", undefined, "legend");
    this.heat = element("canvas", undefined, "heat");
    this.heat.setAttribute("role", "img");
    this.heat.setAttribute("aria-label", "probability of the candidate at every step and position; the same numbers are in the table of the chosen token");
    this.heat.addEventListener("click", (event) => this.pick(event));
    this.details = element("div", undefined, "details");
    this.details.setAttribute("aria-live", "polite");
    this.root.append(facts, this.canvas, this.legend, this.details, element("h3", "Every step (down) and position (across)"), this.heat,
      element("p", "Colour: probability of the candidate. A dot: written by that step. The frame is the current step; click to go to another.", "quiet"));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
  }
  get row() { return this.trace.rows[Math.min(this.app.row, this.trace.rows.length - 1)]; }
  piece(token) { return this.trace.pieces[token]; }
  setRow() {
    const row = this.row;
    this.chosen = row.completion.indexOf(1);
    this.tokens = row.first.map((_, at) => {
      const button = element("button");
      button.type = "button";
      button.tabIndex = at === this.chosen ? 0 : -1;
      button.addEventListener("click", () => this.choose(at));
      return button;
    });
    this.canvas.replaceChildren(...this.tokens);
  }
  choose(at) {
    if (this.tokens[this.chosen]) this.tokens[this.chosen].tabIndex = -1;
    this.chosen = at;
    this.tokens[at].tabIndex = 0;
    this.draw();
  }
  move(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(this.tokens.length - 1, this.chosen + by)));
    this.tokens[this.chosen].focus();
  }
  pick(event) {
    const box = this.heat.getBoundingClientRect(), row = this.row;
    const column = Math.floor((event.clientX - box.left) / box.width * this.columns.length);
    const step = Math.floor((event.clientY - box.top) / box.height * row.steps.length);
    if (this.columns[column] !== undefined) this.choose(this.columns[column]);
    this.app.setStep(step + 1);
  }
  drawHeat() {
    const row = this.row, style = getComputedStyle(document.documentElement);
    this.columns = row.completion.flatMap((open, at) => (open ? [at] : []));
    const columns = Math.max(1, this.columns.length), steps = Math.max(1, row.steps.length);
    this.heat.width = CELL * columns; this.heat.height = CELL * steps;
    this.heat.style.width = `min(100%, ${22 * columns}px)`;
    this.heat.style.aspectRatio = String(Math.max(0.8, columns / steps));
    const pen = this.heat.getContext("2d"), place = new Map(this.columns.map((at, column) => [at, column]));
    row.steps.forEach((step, s) => step.open.forEach((c) => {
      const x = CELL * place.get(c.at), y = CELL * s;
      pen.fillStyle = style.getPropertyValue("--c" + shade(c.prob ?? 1));
      pen.fillRect(x, y, CELL, CELL);
      if (!c.written) return;
      pen.fillStyle = style.getPropertyValue((c.prob ?? 1) >= 0.75 ? "--light-text" : "--dark-text");
      pen.beginPath(); pen.arc(x + CELL / 2, y + CELL / 2, CELL / 5, 0, 7); pen.fill();
    }));
    const now = this.app.step - 1;
    if (now >= 0 && now < row.steps.length) {
      pen.strokeStyle = style.getPropertyValue("--focus"); pen.lineWidth = 3;
      pen.strokeRect(1.5, CELL * now + 1.5, CELL * columns - 3, CELL - 3);
    }
  }
  draw() {
    const row = this.row, now = canvasAfter(this.trace, row, this.app.step), total = Math.max(1, row.steps.length - 1);
    this.tokens.forEach((button, at) => {
      const token = now.ids[at], cause = now.cause[at], classes = [];
      if (!row.completion[at]) classes.push("given");
      else if (cause === null) classes.push("masked");
      else if (this.app.colour === "order") classes.push("h" + shade(cause.step / total));
      else if (cause.prob !== null) classes.push("c" + shade(cause.prob));
      if (row.borders.includes(at)) classes.push("border");
      if (now.fresh.has(at)) classes.push("new");
      if (now.again.has(at)) classes.push("again");
      if (cause !== null && cause.edited) classes.push("edited");
      if (at === this.chosen) classes.push("chosen");
      button.className = classes.join(" ");
      button.textContent = this.piece(token);
      const open = openAt(row, this.app.step, at) ?? openAt(row, this.app.step - 1, at);
      const tops = open ? open.tops.map(([t, p]) => this.piece(t) + " " + percent(p)).join("   ") : "";
      button.title = (cause ? "step " + (cause.step + 1) + ", " + percent(cause.prob) : row.completion[at] ? "masked" : "given") + (tops ? "\n" + tops : "");
      button.setAttribute("aria-label", "position " + at + ": " + (row.completion[at] && cause === null ? "masked" : this.piece(token)));
    });
    this.drawLegend();
    this.drawDetails(row);
    this.drawHeat();
  }
  drawLegend() {
    const ramp = this.app.colour === "order" ? "h" : "c";
    const swatches = [...Array(8).keys()].map((i) => element("i", undefined, ramp + i));
    const [low, high] = ramp === "h" ? ["first ", " last"] : ["0% ", " 100%"];
    this.legend.replaceChildren(low, ...swatches, high, element("span", "framed: written by this step · underlined: edited · dashed: masked again", "quiet"));
  }
  drawDetails(row) {
    const at = this.chosen, step = this.app.step - 1, box = this.details;
    box.replaceChildren(element("h3", "Position " + at + (step >= 0 ? ", step " + (step + 1) : ", before the first step")));
    if (!row.completion[at]) { box.append(element("p", "Given: part of the prompt.", "quiet")); return; }
    const open = openAt(row, step, at);
    const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) + "." : "");
    if (open) { box.append(element("p", sentence(open.why)), element("p", sentence(row.steps[step].rule), "quiet"), this.tops(open)); }
    else if (step >= 0) box.append(element("p", row.steps[step] && row.steps[step].remasked.includes(at) ? "Masked again by this step." : "Not open to this step.", "quiet"));
    box.append(element("h3", "All steps"), this.history(row, at, step));
  }
  tops(open) {
    const table = element("table");
    for (const [token, prob] of open.tops) {
      const line = element("tr", undefined, token === open.token ? "is-candidate" : "");
      const bar = element("span", undefined, "bar"), cell = element("td");
      bar.style.width = (140 * prob).toFixed(1) + "px";
      cell.append(bar);
      const name = element("td"); name.append(element("code", this.piece(token)));
      line.append(name, element("td", percent(prob), "num"), cell);
      table.append(line);
    }
    if (!open.tops.some(([token]) => token === open.token)) {
      const line = element("tr", undefined, "is-candidate"), name = element("td");
      name.append(element("code", this.piece(open.token)));
      line.append(name, element("td", percent(open.prob), "num"), element("td", "the candidate"));
      table.append(line);
    }
    return table;
  }
  history(row, at, current) {
    const table = element("table");
    row.steps.forEach((step, s) => {
      const c = step.open.find((item) => item.at === at), isAgain = step.remasked.includes(at);
      if (!c && !isAgain) return;
      const line = element("tr", undefined, s === current ? "now" : "");
      const what = isAgain ? "masked again" : c.written ? (c.held === this.trace.mask ? "committed" : "replaced " + this.piece(c.held)) : "";
      const name = element("td"); name.append(element("code", c ? this.piece(c.token) : ""));
      const link = element("button", "step " + (s + 1));
      link.type = "button";
      link.addEventListener("click", () => this.app.setStep(s + 1));
      const first = element("td"); first.append(link);
      line.append(first, name, element("td", c ? percent(c.prob) : "", "num"), element("td", c && c.rank ? "rank " + c.rank : ""), element("td", what));
      table.append(line);
    });
    return table;
  }
}

class App {
  constructor(data) {
    this.row = 0; this.step = 0; this.colour = "prob"; this.timer = null; this.isPair = data.traces.length > 1;
    this.find = (id) => document.getElementById(id);
    this.views = data.traces.map((trace) => new View(trace, this));
    this.find("traces").append(...this.views.map((view) => view.root));
    const most = data.traces.reduce((best, trace) => (trace.rows.length > best.rows.length ? trace : best));
    this.find("row").append(...most.rows.map((row, index) => { const option = element("option", row.label); option.value = index; return option; }));
    this.find("row-label").hidden = most.rows.length < 2;
    this.find("controls").addEventListener("submit", (event) => event.preventDefault());
    this.find("step").addEventListener("input", (event) => this.setStep(Number(event.target.value)));
    this.find("back").addEventListener("click", () => this.setStep(this.step - 1));
    this.find("on").addEventListener("click", () => this.setStep(this.step + 1));
    this.find("play").addEventListener("click", () => this.play());
    this.find("colour").addEventListener("change", (event) => { this.colour = event.target.value; this.setStep(this.step); });
    this.find("row").addEventListener("change", (event) => this.setRow(Number(event.target.value)));
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
      if (event.key === ",") this.setStep(this.step - 1);
      if (event.key === ".") this.setStep(this.step + 1);
      if (event.key === "p") this.play();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.views.forEach((view) => view.drawHeat()));
    this.setRow(0);
    const wanted = /^#step=(\d+)$/.exec(location.hash);
    this.setStep(wanted ? Number(wanted[1]) : this.last);
  }
  get last() { return Math.max(...this.views.map((view) => view.row.steps.length)); }
  setRow(row) {
    this.row = row;
    this.views.forEach((view) => view.setRow());
    this.find("step").max = this.last;
    this.setStep(Math.min(this.step, this.last));
  }
  setStep(step) {
    this.step = Math.max(0, Math.min(this.last, step));
    this.find("step").value = this.step;
    this.find("when").textContent = this.step ? "step " + this.step + " of " + this.last : "before step 1";
    this.views.forEach((view) => view.draw());
  }
  play() {
    const isPlaying = this.timer === null;
    if (isPlaying) {
      if (this.step >= this.last) this.setStep(0);
      this.timer = setInterval(() => { if (this.step >= this.last) this.play(); else this.setStep(this.step + 1); }, Math.max(60, Math.min(700, 12000 / this.last)));
    } else { clearInterval(this.timer); this.timer = null; }
    this.find("play").textContent = isPlaying ? "❚❚ pause" : "▶ play";
    this.find("play").setAttribute("aria-pressed", String(isPlaying));
  }
}

if (typeof document !== "undefined") new App(JSON.parse(document.getElementById("data").textContent));
else module.exports = { canvasAfter, shade, openAt, percent };
