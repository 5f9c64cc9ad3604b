// The page of a set of runs: a chart, filters, a table, and a panel of the run that was chosen. All texts of runs reach
// the page as textContent, or escaped where Plotly reads markup in them.
"use strict";

const content = JSON.parse(document.getElementById("content").textContent);
const { runs, groups, numbers } = content;
const chart = document.getElementById("chart");
const COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b", "#ff9da6", "#79706e"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x"];
const WIDE_LABEL = 48; // characters; a legend with a longer label lies below the chart
const LONGEST_LABEL = 150;
const COUNTS = ["params", "macs", "flops", "target"];

const values = (key) => [...new Set(runs.map((run) => text(run.groups[key])))].sort(compareTexts);
const varying = Object.keys(groups).filter((key) => values(key).length > 1);
const known = Object.keys(numbers).filter((key) => runs.some((run) => isNumber(run.values[key])));
const seeds = ["seed", "criterion_seed"];

const state = {
  x: values("ratio").length > 1 ? "ratio" : varying.includes("method") ? "method" : "ratio",
  y: chooseMeasure(),
  colour: values("method").length <= COLOURS.length ? "method" : (varying.find((key) => key !== "method") ?? "method"),
  log: { x: false, y: false },
  hidden: Object.fromEntries(varying.map((key) => [key, new Set()])),
  search: "",
  rows: "settings",
  sort: { key: null, descending: false },
  chosen: [],
  current: null,
};

// The first measure that most runs have; the output loss only where more runs have it.
function chooseMeasure() {
  const count = (key) => runs.filter((run) => isNumber(run.values[key])).length;
  const keys = [...known.filter((key) => key.startsWith("eval/")), "output_loss"];
  return keys.reduce((best, key) => (count(key) > count(best) ? key : best));
}

// Small helpers

function isNumber(value) { return typeof value === "number" && Number.isFinite(value); }
function text(value) { return value === null || value === undefined ? "none" : String(value); }
function compareTexts(a, b) { return a.localeCompare(b, "en", { numeric: true }); }
function plural(count, word) { return `${count} ${word}${count === 1 ? "" : "s"}`; }
function escapeMarkup(value) { return text(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); }
function shorten(value, length) { return value.length > length ? `${value.slice(0, length - 1)}\u2026` : value; }

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function format(value, key = "") {
  if (!isNumber(value)) return "";
  if (COUNTS.includes(key)) {
    const [size, letter] = Math.abs(value) >= 1e9 ? [1e9, " G"] : Math.abs(value) >= 1e6 ? [1e6, " M"] : [1, ""];
    return `${Number((value / size).toPrecision(4))}${letter}`;
  }
  return String(Number(value.toPrecision(4)));
}

// Runs and settings: runs of one setting differ in seeds only

function listVisibleRuns() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  return runs.filter((run) => {
    const searched = [run.name, ...Object.values(run.groups).map(text)].join(" ").toLowerCase();
    return varying.every((key) => !state.hidden[key].has(text(run.groups[key]))) && words.every((word) => searched.includes(word));
  });
}

class Setting {
  constructor(list) { this.runs = list; }
  group(key) { return [...new Set(this.runs.map((run) => text(run.groups[key])))].join("; "); }
  numbers(key) { return this.runs.map((run) => run.values[key]).filter(isNumber); }
  mean(key) {
    if (key.startsWith("latency") && new Set(this.runs.map((run) => run.groups.latency_at)).size > 1) return null;
    const list = this.numbers(key);
    return list.length ? list.reduce((sum, value) => sum + value, 0) / list.length : null;
  }
  deviation(key) {
    const list = this.numbers(key), mean = this.mean(key);
    if (list.length < 2 || mean === null) return null;
    return Math.sqrt(list.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (list.length - 1));
  }
}

function listSettings(visible) {
  const bySetting = Map.groupBy(visible, (run) => run.row);
  return [...bySetting.keys()].sort((a, b) => a - b).map((row) => new Setting(bySetting.get(row)));
}

// The chart

const categories = (key) => (key in numbers ? null : values(key));

function locate(item, key) {
  const names = categories(key);
  if (!names) return item instanceof Setting ? item.mean(key) : (item.values[key] ?? null);
  return names.indexOf(item instanceof Setting ? item.group(key) : text(item.groups[key]));
}

function describePoint(list, title) {
  const setting = new Setting(list), deviation = setting.deviation(state.y);
  const measure = `${numbers[state.y]}: ${format(setting.mean(state.y), state.y)}${deviation ? ` \u00b1 ${format(deviation, state.y)}` : ""}`;
  const place = state.x in numbers ? `${numbers[state.x]}: ${format(setting.mean(state.x), state.x)}` : setting.group(state.x);
  return [shorten(title, 90), measure, place, list.length > 1 ? `mean of ${list.length} runs` : "1 run"].map(escapeMarkup).join("<br>");
}

function makeBand(points, colour) {
  // One polygon per stretch of settings that all have several runs.
  const x = [], y = [];
  const stretches = [[]];
  for (const point of points) {
    if (isNumber(point.deviation)) stretches.at(-1).push(point);
    else stretches.push([]);
  }
  for (const stretch of stretches.filter((list) => list.length > 1)) {
    const back = [...stretch].reverse();
    x.push(...stretch.map((p) => p.x), ...back.map((p) => p.x), null);
    y.push(...stretch.map((p) => p.y + p.deviation), ...back.map((p) => p.y - p.deviation), null);
  }
  return x.length ? { x, y, mode: "lines", fill: "toself", line: { width: 0, color: colour }, fillcolor: `${colour}33`, hoverinfo: "skip", showlegend: false, name: "band" } : null;
}

function makeTraces(settings) {
  const traces = [], all = values(state.colour);
  const byColour = Map.groupBy(settings, (setting) => setting.group(state.colour));
  for (const value of [...byColour.keys()].sort(compareTexts)) {
    const index = Math.max(all.indexOf(value), 0), colour = COLOURS[index % COLOURS.length];
    const symbol = SYMBOLS[Math.floor(index / COLOURS.length) % SYMBOLS.length];
    const members = byColour.get(value), legendgroup = value;
    const counts = [...new Set(members.map((setting) => setting.runs.length))];
    const each = counts.length === 1 && members.length > 1 && counts[0] > 1 ? " each" : "";
    const total = each ? counts[0] : members.reduce((sum, setting) => sum + setting.runs.length, 0);
    const name = escapeMarkup(`${shorten(value, LONGEST_LABEL)} (${plural(total, "run")}${each})`);
    let showlegend = true;
    for (const line of Map.groupBy(members, (setting) => setting.group("method")).values()) {
      const points = line
        .map((setting) => ({ setting, x: locate(setting, state.x), y: setting.mean(state.y), deviation: setting.deviation(state.y) }))
        .filter((point) => isNumber(point.x) && isNumber(point.y))
        .sort((a, b) => a.x - b.x);
      if (!points.length) continue;
      const band = state.x in numbers ? makeBand(points, colour) : null;
      if (band) traces.push({ ...band, legendgroup });
      const single = points.filter((p) => p.setting.runs.length > 1).flatMap((p) => p.setting.runs);
      const dots = single.filter((run) => isNumber(locate(run, state.x)) && isNumber(run.values[state.y]));
      if (dots.length) {
        traces.push({
          x: dots.map((run) => locate(run, state.x)), y: dots.map((run) => run.values[state.y]), legendgroup, showlegend: false, name: "runs",
          mode: "markers", marker: { color: colour, size: 5, opacity: 0.5 },
          customdata: dots.map((run) => [runs.indexOf(run)]), text: dots.map((run) => describePoint([run], run.name)), hoverinfo: "text",
        });
      }
      traces.push({
        x: points.map((p) => p.x), y: points.map((p) => p.y), name, legendgroup, showlegend,
        mode: state.x in numbers ? "lines+markers" : "markers",
        line: { color: colour, width: 2 }, marker: { color: colour, size: 9, symbol },
        error_y: { type: "data", array: points.map((p) => p.deviation ?? 0), visible: points.some((p) => p.deviation), color: colour, thickness: 1.2 },
        customdata: points.map((p) => p.setting.runs.map((run) => runs.indexOf(run))),
        text: points.map((p) => describePoint(p.setting.runs, p.setting.group("method"))), hoverinfo: "text",
      });
      showlegend = false;
    }
  }
  return traces;
}

function makeTeacherLines(visible) {
  const [network, measure] = state.y.split(/\/(.*)/);
  if (!["eval", "pruned"].includes(network)) return { shapes: [], annotations: [] };
  const teachers = new Map();
  for (const run of visible) {
    const value = run.values[`teacher/${measure}`];
    if (isNumber(value)) teachers.set(format(value), [value, run.groups.teacher]);
  }
  if (teachers.size > 3) return { shapes: [], annotations: [] };
  const several = new Set([...teachers.values()].map(([, name]) => name)).size > 1;
  const lines = [...teachers.values()];
  const logged = (value) => (state.log.y ? Math.log10(value) : value);
  return {
    shapes: lines.map(([y]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { dash: "dot", width: 1.5, color: "#333" } })),
    annotations: lines.map(([y, name]) => ({ xref: "paper", x: 0, xanchor: "left", y: logged(y), yanchor: "bottom", showarrow: false, text: escapeMarkup(several ? `teacher ${name}` : "teacher"), font: { size: 11 } })),
  };
}

function makeAxis(key, letter, settings) {
  const names = categories(key);
  const better = content.better[key] ? ` (${content.better[key]} is better)` : "";
  const axis = { title: { text: escapeMarkup(`${numbers[key] ?? groups[key]}${better}`) }, gridcolor: "#eee", zeroline: false, automargin: true };
  if (names) return { ...axis, tickvals: names.map((_, i) => i), ticktext: names.map((name) => escapeMarkup(shorten(name, 40))), range: [-0.5, names.length - 0.5] };
  const places = new Set(settings.map((setting) => locate(setting, key)).filter(isNumber));
  const [only] = places.size === 1 && !state.log[letter] ? places : [0]; // one place: what Plotly shows around it is too wide
  return { ...axis, type: state.log[letter] ? "log" : "linear", exponentformat: "SI", ...(letter === "x" && only > 0 ? { range: [0.8 * only, 1.2 * only] } : {}) };
}

function drawChart(visible, settings) {
  const traces = makeTraces(settings);
  const chosen = state.chosen.length ? new Setting(state.chosen.map((index) => runs[index])) : null;
  if (chosen && isNumber(locate(chosen, state.x)) && isNumber(chosen.mean(state.y))) {
    traces.push({ x: [locate(chosen, state.x)], y: [chosen.mean(state.y)], mode: "markers", hoverinfo: "skip", showlegend: false, name: "chosen", marker: { size: 17, color: "rgba(0,0,0,0)", line: { color: "#000", width: 2 } } });
  }
  const labels = traces.filter((trace) => trace.showlegend).map((trace) => trace.name);
  const below = Math.max(0, ...labels.map((label) => label.length)) > WIDE_LABEL;
  const legend = { tracegroupgap: 0, ...(below ? { x: 0, y: -0.2, yanchor: "top" } : {}) };
  const layout = {
    height: 460 + (below ? 19 * labels.length : 0), margin: { l: 70, r: 20, t: 30, b: 60 },
    xaxis: makeAxis(state.x, "x", settings), yaxis: makeAxis(state.y, "y", settings), showlegend: true, legend, hovermode: "closest",
    plot_bgcolor: "#fff", font: { size: 13 }, ...makeTeacherLines(visible),
  };
  chart.style.height = `${layout.height}px`;
  Plotly.react(chart, traces, layout, { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
}

// Controls and filters

function makeSelect(id, label, choices, chosen, change) {
  const select = element("select", { id });
  for (const [title, options] of choices) {
    const parent = title ? element("optgroup", { label: title }) : select;
    parent.append(...options.map(([key, name]) => element("option", { value: key, textContent: name, selected: key === chosen })));
    if (title) select.append(parent);
  }
  select.addEventListener("change", () => change(select.value));
  return element("label", {}, `${label} `, select);
}

function makeCheckbox(id, label, checked, change) {
  const box = element("input", { type: "checkbox", id, checked });
  box.addEventListener("change", () => change(box.checked));
  return element("label", {}, box, ` ${label}`);
}

function makeControls() {
  const numberOptions = known.map((key) => [key, numbers[key]]);
  const groupOptions = ["method", ...varying.filter((key) => key !== "method")].map((key) => [key, groups[key]]);
  const set = (key) => (value) => { state[key] = value; draw(); };
  const log = (letter) => (checked) => { state.log[letter] = checked; draw(); };
  document.getElementById("controls").replaceChildren(
    makeSelect("y", "y axis", [["", numberOptions]], state.y, set("y")), makeCheckbox("log-y", "log", false, log("y")),
    makeSelect("x", "x axis", [["numbers", numberOptions], ["groups", groupOptions]], state.x, set("x")), makeCheckbox("log-x", "log", false, log("x")),
    makeSelect("colour", "colour", [["", groupOptions]], state.colour, set("colour")),
  );
}

function makeFilters() {
  const search = element("input", { type: "search", id: "search", placeholder: "search runs" });
  search.addEventListener("input", () => { state.search = search.value; draw(); });
  const filters = varying.map((key) => {
    const names = values(key), hidden = state.hidden[key], summary = element("summary");
    const box = element("details", { className: "filter", id: `filter-${key}` }, summary);
    const update = () => {
      summary.textContent = hidden.size ? `${groups[key]}: ${names.length - hidden.size} of ${names.length}` : groups[key];
      box.classList.toggle("active", hidden.size > 0);
    };
    const labels = names.map((name) => makeCheckbox("", name, true, (checked) => {
      if (checked) hidden.delete(name); else hidden.add(name);
      update();
      draw();
    }));
    const setAll = (shown) => () => {
      hidden.clear();
      if (!shown) names.forEach((name) => hidden.add(name));
      labels.forEach((label) => { label.firstChild.checked = shown; });
      update();
      draw();
    };
    box.append(element("div", {}, element("button", { textContent: "all", onclick: setAll(true) }), " ", element("button", { textContent: "none", onclick: setAll(false) }), ...labels));
    update();
    return box;
  });
  const rows = makeSelect("rows", "table of", [["", [["settings", "settings (means over seeds)"], ["runs", "single runs"]]]], state.rows, (value) => { state.rows = value; draw(); });
  document.getElementById("filters").replaceChildren(rows, search, ...filters);
  document.addEventListener("click", (event) => {
    document.querySelectorAll(".filter[open]").forEach((box) => { if (!box.contains(event.target)) box.open = false; });
  });
}

// The table

function listColumns() {
  const single = state.rows === "runs";
  const isShown = (key) => runs.some((run) => run.groups[key] !== run.groups.method) && !(key in numbers) && key !== "protocol";
  const shown = varying.filter((key) => (single || !seeds.includes(key)) && isShown(key));
  return [
    { key: "name", title: single ? "run" : "method", read: (setting) => (single ? setting.runs[0].name : setting.group("method")) },
    ...shown.map((key) => ({ key, title: groups[key], read: (setting) => setting.group(key) })),
    ...(single ? [] : [{ key: "runs", title: "runs", number: true, read: (setting) => setting.runs.length }]),
    ...known.map((key) => ({ key, title: numbers[key], number: true, read: (setting) => setting.mean(key), spread: (setting) => setting.deviation(key) })),
  ];
}

function sortSettings(settings, columns) {
  const column = columns.find((each) => each.key === state.sort.key);
  if (!column) return settings;
  const sign = state.sort.descending ? -1 : 1;
  return [...settings].sort((a, b) => {
    const [left, right] = [column.read(a), column.read(b)];
    if (left === null || right === null) return (left === null) - (right === null); // without a value: last
    return sign * (column.number ? left - right : compareTexts(left, right));
  });
}

function drawTable(visible, settings) {
  const columns = listColumns();
  const items = sortSettings(state.rows === "runs" ? visible.map((run) => new Setting([run])) : settings, columns);
  const head = columns.map((column) => {
    const sorted = state.sort.key === column.key;
    const mark = sorted ? (state.sort.descending ? " \u25bc" : " \u25b2") : "";
    const button = element("button", { textContent: `${column.title}${mark}` });
    button.addEventListener("click", () => {
      state.sort = { key: column.key, descending: sorted && !state.sort.descending };
      draw();
    });
    const cell = element("th", {}, button);
    cell.dataset.key = column.key;
    cell.ariaSort = sorted ? (state.sort.descending ? "descending" : "ascending") : "none";
    return cell;
  });
  const body = items.map((setting) => {
    const indices = setting.runs.map((run) => runs.indexOf(run));
    const cells = columns.map((column, place) => {
      if (!place) {
        return element("td", { className: "name" }, element("button", { className: "link", textContent: column.read(setting), onclick: () => choose(indices) }));
      }
      if (!column.number) return element("td", { textContent: column.read(setting) });
      const deviation = column.spread?.(setting);
      return element("td", { textContent: format(column.read(setting), column.key) + (deviation ? ` \u00b1 ${format(deviation, column.key)}` : "") });
    });
    const chosen = indices.some((index) => index === state.current);
    return element("tr", { className: chosen ? "chosen" : "" }, ...cells);
  });
  document.getElementById("table").replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  document.getElementById("count").textContent = `${visible.length} of ${plural(runs.length, "run")}, ${plural(settings.length, "setting")}`;
}

// The panel of a run

function choose(indices, current = indices[0]) {
  Object.assign(state, { chosen: indices, current });
  const panel = document.getElementById("panel");
  panel.hidden = !indices.length;
  document.body.classList.toggle("panelled", indices.length > 0);
  if (indices.length) panel.replaceChildren(...makePanel(runs[current], indices));
  panel.scrollTop = 0;
  draw();
  Plotly.Plots.resize(chart);
}

function makeTable(head, rows) {
  return element("table", {}, element("tr", {}, ...head.map((cell) => element("th", { textContent: cell }))), ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", { textContent: cell })))));
}

function makePanel(run, indices) {
  const { panel } = run, heading = (title) => element("h3", { textContent: title });
  const parts = [
    element("button", { className: "close link", textContent: "\u00d7", title: "close", onclick: () => choose([]) }),
    element("h2", { textContent: run.name }),
  ];
  if (indices.length > 1) {
    const buttons = indices.map((index) => element("button", { textContent: `seed ${text(runs[index].groups.seed)}`, className: runs[index] === run ? "current" : "", onclick: () => choose(indices, index) }));
    parts.push(element("p", { className: "seeds" }, `${plural(indices.length, "run")} of this setting: `, ...buttons));
  } else parts.push(element("p", { textContent: "1 run" }));
  parts.push(element("p", {}, element("a", { href: run.page, textContent: "page of this run" })));
  if (panel.command) parts.push(heading("Command"), element("pre", { id: "command", textContent: panel.command, title: "a click selects it" }));
  if (panel.samples) {
    parts.push(heading("Samples"), element("img", { id: "samples", src: panel.samples, alt: "samples" }));
    parts.push(element("small", { textContent: `Rows: ${panel.networks.join(", ")}. Each column is one seed.` }));
  }
  for (const [prompt, texts] of panel.texts) {
    parts.push(heading(`Prompt: ${prompt}`), makeTable(["network", "continuation"], Object.entries(texts)));
  }
  panel.strips.forEach((strip) => parts.push(...makeStrip(strip, heading)));
  if (panel.changes.length) parts.push(heading("Plan"), element("p", { textContent: panel.changes.join(", ") }));
  parts.push(heading("Costs"), makeTable(["", ""], panel.costs));
  parts.push(heading("Quality"), makeTable(["", ...panel.networks], Object.entries(panel.quality).map(([name, list]) => [name, ...list.map((value) => format(value))])));
  if (varying.length) parts.push(heading("Setting"), makeTable(["", ""], varying.map((key) => [groups[key], text(run.groups[key])])));
  return parts;
}

function makeStrip(strip, heading) {
  const names = content.units[strip.names];
  const logs = strip.scores.map((score) => (score > 0 ? Math.log10(score) : null));
  const [low, high] = [Math.min(...logs.filter(isNumber)), Math.max(...logs.filter(isNumber))];
  const cells = names.map((name, i) => {
    const height = logs[i] === null ? 0 : high > low ? 4 + (30 * (logs[i] - low)) / (high - low) : 17;
    const state = strip.protected.includes(i) ? "protected" : strip.kept[i] === 0 ? "removed" : strip.kept[i] === 1 ? "kept" : `${Math.round(100 * strip.kept[i])} % kept`;
    const [bar, block] = [element("i"), element("b")];
    bar.style.height = `${height}px`;
    if (strip.kept[i] > 0 && strip.kept[i] < 1) block.style.background = `linear-gradient(to top, #4c78a8 ${100 * strip.kept[i]}%, #e45756 0)`;
    return element("span", { className: `unit ${state.split(" ")[0]}`, title: `${name}: score ${format(strip.scores[i])}, ${state}` }, bar, block);
  });
  const stage = (name) => name.match(/^[^.]+(\.\d+)?/)[0];
  const stages = Map.groupBy(cells.keys(), (i) => stage(names[i]));
  const grouped = stages.size > 1 && stages.size <= names.length / 2 ? [...stages] : [[" ", [...cells.keys()]]];
  const row = element("div", { className: "strip" }, ...grouped.map(([name, members]) => {
    const box = element("div", { className: "stage" }, element("div", { className: "units" }, ...members.map((i) => cells[i])), element("small", { textContent: name[0] + (name.match(/\d+$/) ?? ""), title: name }));
    box.style.flex = String(members.length);
    return box;
  }));
  const removed = names.filter((_, i) => strip.kept[i] < 1);
  const whole = names.filter((_, i) => strip.kept[i] === 0).length;
  const plan = removed.length === whole ? `${whole} of ${plural(names.length, "unit")} removed (red)` : `channels removed in ${removed.length} of ${plural(names.length, "group")} (red)`;
  const list = element("details", {}, element("summary", { textContent: plan }), element("p", { textContent: removed.join(", ") }));
  list.id = "plan";
  return [heading(`Network, and scores by ${strip.criterion} (bars, logarithmic)`), row, list];
}

function draw() {
  const visible = listVisibleRuns(), settings = listSettings(visible);
  drawChart(visible, settings);
  drawTable(visible, settings);
}

document.getElementById("explorer").hidden = false;
makeControls();
makeFilters();
draw();
chart.on("plotly_click", (event) => { if (event.points[0].customdata) choose(event.points[0].customdata); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") choose([]); });
