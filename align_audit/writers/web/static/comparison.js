/* Runs beside each other: what comparing them says, how each stands, their curves in the same charts, and where each was changed.
   Runs are called by letters here: a run's name is foreign text, and reaches no chart. */
(function () {
  "use strict";

  const { make, foreign, table, chart, shown, redraw, clear, themeButton, written } = window.AlignAudit;
  const charts = window.AlignAuditCharts;

  /* Of each run the set that is compared: the one of this name, or the only one it has. */
  const setsOf = (sides, name) => sides.map((side) => side.data.sets.find((set) => set.name === name) || side.data.sets[0]);

  function standing(side, set, letter, open) {
    const since = set.status.since === null || set.status.word === "HEALTHY" ? "" : " since step " + set.status.since;
    const probes = set.name === null ? [] : [foreign("p", "Probe pairs: " + set.name)];
    const page = open
      ? [make("p", {}, make("button", { type: "button", class: "open", text: "Open", "aria-label": "Open the page of run " + letter, on: { click: () => open(side.key) } }))]
      : [];
    return make("div", { class: "banner " + set.status.word.toLowerCase() },
      make("h2", {}, letter + " · ", make("span", { class: "word", text: set.status.word + since }), " · ", foreign("bdi", side.name)),
      ...probes, ...set.status.sentences.map((words) => foreign("p", words)), ...page);
  }

  function panels(sets, letters) {
    return sets[0].panels.map((panel) => {
      const there = sets.map((set, at) => ({ panel: set.panels.find((each) => each.key === panel.key), letter: letters[at] }))
        .filter((each) => each.panel);
      const last = there.map((each) => each.panel.steps[each.panel.steps.length - 1]);
      const apart = last.some((step) => step !== last[0]);
      const now = there.map((each, at) => each.letter + " " + each.panel.now + (apart ? " (step " + last[at] + ")" : "")).join(" · ");
      const says = panel.title + ": " + now;
      const series = there.map((each) => ({
        name: each.letter, x: each.panel.steps, y: each.panel.mean, low: each.panel.low, high: each.panel.high,
      }));
      const rows = () => there.map((each) => table(each.letter + ", " + panel.title, ["step", "value", "low", "high"],
        each.panel.steps.map((step, at) => [String(step), ...[each.panel.mean, each.panel.low, each.panel.high].map((values) => shown(values[at], panel.share))])));
      return make("div", { class: "panel" }, make("h3", { text: panel.title }),
        make("p", { class: "now" }, make("span", { class: "pair-of-values", text: now }), make("span", { class: "unit", text: panel.share ? "" : panel.unit })),
        chart(says, "compare-" + panel.key, (place) => charts.curves(place, series, "step", "", panel.share), rows));
    });
  }

  function where(set, letter) {
    const there = set.where;
    if (!there) return make("div", {}, make("h3", { text: letter }), make("p", { text: "Not measured: no full audit has patched the layers yet." }));
    const last = there.steps.length - 1;
    // Shares, where there is a shift to share.
    const shares = there.gain[last].mean.some((value) => typeof value === "number");
    const measure = shares ? { unit: "share", share: true } : { unit: "nats", share: false };
    const series = there[shares ? "gain" : "transplant"][last];
    const what = shares ? "what each layer adds to those below, as a share of the shift" : "what each layer's update does alone";
    const claimed = there.claims[last].length || there.peaks[last] === null ? there.claims[last] : [there.peaks[last]];
    const says = letter + ", step " + there.steps[last] + ": " + what + ". " + there.sentences[last];
    const rows = () => table(letter, ["layer", measure.unit, "low", "high"], series.mean.map((value, layer) => [String(layer), shown(value, shares), shown(series.low[layer], shares), shown(series.high[layer], shares)]));
    return make("div", {}, make("h3", {}, letter + ", step " + there.steps[last]), foreign("p", there.sentences[last], { class: "finding" }),
      make("p", { class: "legend", text: what[0].toUpperCase() + what.slice(1) + ":" }),
      chart(says, "compare-where-" + letter, (place) => charts.layerBars(place, series, measure, claimed), rows));
  }

  /* On a narrow screen a line ends before an interval, and not within. */
  const whole = (words) => words.replace(/\[([^\]]*), /, "[$1,\u00a0");

  /* A table for each place at which the runs meet, with the differences there. */
  function meetings(set) {
    const wide = (each) => each.rows.map((cells) => each.head.map((_, column) => whole(cells[column] || "")));
    const meeting = (each) => make("div", {}, foreign("h3", each.heading),
      ...(each.rows.length ? [table("", each.head, wide(each))] : []), ...each.notes.map((words) => foreign("p", words, { class: "legend" })));
    return [make("div", { class: "side-by-side meetings" }, ...set.tables.map(meeting)), ...set.notes.map((words) => foreign("p", words))];
  }

  function curves(sets, letters) {
    if (!sets.every((set) => set.panels.length)) return [make("p", { text: "Not known: of one of them no audit has come through." })];
    return [make("p", { class: "legend", text: "at each audit: mean and " + sets[0].confidence + " interval · each run's limits stand in its own page" }),
      make("div", { class: "panels" }, ...panels(sets, letters))];
  }

  function controls(sides, said, place, show, root) {
    const node = make("div", { class: "page-controls" });
    const sets = sides[0].data.sets;
    const common = sets.map((set, at) => ({ set, at })).filter((each) => said.sets.some((compared) => compared.name === each.set.name));
    if (common.length > 1) {
      const select = make("select", { id: "probe-set" }, ...common.map((each) =>
        foreign("option", each.set.name === null ? "(without a name)" : each.set.name, { value: each.at })));
      select.value = String(place);
      select.addEventListener("change", () => { show(Number(select.value)); root.querySelector("#probe-set").focus(); });
      node.append(make("label", { for: "probe-set", text: "Probe pairs " }), select);
    }
    node.append(themeButton(() => redraw(root)));
    return node;
  }

  /* The set that is shown first: of those compared the one that the first run is worst off on. */
  function worst(sides, said) {
    return Math.max(sides[0].data.sets.findIndex((set) => said.sets.some((each) => each.name === set.name)), 0);
  }

  /* Draws it; `said` is what comparing them says. `open` shows the page of one run, where it can be shown; `when` is when the page
     was written, of one that stays as it is. */
  function render(root, sides, said, { open, when } = {}) {
    const part = (title, ...children) => make("section", { "aria-label": title }, make("h2", { text: title }), ...children);
    const show = (place) => {
      const name = sides[0].data.sets[place].name;
      const compared = said.sets.find((each) => each.name === name) || said.sets[0];
      const sets = setsOf(sides, name);
      const sentence = compared ? compared.sentence : "They cannot be compared: " + said.reason;
      const header = make("header", { class: "sentence", role: "banner" },
        make("div", { class: "inner" }, controls(sides, said, place, show, root), foreign("h1", sentence, { class: "finding" }),
          when ? make("p", { class: "legend" }, written(when)) : null));
      clear(root);
      root.replaceChildren(header,
        make("div", { class: "standings" }, ...sides.map((side, at) => standing(side, sets[at], said.names[at], open))),
        make("main", {}, ...(compared ? [part("Side by side", ...meetings(compared))] : []),
          part("Is the model all right?", ...curves(sets, said.names)),
          part("Where?", make("div", { class: "side-by-side" }, ...sets.map((set, at) => where(set, said.names[at]))))));
      document.title = "Comparison · align_audit";
      redraw(root);
    };
    show(worst(sides, said));
  }

  window.AlignAuditComparison = { render };
})();
