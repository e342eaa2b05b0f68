"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PALETTE = ["#0a7cff", "#e8590c", "#2b9348", "#9c36b5", "#c2255c", "#0b7285", "#e0a100", "#5f6b7a"];
const PAGES = { summary: "Summary", curves: "Curves", gate: "The update", browser: "Responses" };
const $ = (id) => document.getElementById(id);

/* An element with attributes and children; text is only ever set as text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null).map((child) => (child instanceof Node ? child : String(child))));
  return node;
}
const shown = (value, digits = 3) =>
  value == null ? "" : typeof value !== "number" ? String(value) : Number.isInteger(value) ? String(value)
    : Math.abs(value) >= 1000 || (value !== 0 && Math.abs(value) < 0.001) ? value.toExponential(2) : value.toFixed(digits);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function table(header, rows) {
  const numeric = (column) => rows.every((row) => row[column] == null || row[column] === "" || typeof row[column] === "number");
  const cell = (tag, value, column) => make(tag, { class: column && numeric(column) ? "number" : null, scope: tag === "th" ? "col" : null }, shown(value));
  return make("div", { class: "wide" }, make("table", {},
    make("thead", {}, make("tr", {}, header.map((name, column) => cell("th", name, column)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((value, column) => cell("td", value, column)))))));
}

/* A chart with a caption that says in words what it shows. */
function chart(parent, title, note, traces, layout = {}) {
  const extra = traces.length > 2 ? Math.ceil(traces.length / 2) : traces.length > 1 ? 1 : 0; // rows of the legend
  const area = make("div", { class: "chart", style: `height:calc(${extra * 1.3}rem + 16rem)`, role: "img", "aria-label": `${title}. ${note}` });
  parent.append(make("figure", {}, make("figcaption", {}, title, make("small", {}, note)), area));
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  Plotly.newPlot(area, traces, {
    margin: { l: 45, r: 10, t: 8, b: 38 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--text"), size: 12 }, colorway: PALETTE, showlegend: traces.length > 1,
    legend: { orientation: "h", y: -0.3, yanchor: "top", x: 0 }, hovermode: "closest", ...layout,
    xaxis: { ...axis, ...(layout.xaxis || {}), title: { standoff: 2, ...(layout.xaxis || {}).title } }, yaxis: { ...axis, ...(layout.yaxis || {}) },
  }, { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] });
  new ResizeObserver(() => area.offsetParent && Plotly.Plots.resize(area)).observe(area);
}

/* ---- summary ---- */
function drawSummary(page) {
  const results = (run) => run.evaluations.filter((row) => row.name === run.evaluations[0].name);
  page.append(make("h2", {}, "Before and after"));
  page.append(table(["run", "evaluation", "step", "pass@1", "95 % interval", "problems", "tokens per response", "cut", "without answer"],
    data.runs.flatMap((run) => [...new Set(run.evaluations.map((row) => row.name))].flatMap((name) => {
      const rows = run.evaluations.filter((row) => row.name === name);
      return [...new Set([rows[0], rows[rows.length - 1]])].map((row) => [run.name, name, row.step, row["pass@1"],
        `${shown(row.ci95[0])} to ${shown(row.ci95[1])}`, row.n, row.response_tokens, row.truncated, row.no_answer]);
    }))));
  if (data.runs.every((run) => !run.evaluations.length)) page.append(make("p", { class: "note" }, "No evaluation was made; set eval.data in the config."));
  const charts = make("div", { class: "charts" });
  page.append(charts);
  const names = [...new Set(data.runs.flatMap((run) => run.evaluations.map((row) => row.name)))];
  for (const name of names) {
    const traces = data.runs.flatMap((run) => {
      const rows = results(run).length ? run.evaluations.filter((row) => row.name === name) : [];
      return rows.length ? [{
        x: rows.map((row) => row.step), y: rows.map((row) => row["pass@1"]), name: run.name, mode: "lines+markers",
        error_y: { type: "data", symmetric: false, array: rows.map((row) => row.ci95[1] - row["pass@1"]), arrayminus: rows.map((row) => row["pass@1"] - row.ci95[0]), thickness: 1 },
      }] : [];
    });
    const said = traces.map((trace) => `${trace.name}: ${shown(trace.y[0])} to ${shown(trace.y[trace.y.length - 1])}`).join("; ");
    chart(charts, `pass@1, ${name}`, said, traces, { xaxis: { title: { text: "step" } }, yaxis: { range: [0, 1.02] } });
  }
  page.append(make("h2", {}, "Runs"));
  const facts = [...new Set(data.runs.flatMap((run) => Object.keys(run.facts)))];
  page.append(table(["", ...data.runs.map((run) => run.name)], [
    ["folder", ...data.runs.map((run) => run.folder)],
    ["steps", ...data.runs.map((run) => `${run.metrics.step[run.metrics.step.length - 1]} of ${run.steps_planned}${run.summary ? ", finished" : ""}`)],
    ...facts.map((name) => [name, ...data.runs.map((run) => run.facts[name] ?? "")]),
  ]));
}

/* ---- curves ---- */
const CURVES = [
  ["Reward", (name) => name.startsWith("reward/") && name !== "reward/zero_variance", "mean over the responses of a step, by part"],
  ["Reward by task", (name) => /^task\/.*\/reward$/.test(name), "mean over a task's responses"],
  ["Response length", (name) => name === "response/tokens" || name === "response/tokens_max", "tokens"],
  ["Shares of responses", (name) => ["response/truncated", "response/identical", "reward/zero_variance"].includes(name), "cut at the limit; equal to another of their group; groups without variance"],
  ["Entropy", (name) => name === "policy/entropy", "nats per token"],
  ["KL to the start", (name) => name === "policy/kl_reference", "nats per token"],
  ["KL to the weights that drew", (name) => name === "policy/kl_old_k3", "nats per token, all mini-batches"],
  ["Gradient norm", (name) => name === "policy/grad_norm", "before clipping"],
  ["Loss", (name) => name === "loss", ""],
  ["Outcomes of rewards", (name) => name.startsWith("outcome/"), "responses per step that could not be graded, and why"],
  ["Experts", (name) => name.startsWith("policy/router"), "routers of a mixture of experts"],
  ["Engine against trainer", (name) => name.startsWith("policy/mismatch"), "log-probs of the same tokens"],
  ["Seconds per step", (name) => ["time/step", "time/rollout", "time/update", "time/reward"].includes(name), "where the time goes"],
  ["Speed", (name) => name === "rollout/tokens_per_second", "response tokens per second of drawing"],
];
function drawCurves(page) {
  const smooth = make("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: 0, "aria-label": "Smoothing", onchange: () => fill() });
  page.append(make("div", { class: "controls" }, make("label", {}, "Smoothing ", smooth)));
  const charts = make("div", { class: "charts" });
  page.append(charts);
  function average(values, weight) {
    let last = null;
    return values.map((value) => (value == null ? null : (last = last == null ? value : weight * last + (1 - weight) * value)));
  }
  function fill() {
    charts.replaceChildren();
    for (const [title, wanted, note] of CURVES) {
      const traces = data.runs.flatMap((run, number) => Object.keys(run.metrics).filter(wanted).map((name, place) => ({
        x: run.metrics.step, y: average(title.startsWith("Outcomes") ? run.metrics[name].map((count) => count ?? 0) : run.metrics[name], Number(smooth.value)), mode: "lines", connectgaps: true,
        name: data.runs.length > 1 ? `${run.name}: ${name.replace(/^[a-z]+\//, "")}` : name.replace(/^[a-z]+\//, ""),
        line: { width: 1.6, color: PALETTE[(data.runs.length > 1 ? number : place) % PALETTE.length], dash: data.runs.length > 1 ? ["solid", "dot", "dash", "dashdot"][place % 4] : "solid" },
      })));
      if (traces.length) {
        const ends = traces.slice(0, 4).map((trace) => `${trace.name} ${shown(trace.y.find((value) => value != null))} to ${shown(trace.y.findLast((value) => value != null))}`);
        chart(charts, title, `${note}${note ? ". " : ""}${ends.join("; ")}`, traces, { xaxis: { title: { text: "step" } } });
      }
    }
  }
  fill();
}

/* ---- what the update did: ratios and gate ---- */
const DECADES = Array.from({ length: 29 }, (_, place) => 10 ** (-6 + place / 4));
const tick = (value) => (value >= 0.01 && value < 100 ? String(Number(value.toPrecision(2))) : `10<sup>${Math.round(Math.log10(value))}</sup>`);
function drawGate(page) {
  const choose = make("select", { "aria-label": "Run", onchange: () => fill() }, data.runs.map((run, place) => make("option", { value: place }, run.name)));
  const slider = make("input", { type: "range", min: 0, "aria-label": "Step", oninput: () => histograms() });
  const label = make("output", {});
  page.append(make("p", { class: "note" },
    "What is left of the plain policy gradient of each token, f'(r), is 1 where the ratio r of new to old probability is 1. SAPO lets it fall smoothly as r moves away, faster where the advantage is negative; clipping lets it fall from 1 to 0."));
  page.append(make("div", { class: "controls" }, make("label", {}, "Run ", choose), make("label", { style: "flex:1;display:flex;gap:.5rem" }, "Step ", slider, label)));
  const clouds = make("div", { class: "charts" }), rest = make("div", { class: "charts" });
  page.append(clouds, make("h2", {}, "Over the run"), rest);
  const run = () => data.runs[Number(choose.value)];
  function histograms() {
    clouds.replaceChildren();
    const row = run().histograms[Number(slider.value)];
    if (!row || !row.minibatches.length) {
      label.textContent = row ? `${row.step}: no group had variance, so nothing was trained` : "none";
      return;
    }
    label.textContent = row.step;
    const signed = [...DECADES.map((value) => `-${tick(value)}`).reverse(), "0", ...DECADES.map(tick)];
    const edges = { tickvals: [0, 8, 16, 24, 29, 34, 42, 50, 58], ticktext: [0, 8, 16, 24, 29, 34, 42, 50, 58].map((place) => signed[place]) };
    const share = (counts) => { const all = counts.reduce((a, b) => a + b, 0) || 1; return counts.map((count) => count / all); };
    chart(clouds, "log r by mini-batch", "share of tokens; the first mini-batch is on policy, so its log r is 0",
      row.minibatches.map((one, place) => ({ y: share(one.log_ratio), x: signed.map((_, at) => at), text: signed, name: `mini-batch ${place + 1}`, mode: "lines", line: { shape: "hvh", width: 1.6 }, hovertemplate: "log r %{text}: %{y:.1%}" })),
      { xaxis: { ...edges, title: { text: "log r" } }, yaxis: { tickformat: ".0%" } });
    const places = ["under 1e-6", ...DECADES.map((value) => `to ${tick(value * 10 ** 0.25)}`)];
    const total = (name) => row.minibatches.map((one) => one[name]).reduce((a, b) => a.map((value, at) => value + b[at]));
    chart(clouds, "Taken away from each token's gradient, |1 - f'(r)|", "share of tokens, all mini-batches, by the sign of the advantage",
      [["attenuated_pos", "positive advantage", css("--good")], ["attenuated_neg", "negative advantage", css("--bad")]].map(([name, title, color]) => ({ type: "bar", x: places.map((_, at) => at), y: share(total(name)), text: places, textposition: "none", name: title, marker: { color }, hovertemplate: "%{text}: %{y:.1%}" })),
      { barmode: "group", xaxis: { tickvals: [0, 5, 9, 13, 17, 21, 25], ticktext: ["0", ...[5, 9, 13, 17, 21, 25].map((at) => tick(DECADES[at - 1]))], title: { text: "|1 - f'(r)|" } }, yaxis: { tickformat: ".0%" } });
    const sequences = row.minibatches.flatMap((one) => one.sequences || []).filter(([variance]) => variance > 0);
    if (sequences.length) {
      const most = Math.max(...sequences.map(([variance]) => variance)), factors = [...new Set(sequences.map((each) => each[2]))];
      const inside = sequences.filter(([variance, deviation, factor]) => deviation <= factor * variance * 1.001).length;
      chart(clouds, "Token gates against a sequence gate", `${inside} of ${sequences.length} responses lie under the bound tau²/4 · variance of section 4 of the paper`, [
        { x: sequences.map((each) => each[0]), y: sequences.map((each) => each[1]), mode: "markers", name: "a response", marker: { size: 5, opacity: 0.7 } },
        ...factors.map((factor) => ({ x: [0, most], y: [0, factor * most], mode: "lines", name: `bound, tau ${shown(2 * Math.sqrt(factor), 2)}`, line: { dash: "dash" } })),
      ], { xaxis: { title: { text: "variance of log r within the response" } }, yaxis: { title: { text: "deviation" } } });
    }
  }
  const OVER = [
    ["Effective update f'(r)", ["policy/effective_update_pos", "policy/effective_update_neg"], "mean over tokens with positive and with negative advantage"],
    ["Share of tokens attenuated", ["policy/update_under_90", "policy/update_under_50"], "f'(r) under .9 and under .5"],
    ["What hard clipping would have dropped", ["policy/grpo_would_clip", "policy/gspo_would_clip"], "share of the same tokens; GRPO with .2, GSPO with 3e-4 and 4e-4"],
    ["Ratio r", ["policy/ratio_p01", "policy/ratio_p99", "policy/ratio_max"], "1st and 99th percentile and the largest"],
    ["Variance within responses", ["policy/sequence_variance_p50", "policy/sequence_variance_p99"], "of log r; median and 99th percentile"],
    ["Gate deviation and its bound", ["policy/gate_deviation", "policy/gate_deviation_bound"], "means over responses"],
  ];
  function fill() {
    slider.max = Math.max(0, run().histograms.length - 1);
    slider.value = Math.max(0, run().histograms.findLastIndex((row) => row.minibatches.length));
    histograms();
    rest.replaceChildren();
    for (const [title, names, note] of OVER) {
      const traces = data.runs.flatMap((one, number) => names.filter((name) => one.metrics[name]).map((name, place) => ({
        x: one.metrics.step, y: one.metrics[name], mode: "lines", connectgaps: true, name: `${data.runs.length > 1 ? `${one.name}: ` : ""}${name.slice(7)}`,
        line: { width: 1.6, color: PALETTE[(data.runs.length > 1 ? number : place) % PALETTE.length], dash: data.runs.length > 1 ? ["solid", "dot", "dash"][place] : "solid" },
      })));
      if (traces.length) chart(rest, title, note, traces, { xaxis: { title: { text: "step" } }, yaxis: title.startsWith("Share") || title.startsWith("What") ? { rangemode: "tozero" } : {} });
    }
  }
  fill();
}

/* ---- responses ---- */
const COLOURS = {
  none: ["plain text", null, ""],
  log_ratio: ["log r", (value, most) => (value >= 0 ? `rgba(43,147,72,${Math.min(0.75, (0.75 * value) / most)})` : `rgba(220,50,60,${Math.min(0.75, (-0.75 * value) / most)})`), "green: likelier than when it was drawn; red: less likely"],
  attenuated: ["|1 - f'(r)|", (value, most) => `rgba(232,89,12,${Math.min(0.8, (0.8 * value) / most)})`, "what the gate took from the token's gradient"],
  entropy: ["entropy", (value, most) => `rgba(10,124,255,${Math.min(0.7, (0.7 * value) / most)})`, "nats; how open the choice of the token was"],
};
const FILTERS = {
  all: ["all", () => true],
  won: ["won (mean reward at least .5)", (item) => item.mean >= 0.5],
  lost: ["lost (mean reward under .5)", (item) => item.mean < 0.5],
  mixed: ["some right, some wrong", (item) => new Set(item.responses.map((each) => each.reward)).size > 1],
  changed: ["changed since the start", (item) => item.changed],
  cut: ["with a cut response", (item) => item.responses.some((each) => each.cut)],
  evaluation: ["evaluations only", (item) => item.kind === "evaluation"],
};
function drawBrowser(page) {
  let items = [], at = 0;
  const pick = (name, label, options) => make("label", {}, `${label} `, make("select", { id: name, onchange: () => sift() }, options.map(([value, text]) => make("option", { value }, text))));
  const tasks = [...new Set(data.runs.flatMap((run) => run.items.map((item) => item.task)))];
  const counter = make("output", { "aria-live": "polite", id: "counter" });
  page.append(make("div", { class: "controls" },
    pick("run", "Run", data.runs.map((run, place) => [place, run.name])),
    pick("filter", "Show", Object.entries(FILTERS).map(([name, [text]]) => [name, text])),
    pick("task", "Task", [["", "all"], ...tasks.map((task) => [task, task])]),
    pick("colour", "Colour by", Object.entries(COLOURS).map(([name, [text]]) => [name, text]))));
  page.append(make("div", { class: "controls" },
    make("button", { id: "previous", onclick: () => go(-1) }, "← previous"), make("button", { id: "next", onclick: () => go(1) }, "next →"), counter,
    make("span", { class: "note" }, "keys: ← and →")));
  const area = make("div", { id: "item" });
  page.append(area);
  function sift() {
    const wanted = FILTERS[$("filter").value][1], task = $("task").value;
    items = data.runs[Number($("run").value)].items.filter((item) => wanted(item) && (!task || item.task === task));
    at = Math.min(at, Math.max(0, items.length - 1));
    show();
  }
  function go(step) {
    if (items.length) at = (at + step + items.length) % items.length;
    show();
  }
  function picture(place, item) {
    if (place == null) return make("p", { class: "note" }, "this picture's file is missing");
    const boxes = [...(item.boxes || []).map((box) => [box, ""]), ...item.responses.flatMap((each) => (each.boxes || []).map((box) => [box, "given"]))];
    return make("div", { class: "frame" }, make("img", { src: data.pictures[place], alt: `picture of problem ${item.id}` }),
      boxes.map(([[left, top, right, bottom], kind]) => make("span", { class: kind, style: `left:${left * 100}%;top:${top * 100}%;width:${(right - left) * 100}%;height:${(bottom - top) * 100}%` })));
  }
  function show() {
    counter.textContent = items.length ? `${at + 1} of ${items.length}` : "none";
    area.replaceChildren();
    const item = items[at];
    if (!item) return;
    const name = $("colour").value, [, colour, note] = COLOURS[name];
    const values = (each) => (name === "attenuated" ? (each.effective || []).map((value) => Math.abs(1 - value)) : each[name] || []);
    let most = 1e-9; // of all tokens, which may be too many for the arguments of Math.max
    for (const each of item.responses) for (const value of values(each)) most = Math.max(most, Math.abs(value));
    area.append(make("h2", {}, `${item.title} · ${item.task} · ${item.id}`));
    area.append(make("div", { class: `problem ${item.pictures.length ? "" : "bare"}` },
      item.pictures.length ? make("div", {}, item.pictures.map((place) => picture(place, item))) : null,
      make("div", {}, make("div", { class: "text" }, item.problem), make("p", {}, "Gold answer: ", make("b", {}, item.answer)), make("p", {}, `Mean reward ${shown(item.mean)}`),
        colour ? make("p", { class: "note" }, `${note}; strongest colour at ${shown(most, 4)}`) : null)));
    if (colour && !item.responses.some((each) => values(each).length)) area.append(make("p", { class: "note" }, "These responses were not trained on: all scored alike, or they are of an evaluation."));
    area.append(make("div", { class: "responses" }, item.responses.map((each) => article(each, colour, values(each), most))));
  }
  function article(each, colour, values, most) {
    const parts = Object.entries(each.parts || {});
    const facts = [each.when, `${each.tokens} tokens${each.cut ? ", cut" : ""}`, each.advantage == null ? null : `advantage ${shown(each.advantage, 2)}`,
      ...(parts.length > 1 ? parts.map(([name, value]) => `${name} ${shown(value, 2)}`) : []), ...Object.entries(each.outcomes || {}).map(([name, outcome]) => `${name}: ${outcome}`)];
    const text = colour && values.length
      ? [...each.pieces.map((piece, place) => make("span", { style: `background:${colour(values[place], most)}`, title: shown(values[place], 5) }, piece)), each.pieces.length < each.tokens ? ` ... (${each.tokens - each.pieces.length} more tokens are not traced)` : ""]
      : each.text;
    return make("article", { class: each.reward >= 0.5 ? "good" : "" },
      make("header", {}, make("b", {}, `reward ${shown(each.reward, 2)}`), facts.filter(Boolean).map((fact) => make("span", {}, fact))),
      make("div", { class: "text" }, text));
  }
  document.addEventListener("keydown", (event) => {
    if (page.hidden || event.target.matches("select, input, [role=tab]")) return;
    if (event.key === "ArrowRight" || event.key === "j") go(1);
    if (event.key === "ArrowLeft" || event.key === "k") go(-1);
  });
  sift();
}

/* ---- pages ---- */
const DRAW = { summary: drawSummary, curves: drawCurves, gate: drawGate, browser: drawBrowser };
const drawn = new Set();
function open(name) {
  for (const page of Object.keys(PAGES)) {
    $(`page-${page}`).hidden = page !== name;
    $(`tab-${page}`).setAttribute("aria-selected", page === name);
    $(`tab-${page}`).tabIndex = page === name ? 0 : -1;
  }
  if (!drawn.has(name)) {
    drawn.add(name);
    DRAW[name]($(`page-${name}`));
  }
  history.replaceState(null, "", `#${name}`);
}
for (const [name, text] of Object.entries(PAGES)) {
  $("tabs").append(make("button", { role: "tab", id: `tab-${name}`, "aria-controls": `page-${name}`, onclick: () => { open(name); $(`page-${name}`).focus({ preventScroll: true }); }, onkeydown: (event) => {
    const names = Object.keys(PAGES), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const other = names[(names.indexOf(name) + step + names.length) % names.length];
    open(other);
    $(`tab-${other}`).focus();
  } }, text));
}
$("title").textContent = data.runs.map((run) => run.name).join(" and ");
document.title = `${$("title").textContent}: report`;
open(location.hash.slice(1) in PAGES ? location.hash.slice(1) : "summary");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload());
/* A page that follows a run is asked for anew, but not from under a reader's eyes. */
if (data.refresh) setInterval(() => ["#summary", "#curves"].includes(location.hash) && location.reload(), data.refresh * 1000);
