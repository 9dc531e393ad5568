"""Style sheet and script of a page. The script only makes tables sortable: without it, nothing is missing."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f7f9; --text: #1c2430; --muted: #5d6878; --rule: #dde1e7; --shade: #00000030;
  --accent: #2f6fd0; --mark: #d9600f; --good: #17803d; --bad: #c62828;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b212a; --text: #e4e8ee; --muted: #98a3b3; --rule: #303945; --shade: #ffffff38;
    --accent: #6ea8ff; --mark: #ff9d57; --good: #5fce86; --bad: #ff7b72;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 24px 20px 64px; max-width: 1120px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 8px; overflow-wrap: anywhere; } h3 { font-size: 15px; margin: 24px 0 6px; }
p { margin: 6px 0; max-width: 75ch; }
.muted, figcaption { color: var(--muted); }
code, .mono { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.verdict {
  border: 1px solid var(--rule); border-left: 6px solid; border-radius: 6px; padding: 12px 18px; margin: 16px 0;
}
.verdict.good { border-left-color: var(--good); } .verdict.bad { border-left-color: var(--bad); }
.verdict ul { list-style: none; margin: 6px 0 0; padding: 0; }
.verdict li { padding-left: 1.5em; text-indent: -1.5em; }
.verdict strong { font-size: 18px; }
.yes::before { content: "\\2713"; color: var(--good); } .no::before { content: "\\2717"; color: var(--bad); }
.open::before { content: "\\2013"; color: var(--muted); }
.yes::before, .no::before, .open::before { display: inline-block; width: 1.5em; font-weight: 700; text-indent: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(230px, 100%), 1fr)); gap: 10px; }
.tiles { margin: 12px 0; }
.tile { background: var(--card); border-radius: 6px; padding: 10px 14px; }
.tile b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 13px; }
dl { margin: 12px 0; font-size: 14px; display: grid; gap: 3px 18px; }
dl { grid-template-columns: max-content minmax(0, 85ch); }
dt { font-weight: 600; } dd { margin: 0; color: var(--muted); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); gap: 14px; }
.panels { align-items: start; }
.panels.large { grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); }
figure { margin: 0; background: var(--card); border-radius: 6px; padding: 10px 12px; min-width: 0; }
figcaption { font-size: 13px; } figcaption b { color: var(--text); }
figure.wide { max-width: 800px; }
svg { display: block; width: 100%; height: auto; } figure.wide svg { min-width: 600px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--muted); font-size: 12px; } .strong { fill: var(--text); }
.bar { fill: var(--accent); opacity: .75; } .ideal { stroke: var(--mark); stroke-width: 2.5; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.5; } .dot { fill: var(--accent); }
.mark { fill: var(--mark); }
.key { display: inline-block; width: 14px; height: 10px; border-radius: 2px; background: var(--accent); opacity: .75; }
.key.ideal-key { height: 3px; vertical-align: middle; background: var(--mark); opacity: 1; }
.key.dot-key { width: 9px; height: 9px; border-radius: 50%; background: var(--mark); opacity: 1; }
.scroll {
  --cover: var(--page); overflow-x: auto; background-color: var(--cover);
  background-image: linear-gradient(to right, var(--cover) 40%, transparent),
    linear-gradient(to left, var(--cover) 40%, transparent),
    linear-gradient(to right, var(--shade), transparent), linear-gradient(to left, var(--shade), transparent);
  background-position: left, right, left, right; background-repeat: no-repeat;
  background-size: 36px 100%, 36px 100%, 12px 100%, 12px 100%; background-attachment: local, local, scroll, scroll;
}
figure .scroll { --cover: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
td { overflow-wrap: anywhere; min-width: 9em; } td.number { min-width: 0; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td code { display: inline-block; min-width: 16em; }
table.pairs td:first-child code { min-width: 0; white-space: nowrap; } table.pairs td:last-child { width: 70%; }
th[aria-sort] { cursor: pointer; } th[aria-sort=none]::after { content: " \\2195"; opacity: .6; }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
.finding { border-bottom: 1px solid var(--rule); padding: 6px 0; overflow-wrap: anywhere; }
.finding p { margin: 2px 0; }
.reason { color: var(--bad); font-weight: 600; }
@media (max-width: 600px) {
  body { padding: 16px 12px 48px; } figure { padding: 8px; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); } .tile b { font-size: 17px; }
  .panels.large .tick { font-size: 13px; }
  td code { min-width: 13em; }
  dl { display: block; } dd { margin-bottom: 6px; }
}
@media print { body { max-width: none; } .scroll { overflow: visible; background: none; } }
"""

SORT_SCRIPT: Final = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const number = head.classList.contains("number");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => number ? Number(a) - Number(b) : a.localeCompare(b, "en", {numeric: true});
      const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b)));
      table.tBodies[0].append(...rows);
    };
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
}
"""
