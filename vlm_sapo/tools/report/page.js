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
const percent = (share, digits = 0) => (share == null ? "" : `${(100 * share).toFixed(digits)} %`);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();


/* A cell is a value or an element. */
function table(header, rows) {
  const numeric = (column) => rows.every((row) => row[column] == null || typeof row[column] === "number" || /^([+-]?[\d.]+(e[+-]?\d+)?( %)?)?$/.test(row[column]));
  const kind = (tag, value, column) => (column && numeric(column) ? "number" : tag === "td" && shown(value).length < 24 ? "short" : null);
  const cell = (tag, value, column) => make(tag, { class: kind(tag, value, column), scope: tag === "th" ? "col" : null }, value instanceof Node ? value : shown(value));
  return make("div", { class: "wide" }, make("table", {},
    make("thead", {}, make("tr", {}, header.map((name, column) => cell("th", name, column)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((value, column) => cell("td", value, column)))))));
}
/* Names and texts, which may be long: the texts wrap. */
function facts(header, rows) {
  const node = table(header, rows);
  node.classList.add("facts");
  return node;
}
/* A score between 0 and 1 with its 95 % interval, as a mark on a line. */
const interval = (score, [low, high]) => low < 0 || high > 1 ? "" : make("span", { class: "interval", title: `${shown(score)}, 95 % interval ${shown(low)} to ${shown(high)}`, "aria-hidden": "true" },
  make("i", { style: `left:${low * 100}%;width:${(high - low) * 100}%` }), make("b", { style: `left:${score * 100}%` }));

/* ---- the summary in sentences ---- */
const KINDS = { better: "Improved", worse: "Worse", same: "No change", unsure: "Uncertain", note: "Note", look: "Look at", ok: "In order" };
function sentences(findings) {
  const order = (kind) => ({ look: 1, ok: 2 })[kind] || 0;
  return make("ul", { class: "findings" }, [...findings].sort((one, other) => order(one.kind) - order(other.kind))
    .map(({ kind, text }) => make("li", { class: kind }, make("b", {}, KINDS[kind]), make("span", {}, text))));
}
/* The sentences of each run or evaluation, under its name if there are several. */
function addFindings(page, sources, title) {
  page.append(make("h2", {}, title));
  for (const source of sources) page.append(...(sources.length > 1 ? [make("h3", {}, source.name)] : []), sentences(source.findings));
}

/* A chart with a caption that says in words what it shows. */
function chart(parent, title, note, traces, layout = {}) {
  const extra = traces.length > 2 ? Math.ceil(traces.length / 2) : traces.length > 1 ? 1 : 0; // rows of the legend
  const area = make("div", { class: "chart", style: `height:calc(${extra * 1.3}rem + 16rem)`, role: "img", "aria-label": `${title}. ${note}` });
  parent.append(make("figure", {}, make("figcaption", {}, title, make("small", {}, note)), area));
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true, exponentformat: "power" };
  const named = (own, standoff) => ({ ...axis, ...own, title: { standoff, ...(own || {}).title } });
  Plotly.newPlot(area, traces, {
    margin: { l: 55, r: 10, t: 8, b: 38 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--text"), size: 12 }, colorway: PALETTE, showlegend: traces.length > 1,
    legend: { orientation: "h", y: -0.3, yanchor: "top", x: 0 }, hovermode: "closest", ...layout,
    xaxis: named(layout.xaxis, 2), yaxis: named(layout.yaxis, 6),
  }, { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] });
  new ResizeObserver(() => area.offsetParent && Plotly.Plots.resize(area)).observe(area);
}
const axes = (unit, more = {}) => ({ xaxis: { title: { text: "training step" } }, yaxis: { title: { text: unit }, ...more } });

/* ---- summary of runs ---- */
/* A table with a row for each of a run's lines, under the run's name if there are several. */
function runTable(header, lines) {
  const several = data.runs.length > 1;
  return table([...(several ? ["run"] : []), ...header], data.runs.flatMap((run) => lines(run).map((cells) => (several ? [run.name, ...cells] : cells))));
}
function renderSummary(page) {
  addFindings(page, data.runs, "In short");
  if (data.between.length) page.append(make("h3", {}, "Between the runs"), sentences(data.between));
  const names = [...new Set(data.runs.flatMap((run) => run.evaluations.map((row) => row.name)))];
  if (names.length) {
    page.append(make("h2", {}, "Before and after"), runTable(["evaluation", "after steps", "pass@1", "95 % interval", "0 to 1", "problems", "tokens per response", "truncated", "no answer found"],
      (run) => names.flatMap((name) => {
        const rows = run.evaluations.filter((row) => row.name === name);
        return [...new Set(rows.length ? [rows[0], rows[rows.length - 1]] : [])].map((row) => [name, row.step, row["pass@1"].toFixed(3),
          `${row.ci95[0].toFixed(3)} to ${row.ci95[1].toFixed(3)}`, interval(row["pass@1"], row.ci95), row.n, row.response_tokens?.toFixed(1), percent(row.truncated, 1), percent(row.no_answer, 1)]);
      })));
  }
  const charts = make("div", { class: "charts" });
  page.append(charts);
  for (const name of names) {
    const traces = data.runs.flatMap((run) => {
      const rows = run.evaluations.filter((row) => row.name === name);
      return rows.length ? [{
        x: rows.map((row) => row.step), y: rows.map((row) => row["pass@1"]), name: run.name, mode: "lines+markers",
        error_y: { type: "data", symmetric: false, array: rows.map((row) => row.ci95[1] - row["pass@1"]), arrayminus: rows.map((row) => row["pass@1"] - row.ci95[0]), thickness: 1 },
      }] : [];
    });
    const ends = traces.map((trace) => `${trace.name}: ${shown(trace.y[0])} to ${shown(trace.y[trace.y.length - 1])}`).join("; ");
    const within = traces.every((trace) => trace.y.every((value) => value >= 0 && value <= 1)); // a reward of one's own may not be
    chart(charts, `pass@1, ${name}`, `with 95 % intervals. ${ends}`, traces, axes("pass@1 (mean score)", within ? { range: [0, 1.02] } : {}));
  }
  page.append(make("h2", {}, "Data"), runTable(["data", "source", "share", "prompts", "epochs", "reward, first steps", "reward, last steps"],
    (run) => run.data.map((row) => [row.name, row.source, percent(row.share), row.prompts, row.epochs, row.first, row.last])));
  const columns = (key) => {
    const fields = [...new Set(data.runs.flatMap((run) => Object.keys(run[key])))];
    return facts(["", ...data.runs.map((run) => run.name)], fields.map((field) => [field, ...data.runs.map((run) => run[key][field] ?? "")]));
  };
  page.append(make("h2", {}, data.runs.length > 1 ? "Runs" : "Run"), columns("about"), make("h2", {}, "Settings"), columns("facts"));
  page.append(make("p", { class: "note" }, "The main settings, and those in which the runs differ. config.yaml in a run's folder has all of them."));
}

/* ---- curves: each with a function that names a metric in words, or returns nothing if it isn't shown ---- */
const tail = (name) => name.slice(name.indexOf("/") + 1).replaceAll("_", " ");
const words = (names) => (name) => names[name];
const isPart = (name) => /^reward\/(?!mean$|std$|zero_variance$)/.test(name);
const CURVES = [
  ["Reward", "mean over a step's responses", "reward", (name, run) => (name === "reward/mean" ? "total" : isPart(name) && Object.keys(run.metrics).filter(isPart).length > 1 ? `part ${tail(name)}` : null)],
  ["Reward by task", "mean over a task's responses", "reward", (name) => name.match(/^task\/(.*)\/reward$/)?.[1]],
  ["Reward deviation", "standard deviation within a group, mean over groups; advantages are made of it", "reward", words({ "reward/std": "deviation" })],
  ["Response length", "sampled tokens", "tokens", words({ "response/tokens": "mean", "response/tokens_max": "longest" })],
  ["Shares of responses and groups", "what teaches little", "share", words({ "response/truncated": "responses at the length limit", "response/identical": "responses equal to another of their group", "reward/zero_variance": "groups with equal rewards" })],
  ["Entropy", "of the policy, mean over tokens", "nats per token", words({ "policy/entropy": "entropy" })],
  ["KL(policy, reference policy)", "mean over tokens", "nats per token", words({ "policy/kl_reference": "KL" })],
  ["KL(policy, rollout policy)", "mean over the tokens of all mini-batches", "nats per token", words({ "policy/kl_old_k3": "KL" })],
  ["Gradient norm", "before clipping", "norm", words({ "policy/grad_norm": "gradient norm" })],
  ["Learning rate", "of the optimizer", "learning rate", words({ lr: "learning rate" })],
  ["Loss", "of the updates, mean over mini-batches", "loss", words({ loss: "loss" })],
  ["Reward outcomes", "responses that could not be graded, by reason", "responses per step", (name) => (name.startsWith("outcome/") ? tail(name).replace("/", ": ") : null)],
  ["Experts", "routers of a mixture-of-experts model", "value", (name) => (name.startsWith("policy/router") || name.startsWith("policy/experts") ? tail(name) : null)],
  ["Train/inference mismatch", "log-probs of the same tokens in the trainer and in the generation engine", "nats", words({ "policy/mismatch_mean": "mean difference", "policy/mismatch_max": "largest difference", "policy/mismatch_kl": "KL" })],
  ["Seconds per step", "where the time goes", "seconds", words({ "time/step": "whole step", "time/rollout": "generation", "time/update": "update", "time/reward": "rewards" })],
  ["Generation speed", "sampled tokens by the time of generation", "tokens per second", words({ "rollout/tokens_per_second": "speed" })],
  ["Peak memory", "so far, of the process or GPU with the most", "GB", words({ "memory/gpu_peak_gb": "GPU", "memory/host_peak_gb": "host memory" })],
];
/* One run: a colour per metric. Several runs: a colour per run and a dash per metric. */
const lineStyle = (run, metric) => data.runs.length > 1
  ? { width: 1.6, color: PALETTE[run % PALETTE.length], dash: DASHES[metric % DASHES.length] } : { width: 1.6, color: PALETTE[metric % PALETTE.length] };
/* The traces of the metrics that `label` names, and what they begin and end with. */
function curves(label, change = (values) => values) {
  const traces = data.runs.flatMap((run, number) => Object.keys(run.metrics).map((name) => [name, label(name, run)]).filter(([, text]) => text).map(([name, text], index) => ({
    x: run.metrics.step, y: change(run.metrics[name], name), mode: "lines", connectgaps: true,
    name: data.runs.length > 1 ? `${run.name}: ${text}` : text, line: lineStyle(number, index),
  })));
  const ends = traces.slice(0, 4).map((trace) => `${trace.name} ${shown(trace.y.find((value) => value != null))} to ${shown(trace.y.findLast((value) => value != null))}`);
  return [traces, ends.join("; ")];
}
function renderCurves(page) {
  const smooth = make("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: 0, "aria-label": "Smoothing", onchange: () => fill() });
  page.append(make("div", { class: "controls" }, make("label", { class: "slider" }, "Smoothing ", smooth)));
  const charts = make("div", { class: "charts" });
  page.append(charts);
  function average(values, weight) {
    let last = null;
    return values.map((value) => (value == null ? null : (last = last == null ? value : weight * last + (1 - weight) * value)));
  }
  function fill() {
    charts.replaceChildren();
    for (const [title, note, unit, label] of CURVES) {
      const [traces, ends] = curves(label, (values, name) => average(name.startsWith("outcome/") ? values.map((count) => count ?? 0) : values, Number(smooth.value)));
      if (traces.length) chart(charts, title, `${note}. ${ends}`, traces, axes(unit, title === "Learning rate" ? { rangemode: "tozero" } : {}));
    }
  }
  fill();
}

/* ---- policy ratio and clipping ---- */
const DECADES = Array.from({ length: 29 }, (_, index) => 10 ** (-6 + index / 4));
const tick = (value) => (value >= 0.01 && value < 100 ? String(Number(value.toPrecision(2))) : `10<sup>${Math.round(Math.log10(value))}</sup>`);
const GATE_CURVES = [
  ["Effective update f'(r)", "mean over tokens, by the sign of the advantage", "share of the plain gradient", words({ "policy/effective_update_pos": "positive advantage", "policy/effective_update_neg": "negative advantage" })],
  ["Attenuated tokens", "tokens that keep less than 90 % and less than 50 % of their gradient", "share of tokens", words({ "policy/update_under_90": "under 90 %", "policy/update_under_50": "under 50 %" }), { rangemode: "tozero" }],
  ["Tokens that hard clipping would drop", "of the same tokens; GRPO clips at 0.2, GSPO at 3e-4 and 4e-4", "share of tokens", words({ "policy/grpo_would_clip": "GRPO", "policy/gspo_would_clip": "GSPO" }), { rangemode: "tozero" }],
  ["Ratio r", "new over old probability of a token", "ratio", words({ "policy/ratio_p01": "1st percentile", "policy/ratio_p99": "99th percentile", "policy/ratio_max": "largest" })],
  ["Variance within responses", "of log r", "variance", words({ "policy/sequence_variance_p50": "median response", "policy/sequence_variance_p99": "99th percentile" })],
  ["Gate deviation and its bound", "between the mean gate of a response and the gate of its mean log r; means over responses", "deviation", words({ "policy/gate_deviation": "deviation", "policy/gate_deviation_bound": "bound" })],
];
function renderGate(page) {
  const choose = make("select", { "aria-label": "Run", onchange: () => fill() }, data.runs.map((run, index) => make("option", { value: index }, run.name)));
  const slider = make("input", { type: "range", min: 0, "aria-label": "Step", oninput: () => histograms() });
  const label = make("output", {});
  page.append(make("p", { class: "note" },
    "f'(r) is the share of the plain policy gradient that a token keeps. It is 1 where the ratio r of new to old probability is 1. SAPO lowers it smoothly as r moves away from 1, faster for negative advantages; hard clipping drops it from 1 to 0."));
  page.append(make("div", { class: "controls" }, make("label", { hidden: data.runs.length < 2 }, "Run ", choose), make("label", { class: "slider" }, "Step ", slider, label)));
  const distributions = make("div", { class: "charts" }), overall = make("div", { class: "charts" });
  page.append(distributions, make("h2", {}, "Over the run"), overall);
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
    chart(distributions, "log r by mini-batch", "r is a token's new probability over its old one; the first mini-batch is on policy, so its log r is 0",
      row.minibatches.map((one, index) => ({ y: shares(one.log_ratio), x: signed.map((_, at) => at), text: signed, name: `mini-batch ${index + 1}`, mode: "lines", line: { shape: "hvh", width: 1.6 }, hovertemplate: "log r %{text}: %{y:.1%}" })),
      { xaxis: { ...edges, title: { text: "log r (nats)" } }, yaxis: { tickformat: ".0%", title: { text: "share of tokens" } } });
    const bins = ["under 1e-6", ...DECADES.map((value) => `to ${tick(value * 10 ** 0.25)}`)];
    const total = (name) => row.minibatches.map((one) => one[name]).reduce((a, b) => a.map((value, at) => value + b[at]));
    chart(distributions, "Gradient that the objective removed, |1 - f'(r)|", "distribution over the tokens of all mini-batches, by the sign of the advantage",
      [["attenuated_pos", "positive advantage", css("--good")], ["attenuated_neg", "negative advantage", css("--bad")]].map(([name, title, color]) => ({ type: "bar", x: bins.map((_, at) => at), y: shares(total(name)), text: bins, textposition: "none", name: title, marker: { color }, hovertemplate: "%{text}: %{y:.1%}" })),
      { barmode: "group", xaxis: { tickvals: [0, 5, 9, 13, 17, 21, 25], ticktext: ["0", ...[5, 9, 13, 17, 21, 25].map((at) => tick(DECADES[at - 1]))], title: { text: "removed share of a token's gradient" } }, yaxis: { tickformat: ".0%", title: { text: "share of tokens" } } });
    const sequences = row.minibatches.flatMap((one) => one.sequences || []).filter(([variance]) => variance > 0);
    if (sequences.length) {
      const most = Math.max(...sequences.map(([variance]) => variance)), factors = [...new Set(sequences.map((each) => each[2]))];
      const inside = sequences.filter(([variance, deviation, factor]) => deviation <= factor * variance * 1.001).length;
      chart(distributions, "Token gates compared with a sequence gate", `${inside} of ${sequences.length} responses are within the bound tau²/4 · variance (section 4 of the paper)`, [
        { x: sequences.map((each) => each[0]), y: sequences.map((each) => each[1]), mode: "markers", name: "a response", marker: { size: 5, opacity: 0.7 } },
        ...factors.map((factor) => ({ x: [0, most], y: [0, factor * most], mode: "lines", name: `bound, tau ${shown(2 * Math.sqrt(factor), 2)}`, line: { dash: "dash" } })),
      ], { xaxis: { title: { text: "variance of log r within the response" } }, yaxis: { title: { text: "deviation of the gates" } } });
    }
  }
  function fill() {
    slider.max = Math.max(0, run().histograms.length - 1);
    slider.value = Math.max(0, run().histograms.findLastIndex((row) => row.minibatches.length));
    histograms();
  }
  fill();
  for (const [title, note, unit, label, more] of GATE_CURVES) {
    const [traces, ends] = curves(label);
    if (traces.length) chart(overall, title, `${note}. ${ends}`, traces, axes(unit, more));
  }
}

/* ---- responses ---- */
const GREEN = "43,147,72", RED = "220,50,60", ORANGE = "232,89,12", BLUE = "10,124,255";
const shade = (color, value, most) => `rgba(${color},${Math.min(0.75, (0.75 * value) / most)})`;
/* By name: title, colour of a value, colours of the scale from its lower to its upper end, what the ends mean. */
const COLOURS = {
  none: ["nothing"],
  log_ratio: ["log r: what the update did", (value, most) => shade(value >= 0 ? GREEN : RED, Math.abs(value), most), [RED, GREEN], "less likely than when it was sampled", "more likely"],
  attenuated: ["removed gradient |1 - f'(r)|", (value, most) => shade(ORANGE, value, most), [null, ORANGE], "all of the token's gradient kept", "removed"],
  entropy: ["entropy (nats)", (value, most) => shade(BLUE, value, most), [null, BLUE], "the model was certain of this token", "undecided"],
};
/* Whether a token is the policy's: all are, but where an environment answered. */
const isOwn = (each, index) => !each.policy?.length || each.policy[index] === 1;
const valuesOf = (each, name) => (name === "attenuated" ? (each.effective || []).map((value, index) => (isOwn(each, index) ? Math.abs(1 - value) : 0)) : each[name] || []);
const differ = (item) => new Set(item.responses.map((each) => each.reward)).size > 1;
const FILTERS = {
  all: ["all", () => true],
  mixed: ["rewards differ (a learning signal)", differ],
  won: ["mostly right (mean reward at least 0.5)", (item) => item.mean >= 0.5],
  lost: ["mostly wrong (mean reward under 0.5)", (item) => item.mean < 0.5],
  changed: ["changed since the start", (item) => item.changed],
  truncated: ["with a truncated response", (item) => item.responses.some((each) => each.truncated)],
  evaluation: ["evaluations only", (item) => item.kind === "evaluation"],
};
const EVALUATION_FILTERS = {
  all: FILTERS.all, won: ["right (mean score at least 0.5)", FILTERS.won[1]], lost: ["wrong (mean score under 0.5)", FILTERS.lost[1]],
  mixed: ["sometimes right", differ], truncated: FILTERS.truncated,
};
const COMPARISON_FILTERS = {
  changed: ["verdict changed", (item) => item.changed],
  losses: ["B worse than A", (item) => item.changed && item.gain < 0],
  wins: ["B better than A", (item) => item.changed && item.gain > 0],
  unchanged: ["verdict unchanged", (item) => !item.changed],
  all: FILTERS.all,
};
const mean = (values) => values.reduce((a, b) => a + b, 0) / (values.length || 1);
const lengths = (item) => item.responses.map((each) => each.tokens || each.text.length);
const removed = (item) => mean(item.responses.flatMap((each) => valuesOf(each, "attenuated").filter((_, index) => isOwn(each, index))));
function spread(item) {
  const rewards = item.responses.map((each) => each.reward), middle = mean(rewards);
  return mean(rewards.map((reward) => (reward - middle) ** 2));
}
/* Why a response with an environment ended. */
const FINISHES = { stop: "stop", length: "length limit", turns: "limit of turns", images: "limit of images", timeout: "environment took too long", error: "environment failed" };
const SORTS = {
  logged: ["as recorded", null],
  low: ["reward: lowest first", (item) => item.mean],
  high: ["reward: highest first", (item) => -item.mean],
  apart: ["reward: most different first", (item) => -spread(item)],
  long: ["length: longest response first", (item) => -Math.max(...lengths(item))],
  short: ["length: shortest response first", (item) => Math.min(...lengths(item))],
  clipped: ["clipping: most gradient removed first", (item) => -removed(item)],
};
const outcomesOf = (item) => item.responses.flatMap((each) => Object.entries(each.outcomes || {}).map((pair) => pair.join(": ")));
/* All of an item's text that a search looks through. */
function textOf(item) {
  item.haystack ??= [item.id, item.problem, item.answer, ...item.responses.flatMap((each) => [each.text, ...(each.turns || []).map((turn) => turn.text)])].join("\n").toLowerCase();
  return item.haystack;
}
/* Highlights a text wherever it occurs, also across the elements of single tokens. */
function highlight(area, text) {
  if (!CSS.highlights) return; // of older browsers: the search works, unmarked
  const ranges = [];
  for (const block of text ? area.querySelectorAll(".text, .gold") : []) {
    const nodes = [], walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
    let whole = "";
    while (walker.nextNode()) {
      nodes.push([whole.length, walker.currentNode]);
      whole += walker.currentNode.data;
    }
    const lower = whole.toLowerCase();
    const locate = (at) => { const [start, node] = nodes.findLast(([start]) => start <= at); return [node, at - start]; };
    for (let at = lower.indexOf(text); at >= 0 && lower.length === whole.length; at = lower.indexOf(text, at + text.length)) {
      const range = new Range(), [last, end] = locate(at + text.length - 1);
      range.setStart(...locate(at));
      range.setEnd(last, end + 1);
      ranges.push(range);
    }
  }
  CSS.highlights.set("search", new Highlight(...ranges));
}
/* Steps through the items (a problem with its responses) of each source: `{name, items}`. */
function renderBrowser(page, sources, filters, tasksTitle) {
  let items = [], at = 0;
  const pick = (name, label, options, change = () => filter()) => make("label", { hidden: options.length < 2 }, `${label} `, make("select", { id: name, onchange: change }, options.map(([value, text]) => make("option", { value }, text))));
  const all = sources.flatMap((source) => source.items), unique = (values) => [...new Set(values)].sort();
  const traced = all.some((item) => item.responses.some((each) => each.pieces));
  const named = (values) => [["", "all"], ...values.map((value) => [value, value])];
  const tasks = unique(all.map((item) => item.task));
  const subsets = unique(all.flatMap((item) => Object.entries(item.subsets || {}).map((pair) => pair.join(": "))));
  const search = make("input", { type: "search", id: "search", placeholder: "problem, answer, response or id", oninput: () => filter() });
  const counter = make("output", { "aria-live": "polite", id: "counter" });
  page.append(make("div", { class: "controls" },
    make("label", {}, "Search ", search),
    pick("run", "Run", sources.map((source, index) => [index, source.name])),
    pick("filter", "Show", Object.entries(filters).map(([name, [text]]) => [name, text])),
    pick("task", tasksTitle, tasks.length > 1 ? named(tasks) : []),
    pick("subset", "Subset", named(subsets)),
    pick("outcome", "Outcome", named(unique(all.flatMap(outcomesOf)))),
    pick("sort", "Sort by", Object.entries(SORTS).filter(([name]) => traced || name !== "clipped").map(([name, [text]]) => [name, text])),
    pick("colour", "Colour by", Object.entries(COLOURS).filter(([name]) => traced || name === "none").map(([name, [text]]) => [name, text]), () => show())));
  page.append(make("div", { class: "controls" },
    make("button", { id: "previous", onclick: () => go(-1) }, "← previous"), make("button", { id: "next", onclick: () => go(1) }, "next →"), counter,
    make("span", { class: "note" }, "keys: ← and →")));
  const area = make("div", { id: "item" });
  page.append(area);
  function filter() {
    const matches = filters[$("filter").value][1], text = search.value.toLowerCase(), key = SORTS[$("sort").value][1];
    const [task, subset, outcome] = ["task", "subset", "outcome"].map((name) => $(name).value);
    items = sources[Number($("run").value)].items.filter((item) => matches(item) && (!task || item.task === task) && (!outcome || outcomesOf(item).includes(outcome))
      && (!subset || Object.entries(item.subsets || {}).some((pair) => pair.join(": ") === subset)) && (!text || textOf(item).includes(text)));
    if (key) items.sort((one, other) => key(one) - key(other));
    at = 0;
    show();
  }
  function go(step) {
    if (items.length) at = (at + step + items.length) % items.length;
    show();
  }
  function image(index, alt, boxes = []) {
    if (index == null) return make("p", { class: "note" }, "the image is missing, or left out because the page would be too large");
    return make("div", { class: "frame" }, make("img", { src: data.images[index], alt }),
      boxes.map(([[left, top, right, bottom], kind]) => make("span", { class: kind, style: `left:${left * 100}%;top:${top * 100}%;width:${(right - left) * 100}%;height:${(bottom - top) * 100}%` })));
  }
  function problemImages(item) {
    const boxes = [...(item.boxes || []).map((box) => [box, ""]), ...item.responses.flatMap((each) => (each.boxes || []).map((box) => [box, "predicted"]))];
    return item.images.map((index) => image(index, `image of problem ${item.id}`, boxes));
  }
  /* The scale of the colours, or why there are none. */
  function legend(item, name, most) {
    const [, , ends, low, high] = COLOURS[name];
    if (most > 1e-9) {
      const colors = ends.map((color) => (color ? `rgba(${color},.75)` : "transparent"));
      const middle = ends[0] ? [colors[0], "transparent", colors[1]] : colors;
      return make("p", { class: "note legend" }, make("span", {}, `${low}${ends[0] ? ` (${shown(-most, 4)})` : ""}`), make("span", { class: "scale", style: `background:linear-gradient(to right,${middle.join(",")})` }), make("span", {}, `${high} (${shown(most, 4)})`));
    }
    if (item.kind === "evaluation") return null;
    if (item.responses.some((each) => valuesOf(each, name).length)) return make("p", { class: "note" }, "No colours: this group was in the first mini-batch of its step, which is on policy, so all values are 0.");
    return make("p", { class: "note" }, differ(item) ? "No colours: the tokens of this step were not traced." : "No colours: all rewards of this group are equal, so it was not trained on.");
  }
  function show() {
    counter.textContent = items.length ? `${at + 1} of ${items.length}` : "none";
    area.replaceChildren();
    const item = items[at];
    if (!item) return void area.append(make("p", { class: "note" }, "Nothing matches this search and these filters."));
    const name = $("colour").value, colour = COLOURS[name][1];
    let most = 1e-9; // of all tokens, which may be too many for the arguments of Math.max
    for (const each of item.responses) for (const value of valuesOf(each, name)) most = Math.max(most, Math.abs(value));
    area.append(make("h2", {}, [...new Set([item.title, item.task, item.id])].join(" · ")));
    area.append(make("div", { class: `problem ${item.images.length ? "" : "bare"}` },
      item.images.length ? make("div", {}, problemImages(item)) : null,
      make("div", {}, make("div", { class: "text" }, item.problem), make("p", { class: "gold" }, "Gold answer: ", make("b", {}, item.answer)),
        item.means ? null : make("p", {}, `Mean reward ${shown(item.mean)}`),
        Object.entries(item.subsets || {}).length ? make("p", { class: "note" }, Object.entries(item.subsets).map((pair) => pair.join(": ")).join(" · ")) : null,
        colour ? legend(item, name, most) : null)));
    const articles = (responses) => responses.map((each) => article(each, colour, valuesOf(each, name), most));
    if (!item.means) area.append(make("div", { class: "responses" }, articles(item.responses)));
    else area.append(make("div", { class: "sides" }, Object.entries(item.means).map(([label, score]) => make("section", { "aria-label": label },
      make("h3", {}, `${label}: mean reward ${score.toFixed(2)}`), articles(item.responses.filter((each) => each.when === label))))));
    highlight(area, search.value.toLowerCase());
  }
  function article(each, colour, values, most) {
    const parts = Object.entries(each.parts || {});
    const counts = ["turns", "calls"].filter((name) => each.counts?.[name] != null).map((name) => `${each.counts[name]} ${each.counts[name] === 1 ? name.slice(0, -1) : name}`);
    const notes = [each.tokens == null ? null : `${each.tokens} tokens${each.truncated ? ", truncated" : ""}`, ...counts, each.finish ? `ended: ${FINISHES[each.finish] || each.finish}` : null, each.advantage == null ? null : `advantage ${shown(each.advantage, 2)}`,
      ...(parts.length > 1 ? parts.map(([name, value]) => `${name} ${shown(value, 2)}`) : []), ...Object.entries(each.outcomes || {}).map(([name, outcome]) => `${name}: ${outcome}`)];
    const coloured = colour && values.length, own = coloured ? each.pieces.filter((_, index) => isOwn(each, index)).length : 0;
    const token = (piece, index) => isOwn(each, index)
      ? make("span", { style: `background:${colour(values[index], most)}`, title: shown(values[index], 5) }, piece)
      : make("span", { class: "other", title: "the environment's: not trained on" }, piece);
    const tokens = coloured ? each.pieces.map(token) : [];
    const rest = coloured && own < each.tokens ? ` ... (${each.tokens - own} more tokens are not traced)` : "";
    const body = each.turns ? turns(each, tokens, rest) : make("div", { class: "text" }, coloured ? [...tokens, rest] : each.text);
    return make("article", { class: each.reward >= 0.5 ? "good" : "" },
      make("header", {}, make("b", {}, `reward ${shown(each.reward, 2)}`), notes.filter(Boolean).map((note) => make("span", {}, note))),
      body);
  }
  /* The turns of a response, as the tokens that are traced, or as texts. */
  function turns(each, tokens, rest) {
    const runs = [];
    tokens.forEach((token, index) => (index && isOwn(each, index) === isOwn(each, index - 1) ? runs.at(-1).push(token) : runs.push([token])));
    const last = Math.max(0, runs.length - 1);
    return each.turns.map(({ by, text, images }, index) => {
      const content = runs.length ? [...(runs[index] || []), index === last ? rest : ""] : text.trim();
      if (by !== "policy" && content[0]?.textContent?.trim() === "") content.shift(); // the line break after the turn before
      return runs.length && index > last ? null : make("section", { class: `turn ${by}`, "aria-label": by },
        make("h4", {}, by === "policy" ? "model" : by), make("div", { class: "text" }, content),
        images.length ? make("div", { class: "returned" }, images.map((number, at) => image(number, `image ${at + 1} that the environment returned`))) : null);
    }).filter(Boolean);
  }
  document.addEventListener("keydown", (event) => {
    if (page.hidden || event.target.matches("select, input, [role=tab]")) return;
    if (event.key === "ArrowRight" || event.key === "j") go(1);
    if (event.key === "ArrowLeft" || event.key === "k") go(-1);
  });
  if (traced) $("colour").value = "log_ratio";
  filter();
  // the first steps' first groups have nothing to colour: begin with one that taught something
  at = Math.max(0, items.findIndex((item) => differ(item) && item.responses.some((each) => valuesOf(each, "log_ratio").some((value) => Math.abs(value) > 1e-9))));
  show();
}

/* ---- evaluations ---- */
function renderEvaluations(page) {
  const several = data.evaluations.length > 1;
  const own = (evaluation, cells) => (several ? [evaluation.name, ...cells] : cells);
  const first = several ? ["evaluation"] : [];
  addFindings(page, data.evaluations, "In short");
  const more = [...new Set(data.evaluations.flatMap((evaluation) => evaluation.results.flatMap((row) => Object.keys(row.more))))];
  const cell = (name, value) => (typeof value === "number" && ["truncated", "no answer found"].includes(name) ? percent(value, 1) : value);
  const score = (row) => [row["pass@1"].toFixed(3), `${row.ci95[0].toFixed(3)} to ${row.ci95[1].toFixed(3)}`, interval(row["pass@1"], row.ci95)];
  page.append(make("h2", {}, "Results"), table([...first, "benchmark", "problems", "responses each", "pass@1", "95 % interval", "0 to 1", ...more],
    data.evaluations.flatMap((evaluation) => evaluation.results.map((row) => own(evaluation, [row.benchmark, row.n, row.samples, ...score(row), ...more.map((name) => cell(name, row.more[name]))])))));
  if (data.evaluations.some((evaluation) => evaluation.subsets.length)) {
    page.append(make("h2", {}, "By subset"), table([...first, "benchmark", "column", "value", "problems", "pass@1", "95 % interval", "0 to 1"],
      data.evaluations.flatMap((evaluation) => evaluation.subsets.map((row) => own(evaluation, [row.benchmark, row.column, row.value, row.n, ...score(row)])))));
  }
  page.append(make("p", { class: "note" }, "pass@1 is the mean score over responses and problems; its 95 % interval is a bootstrap over problems. Intervals of small subsets are wide: what overlaps is not shown to differ."));
  const settings = data.evaluations.flatMap((evaluation) => Object.entries(evaluation.settings).map(([name, values]) => [several ? `${evaluation.name}: ${name}` : name, values]));
  const fields = [...new Set(settings.flatMap(([, values]) => Object.keys(values)))];
  page.append(make("h2", {}, "Settings"), facts(["", ...settings.map(([name]) => name)], [
    ...(several ? [] : [["folder", ...settings.map(() => data.evaluations[0].folder)]]), ...fields.map((field) => [field, ...settings.map(([, values]) => values[field] ?? "")])]));
}
function renderProblems(page) {
  const [shownCount, total] = [data.evaluations.reduce((sum, each) => sum + each.items.length, 0), data.evaluations.reduce((sum, each) => sum + each.problems, 0)];
  if (shownCount < total) page.append(make("p", { class: "note" }, `${shownCount} of ${total} problems, evenly spaced; --groups includes more.`));
  renderBrowser(page, data.evaluations, EVALUATION_FILTERS, "Benchmark");
}

/* ---- a comparison of two evaluations ---- */
function renderComparison(page) {
  page.append(make("p", { class: "paths" }, "A: ", data.a, make("br"), "B: ", data.b), sentences(data.findings), ...data.notes.map((note) => make("p", {}, `Note: ${note}`)), table(data.header, data.rows));
  page.append(make("p", { class: "note" }, "Mean scores over the problems that A and B share, with a 95 % interval of their difference. A win is a problem where B's mean score is higher, a loss one where it is lower."));
}
function renderCompared(page) {
  const left = data.problems - data.items.length;
  page.append(make("p", { class: "note" }, `${data.changed ? "Problems whose mean score differs, B's losses first" : "No verdict changed; these are the problems with the responses of both"}${left ? `; ${left} more problems are left out` : ""}.`));
  const filters = Object.fromEntries(Object.entries(COMPARISON_FILTERS).filter(([name]) => data.changed || name === "all"));
  renderBrowser(page, [{ name: "A and B", items: data.items }], filters, "Benchmark");
}

/* ---- tabs ---- */
const RUN_PAGES = {
  summary: ["Summary", renderSummary], curves: ["Curves", renderCurves], gate: ["Policy ratio / clipping", renderGate],
  browser: ["Responses", (page) => renderBrowser(page, data.runs, FILTERS, "Task")],
};
const EVALUATION_PAGES = { summary: ["Summary", renderEvaluations], browser: ["Responses", renderProblems] };
const COMPARISON_PAGES = {
  summary: ["Comparison", renderComparison],
  browser: [data.changed ? `Problems (${data.changed} changed)` : "Problems", renderCompared],
};
const PAGES = data.runs ? RUN_PAGES : data.evaluations ? EVALUATION_PAGES : COMPARISON_PAGES;
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
const shownNames = (data.runs || data.evaluations || []).map((each) => each.name).join(" and ");
$("title").textContent = data.runs ? shownNames : data.evaluations ? `Evaluation ${shownNames}` : "Comparison";
document.title = shownNames ? `${shownNames}: report` : "Comparison";
open(location.hash.slice(1) in PAGES ? location.hash.slice(1) : "summary");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload());
/* A live page reloads itself, but not while someone reads responses or moves a slider. */
if (data.refresh) setInterval(() => ["#summary", "#curves"].includes(location.hash) && location.reload(), data.refresh * 1000);
