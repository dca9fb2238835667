"""The style sheet of the report page: one column on a phone, cards on a desk, light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --line: #d8dee4; --ink: #1f2328; --faint: #59636e;
  --accent: #0969a8; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --card: #171b21; --line: #2b323a; --ink: #e6e8eb; --faint: #9aa4af;
    --accent: #4aa8e0; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { margin: 0 0 4px; font-size: 26px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 16px; }
.facts { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 20px; color: var(--faint); }
.facts b { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
section, details, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section, details { padding: 16px 18px; margin: 0 0 16px; }
summary { cursor: pointer; font-weight: 600; }
details[open] summary { margin-bottom: 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 12px; margin: 0 0 16px; }
.tile { padding: 12px 14px; }
.tile .value { font-size: 26px; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile .label { font-weight: 600; }
.tile .meaning, .note { color: var(--faint); font-size: 12.5px; line-height: 1.35; }
.note { margin: 10px 0 0; width: 0; min-width: 100%; }
.pair { display: flex; flex-wrap: wrap; gap: 16px; margin: 0 0 16px; }
.pair section { flex: 1 1 max-content; min-width: min(100%, 420px); max-width: 100%; margin: 0; }
.pair section.figure { flex: 100 1 420px; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 640px; height: auto; margin: 0 auto; }
figure.wide img { max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: right; padding: 4px 10px; white-space: nowrap; }
tbody th, thead th:first-child { text-align: left; padding-left: 2px; }
td { text-align: right; padding: 5px 10px; min-width: 62px; border-radius: 4px; white-space: nowrap; }
.sheet td { background: color-mix(in srgb, var(--accent) calc(var(--share) * 0.55%), transparent); }
.sheet td.learned { font-weight: 700; box-shadow: inset 0 0 0 2px var(--ink); }
.sheet td.empty, .sheet .count td { background: none; color: var(--faint); }
.sheet td { background-clip: padding-box; }
.sheet .last-reference td { border-bottom: 6px solid transparent; border-radius: 4px / 4px 4px 10px 10px; }
.sheet .last-reference th { border-bottom: 6px solid transparent; }
.sheet td.first-suite { border-left: 8px solid transparent; border-radius: 12px 4px 4px 12px / 4px; }
.sheet .last-reference td.first-suite { border-radius: 12px 4px 4px 12px / 4px 4px 10px 10px; }
.count th, .count td { font-weight: 400; color: var(--faint); font-size: 12.5px; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 12px; align-items: center; }
.bars .track { height: 10px; border-radius: 5px; background: color-mix(in srgb, var(--accent) 12%, transparent); }
.bars .bar { height: 10px; min-width: 2px; border-radius: 5px; background: var(--accent); }
.bars .amount { text-align: right; font-variant-numeric: tabular-nums; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px; }
.sample { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.sample img { display: block; width: 100%; height: 170px; object-fit: contain; background: var(--page); }
.sample dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 10px; margin: 0; padding: 10px 12px; }
.sample dt { color: var(--faint); }
.sample dd { margin: 0; overflow-wrap: anywhere; }
.sample .wrong { color: var(--bad); font-weight: 600; }
.keys { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }
.keys dt { color: var(--faint); }
.keys dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; overflow-x: auto; font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 480px) {
  main { padding: 18px 12px 32px; }
  section, details { padding: 12px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  table { font-size: 12.5px; border-spacing: 1px; }
  th { padding: 4px 3px; }
  td { padding: 4px 3px; min-width: 38px; }
}
@media print { body { background: none; } section, .tile, details { break-inside: avoid; } }
"""
