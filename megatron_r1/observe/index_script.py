"""The style sheet and script of the page over several runs, as text. Comes after page.py's, whose functions it uses.

The script draws the chosen runs into one chart a metric; it sets text and numbers, never markup. The geometry is
that of charts.py.
"""

from __future__ import annotations

from megatron_r1.observe.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

INDEX_STYLE = """
.scroll{overflow-x:auto}
table.runs td,table.runs th{white-space:nowrap;vertical-align:top}
table.runs td:nth-child(7),table.runs td:nth-child(8){white-space:normal;min-width:150px}
table.runs td:nth-child(7){min-width:330px}
table.runs .faulty td{color:var(--bad)}table.runs .faulty td[colspan="3"]{white-space:normal;overflow-wrap:anywhere}
table.runs input,.filters input{width:auto;margin:0;accent-color:var(--series-1)}
.filters button{margin:0}
.filters label{display:flex;gap:6px;align-items:center}
#legend{margin:0 0 12px}#legend svg{display:inline-block;width:26px;height:8px;margin-right:6px;vertical-align:middle}
#legend svg text{display:none}
.dash-1{stroke-dasharray:7 4}.dash-2{stroke-dasharray:2 4}.dash-3{stroke-dasharray:9 3 2 3}
"""

INDEX_SCRIPT = (
    f"const W = {WIDTH}, H = {HEIGHT}, L = {LEFT}, R = {RIGHT}, T = {TOP}, B = {BOTTOM};\n"
    + r"""
const index = JSON.parse(document.getElementById("index-data").textContent);
const boxes = [...document.querySelectorAll("input.choose")];
const drawn = (tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const colour = run => index.colours[run] % 6 + 1;
const strokes = run => "curve stroke-" + colour(run) + " dash-" + Math.floor(index.colours[run] / 6) % 4;
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const far = step => Math.abs(Math.log(step / raw)), found = [];
  const step = [1, 2, 5, 10].map(f => f * power).reduce((best, s) => far(s) < far(best) ? s : best);
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) found.push(i * step + 0);
  return [found, step];
}
// Centred moving average over about a tenth of the curve; the window narrows towards both ends.
function smoothed(points) {
  const half = Math.max(1, Math.min(Math.floor(points.length / 20), 50));
  return points.map(([x], i) => {
    const reach = Math.min(half, i, points.length - 1 - i);
    const part = points.slice(i - reach, i + reach + 1);
    return [x, part.reduce((sum, p) => sum + p[1], 0) / part.length];
  });
}
function label(value, step, percent) {
  if (percent) return +(value * 100).toPrecision(4) + "%";
  if (value !== 0 && step < 1e-4) return value.toExponential(1);
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= 10 * size) return label(value / size, step / size) + unit;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});
}
function spread(low, high) {
  if (high > low) { const pad = (high - low) * 0.06; return [low - pad, high + pad]; }
  const half = Math.abs(low) * 0.1 || 0.5;
  return [low - half, high + half];
}
function figure(chart, runs, smooth) {
  const box = make("figure", "card"), caption = make("figcaption");
  caption.append(make("h3", "", chart.title), make("p", "note", chart.note));
  box.append(caption);
  const series = runs.map(run => ({run, points: smooth ? smoothed(chart.series[run]) : chart.series[run]}));
  const xs = series.flatMap(s => s.points.map(p => p[0])), ys = series.flatMap(s => s.points.map(p => p[1]));
  let [x0, x1] = xs.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
  if (x1 === x0) { x0 -= 0.5; x1 += 0.5; }
  const [y0, y1] = spread(...ys.reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)], [Infinity, -Infinity]));
  const px = x => L + (x - x0) / (x1 - x0) * (W - L - R), py = y => H - B - (y - y0) / (y1 - y0) * (H - T - B);
  const svg = drawn("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": chart.title});
  const [levels, gap] = ticks(y0, y1, 4);
  for (const y of levels) {
    svg.append(drawn("line", {class: "grid", x1: L, x2: W - R, y1: py(y), y2: py(y)}));
    svg.append(drawn("text", {x: L - 7, y: py(y) + 3.5, "text-anchor": "end"}, label(y, gap, chart.percent)));
  }
  svg.append(drawn("line", {class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B}));
  for (const x of ticks(x0, x1, 5)[0].filter(Number.isInteger))
    svg.append(drawn("text", {x: px(x), y: H - B + 15, "text-anchor": "middle"}, x.toLocaleString("en")));
  svg.append(drawn("text", {class: "unit", x: W - R, y: H - 4, "text-anchor": "end"}, "step"));
  for (const {run, points} of series) {
    svg.append(drawn("polyline", {class: strokes(run), points: points.map(p => px(p[0]) + "," + py(p[1])).join(" ")}));
    if (points.length < 2) svg.append(
      drawn("circle", {class: "dot fill-" + colour(run), r: 4, cx: px(points[0][0]), cy: py(points[0][1])}));
  }
  const cursor = drawn("line", {class: "cursor", y1: T, y2: H - B});
  svg.append(cursor);
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const step = nearest(xs, at, px);
    tip.replaceChildren(make("b", "", "step " + format(step)));
    for (const {run, points} of series) {
      const point = nearest(points, step, p => p[0]);
      if (Math.abs(point[0] - step) <= Math.max(0.5, (x1 - x0) / 100))
        tip.append(entry(index.runs[run], colour(run), format(point[1], chart.percent)));
    }
    cursor.setAttribute("x1", px(step)); cursor.setAttribute("x2", px(step));
    cursor.style.visibility = "visible";
    place(event);
  });
  svg.addEventListener("pointerleave", () => { tip.style.visibility = cursor.style.visibility = "hidden"; });
  box.append(svg);
  return box;
}
function show() {
  const runs = boxes.filter(box => box.checked).map(box => box.dataset.run);
  const smooth = document.getElementById("smooth").checked;
  document.getElementById("legend").replaceChildren(...runs.map(run => {
    const item = make("li"), key = drawn("svg", {viewBox: "0 0 26 8"});
    key.append(drawn("line", {class: strokes(run), x1: 1, x2: 25, y1: 4, y2: 4}));
    item.append(key, index.runs[run]);
    return item;
  }));
  const figures = index.charts.map(chart => [chart, runs.filter(run => chart.series[run])])
    .filter(([, recorded]) => recorded.length).map(([chart, recorded]) => figure(chart, recorded, smooth));
  const why = runs.length ? "The chosen runs have recorded none of these." : "Choose runs in the table above.";
  document.getElementById("charts").replaceChildren(...(figures.length ? figures : [make("p", "empty", why)]));
}
if (boxes.length) {
  const all = checked => () => { for (const box of boxes) box.checked = checked; show(); };
  document.getElementById("all").addEventListener("click", all(true));
  document.getElementById("none").addEventListener("click", all(false));
  for (const box of [...boxes, document.getElementById("smooth")]) box.addEventListener("change", show);
  show();
}
"""
)
