/* The page of a run, made of its data: see page_data.py. Text of a run is set as text, never as markup. */
(function () {
  "use strict";

  const charts = window.AlignAuditCharts;
  const FORMAT = 1;
  const MEASURES = [
    { key: "gain", name: "what each layer adds to those below, as a share of the shift", unit: "share", share: true },
    { key: "transplant", name: "what each layer's update does alone", unit: "nats", share: false },
  ];
  const WORDS = { HEALTHY: "No alert is open", WATCH: "A warning is open", ERROR: "An error is open", BLIND: "The audit cannot see" };
  const PRINTED = 232;
  let counted = 0;

  function make(tag, options, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(options || {})) {
      if (value === null || value === undefined) continue;
      if (name === "text") node.textContent = value;
      else if (name === "on") for (const [event, what] of Object.entries(value)) node.addEventListener(event, what);
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  /* Foreign text: its direction is its own, so that it cannot turn what stands beside it. */
  const foreign = (tag, words, options) => make(tag, { dir: "auto", ...(options || {}), text: words });

  function shown(value, share) {
    if (value === null || value === undefined) return "not known";
    return share ? (value * 100).toFixed(1) + " %" : Number(value.toPrecision(4)).toString().replace("-", "−");
  }

  const signed = (value) => (value > 0 ? "+" : "") + shown(value);

  /* A change of log-probability, with what is infinite in it: that has no number in JSON. */
  const changeOf = (each, name) => (each.says === "∞" ? Infinity : each.says === "−∞" ? -Infinity : each[name]);
  const changed = (value) => (value === Infinity ? "+∞" : value === -Infinity ? "−∞" : Number.isNaN(value) ? "not known" : signed(value));

  function table(caption, head, rows) {
    return make("div", { class: "wide" }, make("table", {},
      make("caption", { text: caption }),
      make("thead", {}, make("tr", {}, ...head.map((words) => make("th", { scope: "col", text: words })))),
      make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((words, at) =>
        at === 0 ? make("th", { scope: "row", dir: "auto", text: words }) : foreign("td", words)))))));
  }

  /* Made when it is opened: tables of large runs are long. */
  function folded(title, fill, options) {
    const details = make("details", options, make("summary", { text: title }));
    let filled = false;
    const open = () => {
      if (!details.open || filled) return;
      filled = true;
      details.append(...[fill()].flat());
      redraw(details);
    };
    details.addEventListener("toggle", open);
    return details;
  }

  /* A chart with its finding for readers of screens, and its numbers as a table. Drawn when it stands in the page. */
  function chart(says, name, draw, asTable, options) {
    const place = make("div", { class: "chart " + ((options && options.class) || ""), role: "img", "aria-label": says, "data-chart": name });
    place.start = () => draw(place);
    const figure = make("figure", { class: "figure" }, place);
    if (asTable) figure.append(folded("As a table", asTable, { class: "as-table", "data-fold": "table-" + name }));
    return figure;
  }

  function redraw(root) {
    root.querySelectorAll(".chart").forEach((place) => {
      if (place.offsetParent === null) return;
      try {
        if (place.draw) place.draw();
        else place.start();
      } catch (error) {
        place.textContent = "This chart could not be drawn.";
        console.error(error);
      }
    });
  }

  function section(title, note, ...children) {
    counted += 1;
    const id = "section-" + counted;
    return make("section", { "aria-labelledby": id },
      make("h2", { id }, counted + ". " + title, note ? make("span", { class: "note", text: note }) : null), ...children);
  }

  // --- banner ---------------------------------------------------------------------------------------------------------

  function copyButton(command) {
    const said = make("span", { role: "status", class: "said" });
    const copy = async () => {
      try {
        await navigator.clipboard.writeText(command);
        said.textContent = "copied";
      } catch (error) {
        const range = document.createRange();
        range.selectNodeContents(button.previousElementSibling);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        said.textContent = document.execCommand("copy") ? "copied" : "selected: copy it with the keyboard";
      }
    };
    const button = make("button", { type: "button", class: "copy", "aria-label": "Copy the command", text: "Copy", on: { click: copy } });
    return [button, said];
  }

  function banner(run, set, controls) {
    const status = set.status;
    const always = status.word === "HEALTHY" && status.since === 0;
    const since = status.since === null || always ? "" : " since step " + status.since;
    const title = make("h1", {}, make("span", { class: "word", text: status.word + since }), " · ", foreign("bdi", run.name));
    const doing = make("p", { class: "do" }, make("strong", { text: "Do: " }), foreign("span", status.do.words));
    const sentences = status.sentences.map((words) => foreign("p", words));
    if (status.audited) sentences[sentences.length - 1].append(" ", stamped("Last audit", status.audited), ".");
    const parts = [title, ...sentences, doing];
    if (status.do.command) {
      parts.push(make("p", { class: "command" }, make("code", { text: status.do.command }), ...copyButton(status.do.command)));
    }
    if (status.log) parts.push(foreign("p", status.log, { class: "log" }));
    if (run.latest_healthy) parts.push(foreign("p", "Latest healthy: " + run.latest_healthy, { class: "latest" }));
    parts.push(make("p", { class: "facts" }, foreign("span", status.facts), " · ", written(run.written)));
    return make("header", { class: "banner " + status.word.toLowerCase(), role: "banner", "aria-label": WORDS[status.word] },
      make("div", { class: "inner" }, controls, ...parts));
  }

  const written = (when) => stamped("written", when);

  /* A time and its age, which grows as long as the page is open. */
  function stamped(what, when) {
    const text = () => what + " " + when.replace("T", " ").replace("+00:00", " UTC") + ageOf(when);
    const node = make("time", { datetime: when, text: text() });
    const timer = setInterval(() => { node.isConnected ? node.textContent = text() : clearInterval(timer); }, 60000);
    return node;
  }

  function ageOf(when) {
    const minutes = Math.floor((Date.now() - Date.parse(when)) / 60000);
    if (!Number.isFinite(minutes) || minutes < 2) return "";
    if (minutes < 120) return " (" + minutes + " minutes ago)";
    const hours = Math.floor(minutes / 60);
    return hours < 48 ? " (" + hours + " hours ago)" : " (" + Math.floor(hours / 24) + " days ago)";
  }

  // --- health ---------------------------------------------------------------------------------------------------------

  function panelTable(panel) {
    return table(panel.title, ["step", "value", "low", "high"].concat(panel.reference ? ["reference"] : []),
      panel.steps.map((step, at) => [String(step), panel.mean[at], panel.low[at], panel.high[at]]
        .concat(panel.reference ? [panel.reference[at]] : [])
        .map((value, column) => (column === 0 ? value : shown(value, panel.share)))));
  }

  function health(set) {
    if (!set.panels.length) {
      return section("Is the model all right?", null, make("p", { text: "Not known: no audit has come through." }));
    }
    const panels = set.panels.map((panel) => make("div", { class: "panel" },
      make("h3", { text: panel.title }),
      make("p", { class: "now" }, make("span", { class: "value", text: panel.now }),
        make("span", { class: "unit", text: [panel.share ? "" : panel.unit, panel.interval].filter(Boolean).join(" · ") }),
        panel.note ? make("span", { class: "unit", text: panel.note }) : null),
      chart(panel.says, panel.key, (place) => charts.healthPanel(place, panel, set.first_error), () => panelTable(panel), { class: "small" })));
    const error = set.first_error === null ? "" : " · upright: first error, step " + set.first_error;
    const note = "line and band: mean and " + set.confidence + " interval · dashed: limits of alerts · dotted grey: reference" + error;
    const parts = [make("p", { class: "legend", text: note }), make("div", { class: "panels" }, ...panels)];
    if (set.training.length) parts.push(training(set));
    return section("Is the model all right?", null, ...parts);
  }

  function training(set) {
    return make("div", { class: "training" }, make("p", { class: "legend", text: "For contrast, what the training log alone shows:" }),
      make("div", { class: "pair" }, ...set.training.map((curve) => make("div", { class: "panel grey" },
        make("h3", { text: curve.title + ": " + curve.now + " at step " + curve.step }),
        chart(curve.title + ": " + curve.now + " at step " + curve.step, "training-" + curve.column.replace("/", "-"),
          (place) => charts.trainingCurve(place, curve, set.panels[0].steps),
          () => table(curve.title, ["step", "value"], curve.steps.map((step, at) => [String(step), curve.not_finite[at] || shown(curve.values[at])])), { class: "tiny" })))));
  }

  // --- alerts ---------------------------------------------------------------------------------------------------------

  function alerts(set) {
    if (!set.alerts.length) {
      const words = set.panels.length ? "None so far." : "None: nothing was audited.";
      return section("Alerts", null, make("p", { text: words }));
    }
    const rows = set.alerts.map((alert) => {
      const state = alert.cleared === null ? "open" : "cleared at step " + alert.cleared;
      const lives = alert.earlier.map((life) => life.level + " from step " + life.since + " to " + life.cleared);
      const again = lives.length ? "; before: " + lives.join(", ") : "";
      const says = make("div", {}, foreign("p", alert.message));
      if (alert.suggestion) says.append(foreign("p", "To do: " + alert.suggestion, { class: "todo" }));
      if (alert.command) says.append(make("p", { class: "command" }, make("code", { text: alert.command }), ...copyButton(alert.command)));
      return make("li", { class: "alert " + alert.level + (alert.cleared === null ? "" : " cleared") },
        make("span", { class: "level", text: alert.level.toUpperCase() }),
        make("div", { class: "rule" }, foreign("code", alert.rule), make("span", { text: "since step " + alert.since + ", " + state + again })),
        says);
    });
    return section("Alerts", null, make("ul", { class: "alerts" }, ...rows));
  }

  // --- texts ----------------------------------------------------------------------------------------------------------

  function completion(pair, title, said, size) {
    const tokens = said.tokens;
    const text = make("p", { class: "tokens", dir: "auto" });
    tokens.forEach((token) => {
      const change = changeOf(token, "change");
      const side = change === null ? "" : change < 0 ? " low" : " high";
      const span = make("span", { class: "token" + side, title: change === null ? "not known" : changed(change) + " nats", text: token.text });
      span.style.setProperty("--share", Math.min(Math.abs(change || 0) / size, 1).toFixed(2));
      text.append(span);
    });
    const total = tokens.reduce((sum, token) => sum + (changeOf(token, "change") || 0), 0);
    const over = said.length === null ? "" : " over its beginning, of " + said.length + " tokens";
    return make("div", {}, make("h4", { text: title + ": " + changed(total) + " nats" + over }), text,
      folded("Tokens as a table", () => table(title, ["token", "change of log-probability (nats)"],
        tokens.map((token) => [token.text, changed(changeOf(token, "change"))])), { class: "as-table", "data-fold": "tokens-" + pair + title }));
  }

  function pairText(pair) {
    const changes = pair.chosen.tokens.concat(pair.rejected.tokens).map((token) => token.change).filter((change) => change !== null).map(Math.abs).sort((a, b) => a - b);
    const size = changes.length ? Math.max(changes[Math.floor(0.95 * (changes.length - 1))], 0.1) : 1;
    return make("article", { class: "pair-text" },
      make("h3", { text: "Pair " + pair.pair + ": margin shift " + changed(changeOf(pair, "shift")) + " nats" }),
      folded("Prompt", () => foreign("pre", pair.prompt), { "data-fold": "prompt-" + pair.pair }),
      completion(pair.pair, "chosen", pair.chosen, size), completion(pair.pair, "rejected", pair.rejected, size));
  }

  function texts(set) {
    if (!set.texts) return null;
    const part = (title, pairs) => (pairs.length ? [make("h3", { class: "group", text: title }), ...pairs.map(pairText)] : []);
    return section("What changed in text", "step " + set.texts.step,
      make("p", { class: "legend" }, "Each token is shaded by the change of its log-probability against the reference: ",
        make("span", { class: "key low", text: "less likely" }), " ", make("span", { class: "key high", text: "more likely" })),
      ...part("Pairs that lost most", set.texts.lost), ...part("Pairs that gained most", set.texts.gained));
  }

  // --- where ----------------------------------------------------------------------------------------------------------

  function layerTable(where, at, measure) {
    const series = where[measure.key][at];
    return table("Step " + where.steps[at] + ": " + measure.name + " (" + measure.unit + ")", ["layer", "mean", "low", "high"],
      series.mean.map((value, layer) => [String(layer), shown(value, measure.share), shown(series.low[layer], measure.share), shown(series.high[layer], measure.share)]));
  }

  function where(set) {
    const there = set.where;
    if (!there) {
      return section("Where?", null, make("p", { text: "Not measured: no full audit has patched the layers yet." }));
    }
    let at = there.steps.length - 1;
    // What the sentence speaks of, where there is a shift to share.
    let measure = MEASURES.find((each) => there[each.key][at].mean.some((value) => typeof value === "number")) || MEASURES[0];
    const sentence = foreign("p", "", { class: "finding", "aria-live": "polite" });
    const ends = make("p", { class: "legend" });
    const output = make("output", { for: "audit-slider", "aria-live": "off" });
    const slider = make("input", { type: "range", id: "audit-slider", min: 0, max: there.steps.length - 1, step: 1, value: at });
    const select = make("select", { id: "measure" }, ...MEASURES.map((each, place) => make("option", { value: place, text: each.name, selected: each === measure ? "" : null })));
    const claim = () => (there.claims[at].length ? there.claims[at] : there.peaks[at] === null ? [] : [there.peaks[at]]);
    const map = make("div", { class: "chart", role: "img", "data-chart": "layers" });
    const bars = make("div", { class: "chart", role: "img", "data-chart": "audit" });
    const height = Math.max(220, Math.min(60 + 22 * there.layers, 520));
    map.style.height = height + "px";
    bars.style.height = height + "px";
    const chips = make("div", { class: "chips-of" });
    const update = () => {
      const series = there[measure.key][at];
      const step = there.steps[at];
      sentence.textContent = there.sentences[at];
      output.textContent = "step " + step;
      slider.setAttribute("aria-valuetext", "step " + step);
      const end = there.ends[at];
      const key = measure.key === "gain" ? "_gain" : "_transplant";
      ends.textContent = there.unknown[at] && measure.share
        ? "No shares at this step: " + there.unknown[at]
        : "Embedding " + shown(end["embedding" + key].mean, measure.share) + ", head " + shown(end["head" + key].mean, measure.share) +
          " (" + measure.unit + "). Additivity " + shown(there.additivity[at].mean) + ": near 1 while the layers' updates act separately.";
      map.setAttribute("aria-label", "Layers over steps: " + measure.name + ". " + there.sentences[at]);
      bars.setAttribute("aria-label", "Step " + step + ": " + measure.name + ". " + there.sentences[at]);
      map.start = () => charts.layerMap(map, there, measure, at);
      bars.start = () => charts.layerBars(bars, series, measure, claim());
      chips.replaceChildren(evidenceChips(set.evidence.find((each) => each.step === step)));
      if (map.isConnected) {
        map.start();
        bars.start();
      }
      tables.replaceChildren(folded("As a table", () => layerTable(there, at, measure), { class: "as-table", "data-fold": "layers" }));
    };
    const tables = make("div");
    slider.addEventListener("input", () => { at = Number(slider.value); update(); });
    select.addEventListener("change", () => { measure = MEASURES[Number(select.value)]; update(); });
    update();
    const controls = make("div", { class: "controls" }, make("label", { for: "measure", text: "Show " }), select,
      make("label", { for: "audit-slider", text: "Full audit " }), slider, output);
    const parts = [sentence, controls, make("div", { class: "side-by-side" }, make("figure", { class: "figure" }, map), make("figure", { class: "figure" }, bars)),
      make("p", { class: "legend" }, make("span", { class: "key high", text: "towards the preference" }), " ", make("span", { class: "key low", text: "against it" })),
      ends, tables];
    if (there.sites.length) parts.push(sites(there));
    return [section("Where?", null, ...parts), section("Evidence", "controls of the audit chosen above", chips)];
  }

  function sites(there) {
    return folded("Finer sites, step " + there.sites_step, () => make("div", { class: "side-by-side" }, ...there.sites.map((site) => {
      const left = site.left_out ? " (" + site.left_out + " of less effect are not shown)" : "";
      const says = site.name + ": what each puts into the reference, nats" + left;
      const rows = () => table(site.name, ["layer", ...(site.heads ? ["head"] : []), "mean", "low", "high"], site.layers.map((layer, at) =>
        [String(layer), ...(site.heads ? [String(site.heads[at])] : []), ...["mean", "low", "high"].map((end) => shown(site.sufficiency[end][at]))]));
      return make("div", {}, make("h3", { text: says }), chart(says, "site-" + site.site, (place) => charts.siteChart(place, site), rows));
    })), { class: "sites", "data-fold": "sites" });
  }

  function evidenceChips(audit) {
    if (!audit) return make("p", { text: "No control was run." });
    const detail = make("p", { class: "reason", "aria-live": "polite", text: "Point at a control, or move to it with the keyboard, for its reason." });
    const chips = audit.chips.map((chip) => {
      const mark = { passed: "✓", failed: "✗", "not run": "–" }[chip.verdict];
      const words = chip.name + ", " + chip.verdict + ": " + chip.reason + (chip.verdict === "failed" ? ". No evidence then: " + chip.guards : "");
      const tell = () => { detail.textContent = words; };
      return make("li", {}, make("button", {
        type: "button", class: "chip " + chip.verdict.replace(" ", "-") + (chip.broken ? " broken" : ""), title: words,
        on: { mouseenter: tell, focus: tell, click: tell },
      }, make("span", { "aria-hidden": "true", text: mark + " " }), chip.name + ": " + chip.verdict));
    });
    return make("div", {}, make("ul", { class: "chips" }, ...chips), detail);
  }

  // --- folded ---------------------------------------------------------------------------------------------------------

  function more(set) {
    const parts = set.more;
    const rows = [];
    if (parts.low_rank) rows.push(folded(parts.low_rank.title, () => lowRank(parts.low_rank), { "data-fold": "low-rank" }));
    if (parts.spinal) rows.push(folded(parts.spinal.title, () => spinal(parts.spinal), { "data-fold": "spinal" }));
    if (parts.transfer) {
      rows.push(folded(parts.transfer.title, () => table(parts.transfer.title, ["basis", "layer", "fitted on", "patched on", "rank", "share of the effect", "interval", "pairs", "control"],
        parts.transfer.cells.map((cell) => [cell.basis, String(cell.layer), cell.fitted, cell.patched, String(cell.rank), shown(cell.fraction.mean),
          shown(cell.fraction.low) + " to " + shown(cell.fraction.high), String(cell.pairs), cell.control])), { "data-fold": "transfer" }));
    }
    if (parts.continuations.length) rows.push(folded("What policy and reference write", () => table("Greedy continuations", ["", "policy", "reference"], parts.continuations), { "data-fold": "continuations" }));
    if (parts.cost.steps.length) {
      rows.push(folded("Cost: " + parts.cost.title, () => table("Cost of each audit", ["step", "kind", "seconds"],
        parts.cost.steps.map((step, at) => [String(step), parts.cost.kinds[at], shown(parts.cost.seconds[at])])), { "data-fold": "cost" }));
    }
    rows.push(folded("Provenance: models, pairs, versions", () => table("Provenance", ["", ""], parts.provenance), { "data-fold": "provenance" }));
    if (parts.unknown.length) {
      rows.push(folded("What is not known, and why", () => table("Not known", ["reason", "numbers"],
        parts.unknown.map((each) => [each.reason, each.paths.join(", ")])), { "data-fold": "unknown" }));
    }
    return section("More", null, ...rows);
  }

  function lowRank(data) {
    const bases = [...new Set(data.curves.map((curve) => curve.basis))];
    const part = (basis) => {
      const of = data.curves.filter((curve) => curve.basis === basis);
      const at = of.length === 1 ? "layer " + of[0].layer + ", " : "";
      const says = "Share of the effect by rank, " + at + basis + " basis, step " + data.step + (of.length > 6 ? " (six of " + of.length + " layers)" : "");
      const rows = () => table(says, ["layer", "rank", "share of the effect", "interval"], of.flatMap((curve) => curve.ranks.map((rank, place) =>
        [String(curve.layer), String(rank), shown(curve.fraction.mean[place]), shown(curve.fraction.low[place]) + " to " + shown(curve.fraction.high[place])])));
      const series = of.slice(0, 6).map((curve) => ({ name: "layer " + curve.layer, x: curve.ranks, y: curve.fraction.mean, low: curve.fraction.low, high: curve.fraction.high }));
      return make("div", {}, make("h3", { text: says }), chart(says, "low-rank-" + basis, (place) => charts.curves(place, series, "rank", "share of the effect"), rows));
    };
    // The shift's basis is the alignment subspace proper; the activations' is dominated by what both models share.
    const rest = bases.filter((basis) => basis !== "shift");
    return [...bases.filter((basis) => basis === "shift").map(part),
      ...rest.map((basis) => folded("The " + basis + " basis", () => part(basis), { "data-fold": "basis-" + basis }))];
  }

  function spinal(data) {
    const layers = (values) => values.map((_, layer) => layer);
    const trace = (name, words, unit) => {
      const says = words + ", step " + data.step + " (terminal block: layers " + data.terminal_layers[0] + " to " + data.terminal_layers[data.terminal_layers.length - 1] + ")";
      const series = [
        { name: "policy", x: layers(data.policy[name]), y: data.policy[name] },
        { name: "reference", x: layers(data.reference[name]), y: data.reference[name], dashed: true },
      ];
      const rows = () => table(says, ["layer", "policy", "reference"], data.policy[name].map((value, layer) => [String(layer), shown(value), shown(data.reference[name][layer])]));
      return make("div", {}, make("h3", { text: says }), chart(says, "spinal-" + name, (place) => charts.curves(place, series, "layer", unit), rows));
    };
    const says = data.title;
    const rows = () => table(says, ["step", "Δalign", "coherence", "reference"], data.steps.map((step, at) =>
      [String(step), shown(data.delta_align[at]), shown(data.coherence[at]), shown(data.reference_coherence[at])]));
    const over = [{ name: "Δalign", x: data.steps, y: data.delta_align }, { name: "coherence", x: data.steps, y: data.coherence }];
    return [make("h3", { text: "Over steps" }), chart(says, "spinal-steps", (place) => charts.curves(place, over, "step", ""), rows),
      make("div", { class: "side-by-side" }, trace("contraction", "Contraction by layer", "slope"), trace("transport", "Transport by layer", "radians"))];
  }

  function failures(run) {
    if (!run.failures.length) return null;
    return folded("Audits that broke: " + run.failures.length, () => table("Audits that broke", ["step", "time", "error"], run.failures),
      { "data-fold": "failures", open: run.status.word === "BLIND" || run.status.blind ? "" : null });
  }

  // --- the page -------------------------------------------------------------------------------------------------------

  /* What follows the system's theme is the page that is shown now; those before it are gone. */
  let followSystem = () => {};
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => followSystem());

  function themeButton(redrawAll) {
    const root = document.documentElement;
    const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    const button = make("button", { type: "button", class: "theme" });
    const say = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", "Show the page " + (dark() ? "light" : "dark")); };
    button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; say(); redrawAll(); });
    followSystem = () => { say(); redrawAll(); };
    say();
    return button;
  }

  /* Charts listen to the window until they are let go of. */
  function clear(root) {
    root.querySelectorAll(".js-plotly-plot").forEach((place) => Plotly.purge(place));
  }

  function render(root, data) {
    if (data.format !== FORMAT) {
      root.replaceChildren(make("p", { text: "This page was made by another version of align_audit (format " + data.format + ", expected " + FORMAT + ")." }));
      return;
    }
    const show = (place) => {
      counted = 0;
      const set = data.sets[place];
      const controls = make("div", { class: "page-controls" });
      if (data.sets.length > 1) {
        const select = make("select", { id: "probe-set" }, ...data.sets.map((each, at) =>
          foreign("option", (each.name === null ? "(without a name)" : each.name) + ": " + each.status.word, { value: at })));
        select.value = String(place);
        select.addEventListener("change", () => { show(Number(select.value)); root.querySelector("#probe-set").focus(); });
        controls.append(make("label", { for: "probe-set", text: "Probe pairs " }), select);
      }
      controls.append(themeButton(() => redraw(root)));
      const main = make("main", {}, ...[health(set), alerts(set), texts(set), where(set), more(set), failures(data.run)].flat().filter((part) => part));
      clear(root);
      root.replaceChildren(banner(data.run, set, controls), main);
      document.title = set.status.word + " · " + data.run.name + " · align_audit";
      redraw(root);
    };
    show(0);
  }

  /* A printed page is narrower than a window, and is not laid out yet when this is told: four panels fit a page's width. */
  function printing(root) {
    const theme = document.documentElement.dataset;
    let chosen;
    addEventListener("beforeprint", () => {
      chosen = theme.theme;
      theme.theme = "light";  // paper is white
      redraw(root);
      root.querySelectorAll(".panels .chart.js-plotly-plot").forEach((place) => {
        Plotly.relayout(place, { width: PRINTED, autosize: false });
      });
    });
    addEventListener("afterprint", () => {
      if (chosen === undefined) delete theme.theme; else theme.theme = chosen;
      redraw(root);
    });
  }

  window.AlignAudit = { render, printing, redraw, clear, make, foreign, shown, table, chart, themeButton, written };
})();
