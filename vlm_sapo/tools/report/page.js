"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PALETTE = ["#0a7cff", "#e8590c", "#2b9348", "#9c36b5", "#c2255c", "#0b7285", "#e0a100", "#5f6b7a"];
const DASHES = ["solid", "dot", "dash", "dashdot"];
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
  const numeric = (column) => rows.every((row) => row[column] == null || typeof row[column] === "number" || /^([+-]?[\d.]+(e[+-]?\d+)?)?$/.test(row[column]));
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
function renderSummary(page) {
  const results = (run) => run.evaluations.filter((row) => row.name === run.evaluations[0].name);
  page.append(make("h2", {}, "Before and after"));
  page.append(table(["run", "evaluation", "step", "pass@1", "95 % interval", "problems", "tokens per response", "truncated", "no answer found"],
    data.runs.flatMap((run) => [...new Set(run.evaluations.map((row) => row.name))].flatMap((name) => {
      const rows = run.evaluations.filter((row) => row.name === name);
      return [...new Set([rows[0], rows[rows.length - 1]])].map((row) => [run.name, name, row.step, row["pass@1"],
        `${shown(row.ci95[0])} to ${shown(row.ci95[1])}`, row.n, row.response_tokens, row.truncated, row.no_answer]);
    }))));
  if (data.runs.every((run) => !run.evaluations.length)) page.append(make("p", { class: "note" }, "No evaluations; set eval.data in the config."));
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
    const ends = traces.map((trace) => `${trace.name}: ${shown(trace.y[0])} to ${shown(trace.y[trace.y.length - 1])}`).join("; ");
    chart(charts, `pass@1, ${name}`, ends, traces, { xaxis: { title: { text: "step" } }, yaxis: { range: [0, 1.02] } });
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
  ["Reward", (name) => name.startsWith("reward/") && name !== "reward/zero_variance", "mean over a step's responses, by part of the reward"],
  ["Reward by task", (name) => /^task\/.*\/reward$/.test(name), "mean over a task's responses"],
  ["Response length", (name) => name === "response/tokens" || name === "response/tokens_max", "tokens"],
  ["Shares of responses", (name) => ["response/truncated", "response/identical", "reward/zero_variance"].includes(name), "truncated at max_tokens; equal to another response of the group; groups with all rewards equal"],
  ["Entropy", (name) => name === "policy/entropy", "nats per token"],
  ["KL(policy, reference policy)", (name) => name === "policy/kl_reference", "nats per token"],
  ["KL(policy, rollout policy)", (name) => name === "policy/kl_old_k3", "nats per token, mean over all mini-batches"],
  ["Gradient norm", (name) => name === "policy/grad_norm", "before clipping"],
  ["Loss", (name) => name === "loss", ""],
  ["Reward outcomes", (name) => name.startsWith("outcome/"), "responses per step that could not be graded, by reason"],
  ["Experts", (name) => name.startsWith("policy/router"), "routers of a mixture-of-experts model"],
  ["Train/inference mismatch", (name) => name.startsWith("policy/mismatch"), "log-probs of the same tokens in the trainer and in the generation engine"],
  ["Seconds per step", (name) => ["time/step", "time/rollout", "time/update", "time/reward"].includes(name), "where the time goes"],
  ["Generation speed", (name) => name === "rollout/tokens_per_second", "response tokens per second of generation"],
];
/* One run: a colour per metric. Several runs: a colour per run and a dash per metric. */
const lineStyle = (run, metric) => data.runs.length > 1
  ? { width: 1.6, color: PALETTE[run % PALETTE.length], dash: DASHES[metric % DASHES.length] } : { width: 1.6, color: PALETTE[metric % PALETTE.length] };
function renderCurves(page) {
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
    for (const [title, matches, note] of CURVES) {
      const traces = data.runs.flatMap((run, number) => Object.keys(run.metrics).filter(matches).map((name, index) => ({
        x: run.metrics.step, y: average(title.startsWith("Reward outcomes") ? run.metrics[name].map((count) => count ?? 0) : run.metrics[name], Number(smooth.value)), mode: "lines", connectgaps: true,
        name: data.runs.length > 1 ? `${run.name}: ${name.replace(/^[a-z]+\//, "")}` : name.replace(/^[a-z]+\//, ""),
        line: lineStyle(number, index),
      })));
      if (traces.length) {
        const ends = traces.slice(0, 4).map((trace) => `${trace.name} ${shown(trace.y.find((value) => value != null))} to ${shown(trace.y.findLast((value) => value != null))}`);
        chart(charts, title, `${note}${note ? ". " : ""}${ends.join("; ")}`, traces, { xaxis: { title: { text: "step" } } });
      }
    }
  }
  fill();
}

/* ---- policy ratio and clipping ---- */
const DECADES = Array.from({ length: 29 }, (_, index) => 10 ** (-6 + index / 4));
const tick = (value) => (value >= 0.01 && value < 100 ? String(Number(value.toPrecision(2))) : `10<sup>${Math.round(Math.log10(value))}</sup>`);
function renderGate(page) {
  const choose = make("select", { "aria-label": "Run", onchange: () => fill() }, data.runs.map((run, index) => make("option", { value: index }, run.name)));
  const slider = make("input", { type: "range", min: 0, "aria-label": "Step", oninput: () => histograms() });
  const label = make("output", {});
  page.append(make("p", { class: "note" },
    "f'(r) is the share of the plain policy gradient that a token keeps. It is 1 where the ratio r of new to old probability is 1. SAPO lowers it smoothly as r moves away from 1, faster for negative advantages; hard clipping drops it from 1 to 0."));
  page.append(make("div", { class: "controls" }, make("label", {}, "Run ", choose), make("label", { style: "flex:1;display:flex;gap:.5rem" }, "Step ", slider, label)));
  const distributions = make("div", { class: "charts" }), curves = make("div", { class: "charts" });
  page.append(distributions, make("h2", {}, "Over the run"), curves);
  const run = () => data.runs[Number(choose.value)];
  function histograms() {
    distributions.replaceChildren();
    const row = run().histograms[Number(slider.value)];
    if (!row || !row.minibatches.length) {
      label.textContent = row ? `${row.step}: no learning signal, all rewards are equal within every group` : "none";
      return;
    }
    label.textContent = row.step;
    const signed = [...DECADES.map((value) => `-${tick(value)}`).reverse(), "0", ...DECADES.map(tick)];
    const edges = { tickvals: [0, 8, 16, 24, 29, 34, 42, 50, 58], ticktext: [0, 8, 16, 24, 29, 34, 42, 50, 58].map((index) => signed[index]) };
    const shares = (counts) => { const all = counts.reduce((a, b) => a + b, 0) || 1; return counts.map((count) => count / all); };
    chart(distributions, "log r by mini-batch", "share of tokens; the first mini-batch is on policy, so its log r is 0",
      row.minibatches.map((one, index) => ({ y: shares(one.log_ratio), x: signed.map((_, at) => at), text: signed, name: `mini-batch ${index + 1}`, mode: "lines", line: { shape: "hvh", width: 1.6 }, hovertemplate: "log r %{text}: %{y:.1%}" })),
      { xaxis: { ...edges, title: { text: "log r" } }, yaxis: { tickformat: ".0%" } });
    const bins = ["under 1e-6", ...DECADES.map((value) => `to ${tick(value * 10 ** 0.25)}`)];
    const total = (name) => row.minibatches.map((one) => one[name]).reduce((a, b) => a.map((value, at) => value + b[at]));
    chart(distributions, "Share of each token's gradient that was removed, |1 - f'(r)|", "share of tokens in all mini-batches, by the sign of the advantage",
      [["attenuated_pos", "positive advantage", css("--good")], ["attenuated_neg", "negative advantage", css("--bad")]].map(([name, title, color]) => ({ type: "bar", x: bins.map((_, at) => at), y: shares(total(name)), text: bins, textposition: "none", name: title, marker: { color }, hovertemplate: "%{text}: %{y:.1%}" })),
      { barmode: "group", xaxis: { tickvals: [0, 5, 9, 13, 17, 21, 25], ticktext: ["0", ...[5, 9, 13, 17, 21, 25].map((at) => tick(DECADES[at - 1]))], title: { text: "|1 - f'(r)|" } }, yaxis: { tickformat: ".0%" } });
    const sequences = row.minibatches.flatMap((one) => one.sequences || []).filter(([variance]) => variance > 0);
    if (sequences.length) {
      const most = Math.max(...sequences.map(([variance]) => variance)), factors = [...new Set(sequences.map((each) => each[2]))];
      const inside = sequences.filter(([variance, deviation, factor]) => deviation <= factor * variance * 1.001).length;
      chart(distributions, "Token gates compared with a sequence gate", `${inside} of ${sequences.length} responses are within the bound tau²/4 · variance (section 4 of the paper)`, [
        { x: sequences.map((each) => each[0]), y: sequences.map((each) => each[1]), mode: "markers", name: "a response", marker: { size: 5, opacity: 0.7 } },
        ...factors.map((factor) => ({ x: [0, most], y: [0, factor * most], mode: "lines", name: `bound, tau ${shown(2 * Math.sqrt(factor), 2)}`, line: { dash: "dash" } })),
      ], { xaxis: { title: { text: "variance of log r within the response" } }, yaxis: { title: { text: "deviation" } } });
    }
  }
  const GATE_CURVES = [
    ["Effective update f'(r)", ["policy/effective_update_pos", "policy/effective_update_neg"], "mean over tokens with positive and with negative advantage"],
    ["Share of tokens attenuated", ["policy/update_under_90", "policy/update_under_50"], "f'(r) under 0.9 and under 0.5"],
    ["Tokens that hard clipping would drop", ["policy/grpo_would_clip", "policy/gspo_would_clip"], "share of the same tokens; GRPO at 0.2, GSPO at 3e-4 and 4e-4"],
    ["Ratio r", ["policy/ratio_p01", "policy/ratio_p99", "policy/ratio_max"], "1st and 99th percentile and the largest"],
    ["Variance within responses", ["policy/sequence_variance_p50", "policy/sequence_variance_p99"], "of log r; median and 99th percentile"],
    ["Gate deviation and its bound", ["policy/gate_deviation", "policy/gate_deviation_bound"], "means over responses"],
  ];
  function fill() {
    slider.max = Math.max(0, run().histograms.length - 1);
    slider.value = Math.max(0, run().histograms.findLastIndex((row) => row.minibatches.length));
    histograms();
    curves.replaceChildren();
    for (const [title, names, note] of GATE_CURVES) {
      const traces = data.runs.flatMap((one, number) => names.filter((name) => one.metrics[name]).map((name, index) => ({
        x: one.metrics.step, y: one.metrics[name], mode: "lines", connectgaps: true, name: `${data.runs.length > 1 ? `${one.name}: ` : ""}${name.slice(7)}`,
        line: lineStyle(number, index),
      })));
      if (traces.length) chart(curves, title, note, traces, { xaxis: { title: { text: "step" } }, yaxis: title.startsWith("Share") || title.startsWith("Tokens") ? { rangemode: "tozero" } : {} });
    }
  }
  fill();
}

/* ---- responses ---- */
const COLOURS = {
  none: ["plain text", null, ""],
  log_ratio: ["log r", (value, most) => (value >= 0 ? `rgba(43,147,72,${Math.min(0.75, (0.75 * value) / most)})` : `rgba(220,50,60,${Math.min(0.75, (-0.75 * value) / most)})`), "green: more likely than when it was sampled; red: less likely"],
  attenuated: ["|1 - f'(r)|", (value, most) => `rgba(232,89,12,${Math.min(0.8, (0.8 * value) / most)})`, "share of the token's gradient that was removed"],
  entropy: ["entropy", (value, most) => `rgba(10,124,255,${Math.min(0.7, (0.7 * value) / most)})`, "nats, of the distribution that the token was sampled from"],
};
const FILTERS = {
  all: ["all", () => true],
  won: ["mostly right (mean reward at least 0.5)", (item) => item.mean >= 0.5],
  lost: ["mostly wrong (mean reward under 0.5)", (item) => item.mean < 0.5],
  mixed: ["some right, some wrong", (item) => new Set(item.responses.map((each) => each.reward)).size > 1],
  changed: ["changed since the start", (item) => item.changed],
  truncated: ["with a truncated response", (item) => item.responses.some((each) => each.truncated)],
  evaluation: ["evaluations only", (item) => item.kind === "evaluation"],
};
const COMPARISON_FILTERS = {
  all: ["all", () => true],
  losses: ["B worse than A", (item) => item.gain < 0],
  wins: ["B better than A", (item) => item.gain > 0],
};
/* Steps through the items (a problem with its responses) of each source: `{name, items}`. */
function renderBrowser(page, sources, filters, tasksTitle) {
  let items = [], at = 0;
  const pick = (name, label, options) => make("label", { hidden: options.length < 2 }, `${label} `, make("select", { id: name, onchange: () => filter() }, options.map(([value, text]) => make("option", { value }, text))));
  const all = sources.flatMap((source) => source.items), tasks = [...new Set(all.map((item) => item.task))];
  const colours = Object.entries(COLOURS).filter(([name]) => name === "none" || all.some((item) => item.responses.some((each) => each.pieces)));
  const counter = make("output", { "aria-live": "polite", id: "counter" });
  page.append(make("div", { class: "controls" },
    pick("run", "Run", sources.map((source, index) => [index, source.name])),
    pick("filter", "Show", Object.entries(filters).map(([name, [text]]) => [name, text])),
    pick("task", tasksTitle, [["", "all"], ...tasks.map((task) => [task, task])]),
    pick("colour", "Colour by", colours.map(([name, [text]]) => [name, text]))));
  page.append(make("div", { class: "controls" },
    make("button", { id: "previous", onclick: () => go(-1) }, "← previous"), make("button", { id: "next", onclick: () => go(1) }, "next →"), counter,
    make("span", { class: "note" }, "keys: ← and →")));
  const area = make("div", { id: "item" });
  page.append(area);
  function filter() {
    const matches = filters[$("filter").value][1], task = $("task").value;
    items = sources[Number($("run").value)].items.filter((item) => matches(item) && (!task || item.task === task));
    at = Math.min(at, Math.max(0, items.length - 1));
    show();
  }
  function go(step) {
    if (items.length) at = (at + step + items.length) % items.length;
    show();
  }
  function image(index, item) {
    if (index == null) return make("p", { class: "note" }, "the image file is missing");
    const boxes = [...(item.boxes || []).map((box) => [box, ""]), ...item.responses.flatMap((each) => (each.boxes || []).map((box) => [box, "predicted"]))];
    return make("div", { class: "frame" }, make("img", { src: data.images[index], alt: `image of problem ${item.id}` }),
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
    area.append(make("h2", {}, `${item.title} · ${item.task === item.title ? "" : `${item.task} · `}${item.id}`));
    area.append(make("div", { class: `problem ${item.images.length ? "" : "bare"}` },
      item.images.length ? make("div", {}, item.images.map((index) => image(index, item))) : null,
      make("div", {}, make("div", { class: "text" }, item.problem), make("p", {}, "Gold answer: ", make("b", {}, item.answer)), item.means ? null : make("p", {}, `Mean reward ${shown(item.mean)}`),
        colour ? make("p", { class: "note" }, most > 1e-9 ? `${note}; strongest colour at ${shown(most, 4)}` : note) : null)));
    if (colour && !item.responses.some((each) => values(each).length)) area.append(make("p", { class: "note" }, "No token values: all rewards of this group were equal, so it was not trained on, or it is from an evaluation."));
    else if (colour && most <= 1e-9) area.append(make("p", { class: "note" }, "All values are 0: this group was in the first mini-batch of its step, which is on policy."));
    const articles = (responses) => responses.map((each) => article(each, colour, values(each), most));
    if (!item.means) area.append(make("div", { class: "responses" }, articles(item.responses)));
    else area.append(make("div", { class: "sides" }, Object.entries(item.means).map(([label, mean]) => make("section", { "aria-label": label },
      make("h3", {}, `${label}: mean reward ${mean.toFixed(2)}`), articles(item.responses.filter((each) => each.when === label))))));
  }
  function article(each, colour, values, most) {
    const parts = Object.entries(each.parts || {});
    const facts = [each.tokens == null ? null : `${each.tokens} tokens${each.truncated ? ", truncated" : ""}`, each.advantage == null ? null : `advantage ${shown(each.advantage, 2)}`,
      ...(parts.length > 1 ? parts.map(([name, value]) => `${name} ${shown(value, 2)}`) : []), ...Object.entries(each.outcomes || {}).map(([name, outcome]) => `${name}: ${outcome}`)];
    const text = colour && values.length
      ? [...each.pieces.map((piece, index) => make("span", { style: `background:${colour(values[index], most)}`, title: shown(values[index], 5) }, piece)), each.pieces.length < each.tokens ? ` ... (${each.tokens - each.pieces.length} more tokens are not traced)` : ""]
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
  filter();
}

/* ---- a comparison of two evaluations ---- */
function renderComparison(page) {
  page.append(make("p", {}, "A: ", data.a, make("br"), "B: ", data.b), ...data.notes.map((note) => make("p", {}, `Note: ${note}`)), table(data.header, data.rows));
  page.append(make("p", { class: "note" }, "Mean scores over the problems that A and B share, with a 95 % interval of their difference. A win is a problem where B's mean score is higher, a loss one where it is lower."));
}
function renderChanged(page) {
  if (!data.changed) return page.append(make("p", { class: "note" }, "No verdict changed."));
  page.append(make("p", { class: "note" }, `Problems whose mean score differs, B's losses first${data.changed > data.items.length ? `; ${data.changed - data.items.length} more are left out` : ""}.`));
  renderBrowser(page, [{ name: "A and B", items: data.items }], COMPARISON_FILTERS, "Benchmark");
}

/* ---- tabs ---- */
const PAGES = data.runs
  ? {
    summary: ["Summary", renderSummary], curves: ["Curves", renderCurves], gate: ["Policy ratio / clipping", renderGate],
    browser: ["Responses", (page) => renderBrowser(page, data.runs, FILTERS, "Task")],
  }
  : { summary: ["Comparison", renderComparison], browser: [`Changed problems (${data.changed})`, renderChanged] };
const rendered = new Set();
function open(name) {
  for (const page of Object.keys(PAGES)) {
    $(`page-${page}`).hidden = page !== name;
    $(`tab-${page}`).setAttribute("aria-selected", page === name);
    $(`tab-${page}`).tabIndex = page === name ? 0 : -1;
  }
  if (!rendered.has(name)) {
    rendered.add(name);
    PAGES[name][1]($(`page-${name}`));
  }
  history.replaceState(null, "", `#${name}`);
}
for (const [name, [text]] of Object.entries(PAGES)) {
  $("pages").append(make("section", { role: "tabpanel", id: `page-${name}`, "aria-labelledby": `tab-${name}`, tabindex: 0, hidden: true }));
  $("tabs").append(make("button", { role: "tab", id: `tab-${name}`, "aria-controls": `page-${name}`, onclick: () => { open(name); $(`page-${name}`).focus({ preventScroll: true }); }, onkeydown: (event) => {
    const names = Object.keys(PAGES), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const other = names[(names.indexOf(name) + step + names.length) % names.length];
    open(other);
    $(`tab-${other}`).focus();
  } }, text));
}
$("title").textContent = data.runs ? data.runs.map((run) => run.name).join(" and ") : "Comparison";
document.title = data.runs ? `${$("title").textContent}: report` : "Comparison";
open(location.hash.slice(1) in PAGES ? location.hash.slice(1) : "summary");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload());
/* A live page reloads itself, but not while someone reads responses or moves a slider. */
if (data.refresh) setInterval(() => ["#summary", "#curves"].includes(location.hash) && location.reload(), data.refresh * 1000);
