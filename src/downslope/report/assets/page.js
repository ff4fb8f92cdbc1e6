"use strict";
// Hover, keyboard and copy. Everything visible was drawn by Python; text goes in through textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

const place = (axis, value) => {
  if (axis.flip) { // an accuracy, on the logarithm of its error
    const inside = Math.min(value, axis.high);
    return Math.log((1 - axis.low) / (1 - inside)) / Math.log((1 - axis.low) / (1 - axis.high));
  }
  if (axis.log) return value > 0 ? Math.log(value / axis.low) / Math.log(axis.high / axis.low) : -1;
  return (value - axis.low) / (axis.high - axis.low);
};

const digits = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2).replace("e+", "e");
};
const written = (axis, value) => axis.percent ? Number((100 * value).toPrecision(4)) + " %" : digits(value);

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const width = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(x + 14, width - tip.offsetWidth - 8));
  tip.style.left = (left + window.scrollX) + "px";
  tip.style.top = (y - tip.offsetHeight - 14 + window.scrollY) + "px";
}

function hide() {
  tip.hidden = true;
  document.querySelectorAll(".on").forEach((line) => line.classList.remove("on"));
  document.querySelectorAll(".cursor").forEach((dot) => dot.setAttribute("r", 0));
}

// The points of a panel's visible lines, as [series, index, x in pixels, y in pixels].
function visiblePoints(figure, panel, box) {
  const points = [];
  for (const line of figure.querySelectorAll("[data-i]")) {
    if (getComputedStyle(line).display === "none") continue;
    const series = data.series[line.dataset.i];
    const track = series.tracks[panel.quantity];
    track.values.forEach((raw, i) => {
      if (typeof raw !== "number") return;
      const x = place(panel.x, track[panel.against][i]);
      const y = 1 - place(panel.y, raw);
      if (x >= 0 && x <= 1.001 && y >= -0.001 && y <= 1.001) points.push([line, i, x * box.width, y * box.height]);
    });
  }
  return points;
}

function mark(figure, panel, box, [line, i, x, y]) {
  hide();
  const series = data.series[line.dataset.i];
  const track = series.tracks[panel.quantity];
  const at = panel.against === "steps" ? "step " + track.steps[i] : digits(track.seconds[i]) + " s";
  line.classList.add("on");
  const dot = figure.querySelector(".cursor");
  dot.setAttribute("class", "cursor h" + series.hue);
  dot.setAttribute("cx", x);
  dot.setAttribute("cy", y);
  dot.setAttribute("r", 5);
  show(series.name + "\n" + at + ": " + written(panel.y, track.values[i]), box.left + x, box.top + y);
}

for (const figure of document.querySelectorAll(".panel")) {
  const panel = data.panels[figure.dataset.panel];
  const plot = figure.querySelector(".plot");
  const area = figure.querySelector(".area");
  let current = null; // where the keyboard stands: [line, index]

  plot.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, least = 60 ** 2;
    for (const point of visiblePoints(figure, panel, box)) {
      const faint = point[0].classList.contains("faint") ? 3 : 1; // the strong lines win where both are near
      const distance = faint * ((point[2] - x) ** 2 + (point[3] - y) ** 2);
      if (distance < least) { least = distance; best = point; }
    }
    if (best) mark(figure, panel, box, best); else hide();
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") hide();
    if (!move) return;
    event.preventDefault();
    const box = area.getBoundingClientRect();
    const lines = Map.groupBy ? Map.groupBy(visiblePoints(figure, panel, box), (p) => p[0]) : new Map();
    const order = [...lines.keys()].sort((a, b) => a.classList.contains("faint") - b.classList.contains("faint"));
    if (!order.length) return;
    let row = current ? Math.max(0, order.indexOf(current[0])) : 0;
    row = (row + move[0] + order.length) % order.length;
    const points = lines.get(order[row]);
    const from = current ? current[1] : 0;
    const to = Math.max(0, Math.min(points.length - 1, from + move[1]));
    current = [order[row], to];
    mark(figure, panel, box, points[to]);
  });
}

for (const dot of document.querySelectorAll("[data-tip]")) {
  dot.addEventListener("pointerenter", () => {
    const box = dot.getBoundingClientRect();
    show(dot.dataset.tip, box.right, box.top);
  });
  dot.addEventListener("pointerleave", hide);
}

// A legend entry under the pointer brings its lines forward.
for (const label of document.querySelectorAll(".legend label:has([data-key])")) {
  const key = label.querySelector("input").dataset.key;
  const section = label.closest("section");
  const toggle = (on) => {
    section.classList.toggle("focus", on);
    const lines = key === "faint" ? ".faint" : ".k" + key;
    section.querySelectorAll(lines).forEach((line) => line.classList.toggle("focused", on));
  };
  label.addEventListener("pointerenter", () => toggle(true));
  label.addEventListener("pointerleave", () => toggle(false));
}

async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch { // a browser that keeps the clipboard from files: select the text, and try the old way
    const range = document.createRange();
    range.selectNodeContents(source);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}
for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", () => copy(button));
}
