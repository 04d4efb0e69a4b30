"""The reports' frame, style sheet and script, as text: a page must open from disk with nothing beside it.

The script draws only what people browse (rollouts) or point at (values); it sets text, never markup.
"""

from __future__ import annotations

import html
from pathlib import Path

from megatron_r1.files import write_whole
from megatron_r1.observe.metrics import OutputError

STYLE = """
:root{--page:#f6f6f3;--card:#fff;--ink:#14140f;--soft:#55544e;--faint:#85847c;--line:#e4e3dd;--axis:#b9b8b0;
--series-0:#a5a49c;--series-1:#2a78d6;--series-2:#1baf7a;--series-3:#e0a100;--series-4:#4a3aa7;--series-5:#e34948;
--series-6:#008300;--good:#0a7a0a;--goodbg:#e3f4e3;--bad:#b3261e;--badbg:#fbe9e7;--warnbg:#fff3d6;--warn:#7a5600;
--think:#f1f0fa;--answer:#e8f3fd}
@media(prefers-color-scheme:dark){:root{--page:#111110;--card:#1b1b19;--ink:#f4f4ef;--soft:#c0bfb6;--faint:#8b8a82;
--line:#2f2f2b;--axis:#4a4a44;--series-0:#77766e;--series-1:#4a94ea;--series-2:#27b581;--series-3:#d39a12;
--series-4:#9c92ea;--series-5:#ee7270;--series-6:#3aa53a;--good:#7bd87b;--goodbg:#173117;--bad:#ff9a90;
--badbg:#3a1a17;--warnbg:#382c10;--warn:#f0c869;--think:#24233a;--answer:#152b42}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1280px;margin:0 auto;padding:32px 20px 64px}
h1,h2,h3,p,figure{margin:0}
h1{font-size:30px;letter-spacing:-.02em;line-height:1.2}
section{margin-top:36px}
section>h2{font-size:19px;margin-bottom:12px;letter-spacing:-.01em}
.eyebrow{color:var(--faint);font-size:13px}
.facts,.note{color:var(--soft)}.facts{margin-top:4px;overflow-wrap:anywhere}
.tiles{display:grid;gap:12px;margin-top:22px;grid-template-columns:repeat(6,1fr)}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:14px 18px}.tile.wide{grid-column:span 2}
.tile h2{font-size:13px;font-weight:500;color:var(--soft)}
.tile .value{font-size:30px;font-weight:650;letter-spacing:-.02em;line-height:1.25}
.tile p:last-child{font-size:13px;color:var(--faint)}
.from{color:var(--faint);font-weight:500}.arrow{color:var(--faint);margin:0 .3em;font-weight:400}
.tile.wide .value{color:var(--series-1);font-size:34px;line-height:1.1;margin:3px 0}
.charts{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr))}
.charts.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,350px),1fr))}
.card{padding:14px 14px 8px;min-width:0;display:flex;flex-direction:column}
.card figcaption{margin:0 4px 6px;flex:1 0 auto}
.card h3{font-size:15px}.card .note{font-size:13px}
svg{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
.two svg{max-height:300px}.two .card figcaption{flex:none}
svg text{font-size:11px;fill:var(--faint);font-variant-numeric:tabular-nums}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--axis);stroke-width:1}
.curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.faint{opacity:.28;stroke-width:1.3}.band{opacity:.16}
.dot{stroke:var(--card);stroke-width:2}
.cursor{stroke:var(--axis);visibility:hidden}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0 0;padding:0;font-size:13px;
color:var(--soft)}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.key-line,.key-faint{width:16px;height:3px;vertical-align:middle}.key-faint{opacity:.35}.key-dots{border-radius:50%}
.empty{color:var(--faint);padding:40px 4px}
#tip{position:fixed;pointer-events:none;visibility:hidden;background:var(--card);border:1px solid var(--axis);
border-radius:8px;padding:7px 10px;font-size:13px;box-shadow:0 4px 16px #0003;z-index:9;white-space:nowrap;
font-variant-numeric:tabular-nums}
#tip b{display:block;font-weight:600}#tip span{display:block}
.share{display:flex;gap:2px;height:30px;border-radius:6px;overflow:hidden;margin:8px 4px 12px}
table{border-collapse:collapse;width:100%;font-size:14px}
table.wide{width:100%;border-collapse:collapse;font-size:14px}
table.wide th{color:var(--soft);font-weight:500}
table.wide th,table.wide td{text-align:left;padding:6px 10px 6px 4px;border-bottom:1px solid var(--line)}
table.wide tr:last-child td{border-bottom:0}
a{color:var(--series-1)}
table.plain{margin:0 4px 8px;width:calc(100% - 8px)}
table.plain td{padding:5px 0;border-top:1px solid var(--line)}
table.plain tr:first-child td{border:0}
table.plain td+td{text-align:right;font-variant-numeric:tabular-nums;color:var(--soft)}
.filters{display:flex;flex-wrap:wrap;gap:10px 18px;align-items:center;margin:12px 0;
font-size:14px;color:var(--soft)}
select,input,button{font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--axis);
border-radius:7px;padding:5px 9px}
input{width:230px;max-width:100%}button{cursor:pointer;margin-top:12px}
#count{margin-left:auto;color:var(--faint)}
.roll{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--bad);border-radius:8px;
padding:11px 14px;margin-top:10px}
.roll.right{border-left-color:var(--good)}
.roll .head{display:flex;flex-wrap:wrap;gap:4px 10px;align-items:center;font-size:13px;color:var(--faint)}
.roll .head b{color:var(--ink);font-weight:600}
.chip{border-radius:20px;padding:1px 9px;font-size:12.5px;background:var(--badbg);color:var(--bad)}
.chip.full{background:var(--goodbg);color:var(--good)}.chip.some{background:var(--warnbg);color:var(--warn)}
.roll pre{margin:8px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;
font:13.5px/1.55 ui-monospace,Menlo,Consolas,monospace;max-height:340px;overflow:auto}
.roll pre.prompt{color:var(--soft)}
.think{background:var(--think);border-radius:4px}.answer{background:var(--answer);border-radius:4px;font-weight:600}
details summary{cursor:pointer;font-size:19px;font-weight:650}
.config{columns:3 330px;column-gap:28px;margin-top:12px}
.config table{break-inside:avoid;margin-bottom:18px;font-size:13px}
.config caption{text-align:left;font-weight:650;padding-bottom:3px}
.config th{text-align:left;font-weight:400;color:var(--soft);padding:3px 12px 3px 0;vertical-align:top}
.config td{text-align:right;overflow-wrap:anywhere;padding:3px 0;font-variant-numeric:tabular-nums}
.config tr{border-top:1px solid var(--line)}
@media(max-width:1000px){.tiles{grid-template-columns:repeat(4,1fr)}.tile.wide{grid-column:span 4}}
@media(max-width:560px){.tiles{grid-template-columns:repeat(2,1fr)}.tile.wide{grid-column:span 2}
main{padding:20px 12px 48px}.tile .value{font-size:24px}svg text{font-size:13px}input{width:100%}}
@media print{#rollouts .filters,#more{display:none}.card,.tile,.roll{break-inside:avoid}}
""" + "".join(
    f".fill-{n}{{fill:var(--series-{n});background:var(--series-{n})}}\n.stroke-{n}{{stroke:var(--series-{n})}}\n"
    for n in range(7)
)

SCRIPT = r"""
"use strict";
const tip = document.getElementById("tip");
const make = (tag, css, text) => {
  const node = document.createElement(tag);
  if (css) node.className = css;
  if (text !== undefined) node.textContent = text;
  return node;
};
const format = (value, percent) => percent ? (value * 100).toFixed(1) + "%"
  : value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(2)
  : value.toLocaleString("en", {maximumFractionDigits: Math.abs(value) < 10 ? 3 : 1});
function entry(name, colour, text) {
  const row = make("span", "", "");
  row.append(make("i", "key fill-" + colour), name + "  ", make("strong", "", text));
  return row;
}
function place(event) {
  tip.style.visibility = "visible";
  const box = tip.getBoundingClientRect();
  const fits = event.clientX + 16 + box.width <= innerWidth;
  const left = fits ? event.clientX + 16 : event.clientX - box.width - 12;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY - box.height / 2, innerHeight - box.height - 4)) + "px";
}
const nearest = (items, at, key) => items.reduce((best, item) =>
  Math.abs(key(item) - at) < Math.abs(key(best) - at) ? item : best);
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const data = JSON.parse(svg.dataset.chart), percent = svg.dataset.percent === "1";
  const cursor = svg.querySelector(".cursor"), heads = svg.querySelector(".heads");
  svg.addEventListener("pointermove", event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const at = point.x;
    heads.replaceChildren(); tip.replaceChildren();
    let x;
    if (data.bars) {
      const bar = nearest(data.bars, at, b => b.x);
      x = bar.x;
      const total = bar.values.reduce((a, b) => a + b, 0);
      tip.append(make("b", "", "step " + bar.label + ": " + format(total) + " s"));
      bar.values.forEach((value, i) => tip.append(entry(...data.names[i], format(value) + " s")));
    } else {
      const all = data.flatMap(series => series.points);
      const step = nearest(all, at, p => p[2])[0];
      tip.append(make("b", "", "step " + format(step)));
      for (const series of data) {
        const point = nearest(series.points, step, p => p[0]);
        if (Math.abs(point[0] - step) > 0.5 && series.points.length > 1 && data.length > 1) continue;
        x = point[2];
        const head = document.createElementNS("http://www.w3.org/2000/svg", "circle");
        head.setAttribute("cx", point[2]); head.setAttribute("cy", point[3]); head.setAttribute("r", 4);
        head.setAttribute("class", "dot fill-" + series.colour);
        heads.append(head);
        tip.append(entry(series.name, series.colour, format(point[1], percent)));
      }
    }
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    place(event);
  });
  svg.addEventListener("pointerleave", () => {
    tip.style.visibility = cursor.style.visibility = "hidden"; heads.replaceChildren();
  });
}
const rollouts = JSON.parse(document.getElementById("rollout-data").textContent);
const list = document.getElementById("list");
if (list) {
  const field = id => document.getElementById(id);
  const steps = [...new Set(rollouts.map(r => r.step))].sort((a, b) => a - b);
  for (const step of steps) { const o = make("option", "", step); o.value = step; field("step").append(o); }
  let limit = 20;
  const right = r => r.parts.accuracy >= 1;
  const wanted = r => {
    const text = field("search").value.toLowerCase(), outcome = field("outcome").value;
    if (field("step").value !== "" && r.step !== Number(field("step").value)) return false;
    if (outcome === "right" && !right(r) || outcome === "wrong" && right(r)) return false;
    if (outcome === "form" && r.parts.format >= 1) return false;
    return !text || (r.problem_id + "\n" + r.prompt + "\n" + r.completion).toLowerCase().includes(text);
  };
  const marked = text => {
    const pre = make("pre");
    for (const piece of text.split(/(<think>[^]*?<\/think>|<answer>[^]*?<\/answer>)/)) {
      const css = piece.startsWith("<think>") ? "think" : piece.startsWith("<answer>") ? "answer" : "";
      if (piece) pre.append(make("span", css, piece));
    }
    return pre;
  };
  const card = r => {
    const box = make("article", right(r) ? "roll right" : "roll"), head = make("div", "head");
    head.append(make("b", "", right(r) ? "✓ right" : "✗ wrong"));
    for (const [name, value] of Object.entries(r.parts)) {
      const css = value >= 1 ? " full" : value > 0 ? " some" : "";
      head.append(make("span", "chip" + css, name + " " + value));
    }
    head.append(make("span", "", "step " + r.step), make("span", "", "reward " + format(r.reward)),
      make("span", "", "advantage " + (r.advantage > 0 ? "+" : "") + format(r.advantage)),
      make("span", "", r.tokens + " tokens" + (r.finish_reason === "length" ? ", cut off" : "")),
      make("span", "", "weights v" + r.weight_version), make("span", "", r.problem_id));
    if (r.answer != null && !right(r)) head.append(make("b", "", "expected " + r.answer));
    box.append(head, make("pre", "prompt", r.prompt.trimEnd()), marked(r.completion));
    return box;
  };
  const draw = () => {
    const found = rollouts.filter(wanted);
    list.replaceChildren(...found.slice(0, limit).map(card));
    field("count").textContent = `${format(found.length)} ${found.length === 1 ? "match" : "matches"}`;
    field("more").hidden = found.length <= limit;
  };
  const restart = () => { limit = 20; draw(); };
  for (const id of ["step", "outcome", "search"]) field(id).addEventListener("input", restart);
  field("more").addEventListener("click", () => { limit += 20; draw(); });
  draw();
}
"""


def document(title: str, body: str, tail: str = "", script: str = "") -> str:
    """A whole page. `title` is text; `body` and `tail` (after the main part) are markup; `script` runs after SCRIPT."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        "'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)} · megatron_r1</title><style>{STYLE}</style></head><body><main>{body}</main>"
        f'<div id="tip" role="status"></div>{tail}<script>{SCRIPT}{script}</script></body></html>\n'
    )


def write_page(path: Path, page: str) -> None:
    """Replace `path` in one piece. OutputError if it cannot be written."""
    try:
        write_whole(path, page, sync=False)  # it can be made again
    except OSError as error:
        raise OutputError(error.errno, f"cannot write {path}: {error.strerror}; free space and try again") from error
