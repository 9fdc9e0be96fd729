/* Charts of one run: series in, plotly figures drawn. No text of a run comes here; plotly reads tags in its labels. */
(function () {
  "use strict";

  const CONFIG = { displayModeBar: false, responsive: true, displaylogo: false, showTips: false };
  const FONT = 12;

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    return {
      ink: read("--ink"), faint: read("--faint"), grid: read("--grid"), page: read("--page"), line: read("--line"),
      band: read("--band"), warning: read("--limit-warning"), error: read("--limit-error"), alarm: read("--alarm"),
      low: read("--low"), middle: read("--middle"), high: read("--high"), second: read("--second"),
    };
  }

  function layout(more) {
    const c = colours();
    const axis = {
      gridcolor: c.grid, linecolor: c.faint, zerolinecolor: c.faint, zerolinewidth: 1, fixedrange: true, automargin: true,
      tickfont: { color: c.ink, size: FONT }, title: { font: { color: c.ink, size: FONT } }, nticks: 5,
    };
    const merged = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
      font: { family: "system-ui, sans-serif", color: c.ink, size: FONT }, margin: { l: 44, r: 10, t: 10, b: 34 },
      hoverlabel: { bgcolor: c.page, bordercolor: c.faint, font: { color: c.ink, size: FONT } },
      ...more,
    };
    merged.xaxis = { ...axis, ...(more.xaxis || {}) };
    merged.yaxis = { ...axis, ...(more.yaxis || {}) };
    return merged;
  }

  function draw(place, traces, arrangement) {
    place.draw = () => draw(place, traces, arrangement);
    const [drawn, arranged] = [traces(colours()), layout(arrangement(colours()))];
    return Plotly.react(place, drawn, arranged, CONFIG);
  }

  const known = (value) => value !== null && value !== undefined;

  /* The band of an interval: stretches in which both ends are known. */
  function bands(steps, low, high, colour) {
    const traces = [];
    let stretch = [];
    const close = () => {
      if (stretch.length > 1) {
        const back = stretch.slice().reverse();
        traces.push({
          x: stretch.map((at) => steps[at]).concat(back.map((at) => steps[at])),
          y: stretch.map((at) => high[at]).concat(back.map((at) => low[at])),
          fill: "toself", fillcolor: colour, line: { width: 0 }, mode: "lines", hoverinfo: "skip",
        });
      }
      stretch = [];
    };
    steps.forEach((step, at) => (known(low[at]) && known(high[at]) ? stretch.push(at) : close()));
    close();
    return traces;
  }

  function hoverOf(value, low, high, share) {
    const nearAnEnd = (each) => (0 < each && each < 0.005) || (0.995 <= each && each < 1);
    const percent = (each) => (nearAnEnd(each) ? Math.min(Math.max(each * 100, 0.1), 99.9).toFixed(1) : (each * 100).toFixed(0)) + " %";
    const words = (each) => (share ? percent(each) : Number(each.toPrecision(3)).toString());
    if (!known(value)) return "not known";
    return words(value) + (known(low) && known(high) ? " (" + words(low) + " to " + words(high) + ")" : "");
  }

  /* What a curve passes at and between its audits: [step, values]. */
  function alongTheCurve(panel) {
    const at = (place) => [panel.mean[place], panel.low[place], panel.high[place]];
    const between = (place, part) => at(place).map((value, k) => (known(value) && known(at(place + 1)[k]) ? value + part * (at(place + 1)[k] - value) : null));
    return panel.steps.flatMap((step, place) => {
      const next = panel.steps[place + 1];
      const parts = next === undefined ? [] : [0.25, 0.5, 0.75];
      return [[step, at(place).filter(known)], ...parts.map((part) => [step + part * (next - step), between(place, part).filter(known)])];
    });
  }

  /* Where the words of a limit hide no data: at the right and on its worse side, unless the curve is there. */
  function freePlace(panel, y, share) {
    const [first, last] = stepRange(panel.steps);
    const height = 0.07 * (panel.reach[1] - panel.reach[0]);
    const worse = panel.worse === "above" ? 1 : -1;
    const places = [[1, worse], [1, -worse], [0, worse], [0, -worse]].map(([end, side]) => {
      const centre = y + side * height;
      const near = alongTheCurve(panel).flatMap(([step, values]) => {
        const along = (step - first) / (last - first);
        const under = end ? along >= 1 - share : along <= share;
        return under ? values : [];
      });
      return { end, side, room: Math.min(Infinity, ...near.map((value) => Math.abs(value - centre))) };
    });
    return places.find((place) => place.room >= 1.2 * height) || places.reduce((best, place) => (place.room > best.room ? place : best));
  }

  /* Dashed limits with their level in words; two that lie close together share a line of text. */
  function limits(panel, c) {
    const [bottom, top] = panel.reach;
    const shapes = [], notes = [];
    const close = panel.limits.length === 2 && Math.abs(panel.limits[0].value - panel.limits[1].value) < 0.16 * (top - bottom);
    panel.limits.forEach((limit) => {
      const colour = limit.level === "error" ? c.error : c.warning;
      shapes.push({
        type: "line", xref: "paper", x0: 0, x1: 1, y0: limit.value, y1: limit.value,
        line: { color: colour, width: 1.5, dash: limit.level === "error" ? "9px,4px" : "4px,4px" }, layer: "between",
      });
      if (close && limit.level === "warning") return;
      const words = close
        ? panel.limits.map((each) => each.level + " " + each.says).join(" · ")
        : limit.level + " " + limit.says;
      const place = freePlace(panel, limit.value, close ? 0.75 : 0.42);
      notes.push({
        xref: "paper", x: place.end, xanchor: place.end ? "right" : "left", y: limit.value, yanchor: place.side > 0 ? "bottom" : "top",
        text: words, showarrow: false, font: { size: 11, color: c.ink }, bgcolor: c.page, opacity: 0.85, borderpad: 0,
      });
    });
    return { shapes, notes };
  }

  /* Said in a chart that has nothing to draw: an empty one looks broken. */
  function emptyNote(values, c) {
    return values.some(known) ? [] : [{
      xref: "paper", yref: "paper", x: 0.5, y: 0.98, yanchor: "top", xanchor: "center", text: "not known", showarrow: false, font: { size: 14, color: c.soft },
    }];
  }

  function healthPanel(place, panel, firstError) {
    const many = panel.steps.length > 40;
    const traces = (c) => [
      ...bands(panel.steps, panel.low, panel.high, c.band),
      ...(panel.reference ? [{
        x: panel.steps, y: panel.reference, mode: "lines", line: { color: c.faint, width: 2, dash: "dot" }, hoverinfo: "skip",
      }] : []),
      {
        x: panel.steps, y: panel.mean, mode: many ? "lines" : "lines+markers", connectgaps: false,
        line: { color: c.line, width: 2.5 }, marker: { size: 7, color: c.line },
        // A band of one audit has no width.
        error_y: panel.steps.length === 1 ? errorBars(panel, c.line) : undefined,
        text: panel.mean.map((value, at) => hoverOf(value, panel.low[at], panel.high[at], panel.share)),
        hovertemplate: "step %{x}: %{text}<extra></extra>",
      },
    ];
    return draw(place, traces, (c) => {
      const marks = limits(panel, c);
      if (known(firstError)) {
        marks.shapes.push({
          type: "line", x0: firstError, x1: firstError, yref: "paper", y0: 0, y1: 1, line: { color: c.alarm, width: 1.5 },
        });
      }
      return {
        shapes: marks.shapes, annotations: marks.notes.concat(emptyNote(panel.mean, c)), margin: { l: 46, r: 8, t: 6, b: 36 },
        xaxis: { title: { text: "step", standoff: 4 }, range: stepRange(panel.steps), zeroline: false, ...ticksOf(panel.steps) },
        yaxis: { range: panel.reach, tickformat: panel.share ? ".0%" : "", nticks: 5 },
      };
    });
  }

  function stepRange(steps) {
    const [first, last] = [Math.min(...steps), Math.max(...steps)];
    const room = 0.04 * (last - first) || 1;
    return [first - room, last + room];
  }

  /* Steps are whole numbers. */
  const ticksOf = (steps) => (Math.max(...steps) - Math.min(...steps) < 5 ? { tickvals: [...new Set(steps)] } : {});

  /* What the trainer logged: thin and grey. */
  function trainingCurve(place, curve, steps) {
    return draw(place, (c) => [{
      x: curve.steps, y: curve.values, mode: curve.steps.length > 1 ? "lines" : "markers",
      line: { color: c.faint, width: 1.5 }, marker: { size: 5, color: c.faint },
      hovertemplate: "step %{x}: %{y:.3g}<extra></extra>",
    }], () => ({
      margin: { l: 46, r: 8, t: 6, b: 34 }, yaxis: { rangemode: "tozero", nticks: 4 },
      xaxis: { title: { text: "step", standoff: 4 }, range: stepRange(steps.concat(curve.steps)), zeroline: false },
    }));
  }

  function scale(c) {
    return [[0, c.low], [0.5, c.middle], [1, c.high]];
  }

  function largest(rows) {
    // Of so many audits the values are more than a call takes arguments.
    const sizes = rows.flat().filter(known).map(Math.abs);
    return sizes.length ? sizes.reduce((most, size) => Math.max(most, size), 1e-9) : 1;
  }

  /* Layers over full audits; the chosen audit has a frame. */
  function layerMap(place, where, measure, at) {
    const audits = where[measure.key];
    const layers = Array.from({ length: where.layers }, (_, layer) => layer);
    const pick = (end) => layers.map((layer) => audits.map((audit) => (known(audit[end][layer]) ? audit[end][layer] : null)));
    const mean = pick("mean"), low = pick("low"), high = pick("high");
    const size = largest(mean);
    const hover = mean.map((line, layer) => line.map((value, audit) =>
      hoverOf(value, low[layer][audit], high[layer][audit], measure.share) + (measure.share || !known(value) ? "" : " nats")));
    const every = Math.ceil(where.steps.length / (place.clientWidth < 500 ? 6 : 12));
    const ticks = where.steps.map((_, audit) => audit).filter((audit) => audit % every === 0);
    return draw(place, (c) => [{
      type: "heatmap", x: where.steps.map((_, audit) => audit), y: layers, z: mean, text: hover, zmin: -size, zmax: size, xgap: 1,
      ygap: 1, colorscale: scale(c), hoverongaps: false, customdata: layers.map(() => where.steps),
      hovertemplate: "layer %{y}, step %{customdata}: %{text}<extra></extra>",
      colorbar: {
        thickness: 12, len: 1, outlinewidth: 0, tickfont: { color: c.ink, size: FONT }, nticks: 5,
        tickformat: measure.share ? ".0%" : "", title: { text: measure.unit, side: "right", font: { color: c.ink, size: FONT } },
      },
    }], (c) => ({
      margin: { l: 46, r: 4, t: 8, b: 40 },
      xaxis: {
        title: { text: "step", standoff: 4 }, tickvals: ticks, ticktext: ticks.map((audit) => String(where.steps[audit])), showgrid: false,
        zeroline: false, range: [-0.5, where.steps.length - 0.5],
      },
      yaxis: { title: { text: "layer" }, showgrid: false, zeroline: false, nticks: 9, tickformat: "d", range: [-0.5, where.layers - 0.5] },
      annotations: emptyNote(mean.flat(), c),
      shapes: [{ type: "rect", x0: at - 0.5, x1: at + 0.5, y0: -0.5, y1: where.layers - 0.5, line: { color: c.ink, width: 2 } }],
    }));
  }

  function errorBars(series, colour) {
    const span = (end, sign) => series.mean.map((value, at) => (known(value) && known(series[end][at]) ? sign * (series[end][at] - value) : 0));
    return { type: "data", symmetric: false, array: span("high", 1), arrayminus: span("low", -1), color: colour, thickness: 1.2, width: 0 };
  }

  /* The layers of one audit. */
  function layerBars(place, series, measure, marked, at) {
    const layers = at || series.mean.map((_, layer) => layer);
    return draw(place, (c) => [{
      type: "bar", x: layers, y: series.mean, error_y: errorBars(series, c.ink),
      marker: { color: layers.map((layer) => (marked.includes(layer) ? c.line : c.second)) },
      text: series.mean.map((value, place) => hoverOf(value, series.low[place], series.high[place], measure.share)),
      textposition: "none", hovertemplate: "layer %{x}: %{text}<extra></extra>",
    }], (c) => ({
      annotations: emptyNote(series.mean, c), margin: { l: 50, r: 8, t: 8, b: 40 }, bargap: 0.2,
      xaxis: { title: { text: "layer", standoff: 4 }, showgrid: false, zeroline: false, tickformat: "d", nticks: 12 },
      yaxis: { title: { text: measure.unit }, tickformat: measure.share ? ".0%" : "", rangemode: "tozero" },
    }));
  }

  /* A finer site: heads as a map of layers and heads, anything else as bars. */
  function siteChart(place, site) {
    const series = site.sufficiency;
    if (!site.heads) {
      return layerBars(place, series, { unit: "nats", share: false }, [], site.layers);
    }
    const size = largest([series.mean]);
    return draw(place, (c) => [{
      type: "heatmap", x: site.heads, y: site.layers, z: series.mean, zmin: -size, zmax: size, colorscale: scale(c), xgap: 1, ygap: 1,
      text: series.mean.map((value, at) => hoverOf(value, series.low[at], series.high[at], false)), hoverongaps: false,
      hovertemplate: "layer %{y}, head %{x}: %{text} nats<extra></extra>",
      colorbar: { thickness: 12, outlinewidth: 0, tickfont: { color: c.ink, size: FONT }, nticks: 5 },
    }], () => ({
      xaxis: { title: { text: "head", standoff: 4 }, showgrid: false, zeroline: false, tickformat: "d" },
      yaxis: { title: { text: "layer" }, showgrid: false, zeroline: false, tickformat: "d" },
    }));
  }

  /* Several curves with a legend; names are ours. */
  function curves(place, series, x, y, share) {
    return draw(place, (c) => {
      const palette = [c.line, c.error, c.second, c.warning, c.ink, c.faint];
      return series.map((each, at) => ({
        name: each.name, x: each.x, y: each.y, mode: "lines+markers", connectgaps: false,
        line: { color: palette[at % palette.length], width: 2, dash: each.dashed ? "dot" : "solid" },
        error_y: each.low ? errorBars({ mean: each.y, low: each.low, high: each.high }, palette[at % palette.length]) : undefined,
        marker: { size: 6, symbol: ["circle", "square", "diamond", "cross", "x", "triangle-up"][at % 6] },
        hovertemplate: x + " %{x}: %{y:" + (share ? ".1%" : ".3g") + "}<extra></extra>",
      }));
    }, (c) => ({
      showlegend: series.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: c.ink, size: FONT } },
      margin: { l: 50, r: 8, t: series.length > 1 ? 34 : 8, b: 40 },
      xaxis: { title: { text: x, standoff: 4 }, zeroline: false, nticks: 9 }, yaxis: { title: { text: y }, tickformat: share ? ".0%" : "" },
    }));
  }

  window.AlignAuditCharts = { healthPanel, trainingCurve, layerMap, layerBars, siteChart, curves, hoverOf };
})();
