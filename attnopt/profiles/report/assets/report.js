"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const SCALE = "Viridis";

  const layout = (more) => ({
    paper_bgcolor: colour("--paper"),
    plot_bgcolor: colour("--paper"),
    font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 60, r: 20, t: 16, b: 48 },
    ...more,
  });
  const axis = (title, more) => ({
    title: { text: title }, exponentformat: "e", gridcolor: colour("--line"), zerolinecolor: colour("--line"), ...more,
  });
  const places = (count) => ({ dtick: Math.max(1, Math.ceil(count / 24)), tick0: 0 });
  const options = (select, entries) => {
    for (const [value, text] of entries) select.add(new Option(text, value));
  };
  const plain = (value) => (value === null ? "-" : Number(value).toPrecision(4));

  // Attention maps: bytes are 255 sqrt(mass / largest).
  const drawPicture = (canvas, key) => {
    const picture = data.pictures[key];
    if (!picture) return false;
    const [side, encoded] = picture;
    const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d");
    const image = context.createImageData(side, side);
    const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
    for (let i = 0; i < bytes.length; i++) {
      const place = (bytes[i] / 255) * (stops.length - 1);
      const left = Math.min(Math.floor(place), stops.length - 2);
      for (let c = 0; c < 3; c++) {
        image.data[4 * i + c] = stops[left][c] + (stops[left + 1][c] - stops[left][c]) * (place - left);
      }
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return true;
  };

  const drawHeads = () => {
    const metric = data.heads[byId("head-metric").value];
    const kind = metric.unit === "kv_head" ? "KV head" : "head";
    byId("head-help").textContent =
      `${metric.help}${metric.direction === "high_keep" ? "; high argues for keeping" : ""} (${metric.source})`;
    const text = metric.values.map((row, layer) => row.map((value, head) => {
      const spread = metric.prompts ? ` ± ${plain(metric.spread[layer][head])} over ${metric.prompts}` : "";
      return `${data.sites[layer].fqn}<br>layer ${layer}, ${kind} ${head}<br>${metric.name} ${plain(value)}${spread}`;
    }));
    const trace = {
      type: "heatmap", z: metric.values, text, hovertemplate: "%{text}<extra></extra>", colorscale: SCALE, xgap: 1, ygap: 1,
    };
    const height = Math.max(320, Math.min(900, 110 + 18 * metric.values.length));
    Plotly.react("heads", [trace], layout({
      height, xaxis: axis(kind, { ...places(metric.values[0].length), showgrid: false }),
      yaxis: axis("layer", { autorange: "reversed", ...places(metric.values.length), showgrid: false }),
    }), config);
  };
  const showHead = (layer, head) => {
    const metric = data.heads[byId("head-metric").value];
    const site = data.sites[layer];
    const first = metric.unit === "kv_head" ? head * (site.heads / site.kv_heads) : head;
    const drawn = drawPicture(byId("picture"), `${layer}.${first}`);
    byId("picture-caption").textContent = drawn ? `layer ${layer}, head ${first}` : "no map of this head is in the report";
  };

  const drawPairs = () => {
    const metric = data.pairs[byId("pair-metric").value];
    byId("pair-help").textContent = `${metric.help} (${metric.source})`;
    const text = metric.values.map((row, i) => row.map((value, j) =>
      `source ${i}, consumer ${j}<br>${metric.name} ${plain(value)} ± ${plain(metric.spread[i][j])} over ${metric.prompts}`));
    const frame = (x0, x1, y0, y1) => ({
      type: "rect", x0: x0 - 0.5, x1: x1 + 0.5, y0: y0 - 0.5, y1: y1 + 0.5, line: { color: colour("--accent"), width: 3 },
    });
    // One square, or each pair where layers of another kind lie between.
    const shapes = data.groups.flatMap(({ layers }) => {
      const first = layers[0], last = layers[layers.length - 1];
      if (last - first + 1 === layers.length) return [frame(first, last, first, last)];
      return layers.slice(1).map((consumer) => frame(consumer, consumer, first, first));
    });
    // Errors differ by orders of magnitude: their colours follow the logarithm.
    const error = metric.name.includes("error");
    const z = error ? metric.values.map((row) => row.map((v) => (v === null || v <= 0 ? null : Math.log10(v)))) : metric.values;
    const trace = {
      type: "heatmap", z, text, hovertemplate: "%{text}<extra></extra>", colorscale: SCALE, reversescale: error,
      colorbar: error ? { title: { text: "log10" } } : {},
    };
    Plotly.react("pairs", [trace], layout({
      shapes, xaxis: axis("layer (of errors: the consumer)", { constrain: "domain", showgrid: false, ...places(z.length) }),
      yaxis: axis("layer (of errors: the source)", {
        autorange: "reversed", scaleanchor: "x", constrain: "domain", showgrid: false, ...places(z.length),
      }),
    }), config);
  };

  const drawSpectra = () => {
    const spectrum = data.spectra[byId("spectrum-metric").value];
    const kept = Number(byId("energy").value);
    byId("energy-value").textContent = `${(100 * kept).toFixed(1)} %`;
    const traces = spectrum.left.map((left, layer) => ({
      type: "scatter", mode: "lines", name: `layer ${layer}`, x: left.map((_, rank) => rank),
      y: left.map((value) => (value === null ? null : Math.max(value, 1e-6))), line: { width: 1 },
    }));
    const ranks = spectrum.left.map((left) => left.findIndex((value) => value !== null && value <= 1 - kept));
    const known = ranks.filter((rank) => rank >= 0);
    const mean = known.reduce((a, b) => a + b, 0) / Math.max(1, known.length);
    byId("rank-note").textContent = known.length
      ? `rank for ${(100 * kept).toFixed(1)} % of the energy: ${Math.round(mean)} on average, ${Math.max(...known)} at most`
      : "no layer was measured";
    Plotly.react("spectrum", traces, layout({
      showlegend: false, xaxis: axis("rank"), yaxis: axis("energy left", { type: "log" }),
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1 - kept, y1: 1 - kept,
        line: { color: colour("--accent"), dash: "dot" } }],
    }), config);
    Plotly.react("ranks", [{ type: "bar", x: ranks.map((_, layer) => layer), y: ranks.map((r) => (r < 0 ? null : r)),
      hovertemplate: "layer %{x}: rank %{y}<extra></extra>" }],
    layout({ xaxis: axis("layer", places(ranks.length)), yaxis: axis("rank needed") }), config);
  };

  const drawCosts = () => {
    const context = Number(byId("cost-context").value);
    const rows = data.costs.filter((row) => row.context === context);
    const base = rows.find((row) => row.method === "original");
    const body = byId("costs").tBodies[0];
    body.replaceChildren(...rows.map((row) => {
      const line = document.createElement("tr");
      const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "");
      const cells = [row.method, row.cached.toLocaleString("en"), share(row.cached, base.cached),
        row.flops.toLocaleString("en"), share(row.flops, base.flops), row.what];
      cells.forEach((value, index) => {
        const cell = line.insertCell();
        cell.textContent = value;
        if (index >= 1 && index <= 4) cell.className = "number";
      });
      return line;
    }));
  };

  const hideIfEmpty = (id, empty) => { byId(id).hidden = empty; return empty; };
  const draw = () => {
    drawHeads();
    if (data.pairs.length > 0) drawPairs();
    if (Object.keys(data.spectra).length > 0) drawSpectra();
  };

  options(byId("head-metric"), data.heads.map((metric, index) => [index, metric.name]));
  byId("head-metric").addEventListener("change", drawHeads);
  if (!hideIfEmpty("pairs-section", data.pairs.length === 0)) {
    options(byId("pair-metric"), data.pairs.map((metric, index) => [index, metric.name]));
    const preferred = data.pairs.findIndex((metric) => metric.name === "map_correlation_aligned");
    byId("pair-metric").value = Math.max(0, preferred);
    byId("pair-metric").addEventListener("change", drawPairs);
    byId("group-note").textContent = data.groups.length
      ? `Outlined: layers that can share maps, ${data.groups.map((group) => group.named).join("; ")}.`
      : "No layers were found that can share maps.";
  }
  if (!hideIfEmpty("spectra-section", Object.keys(data.spectra).length === 0)) {
    options(byId("spectrum-metric"), Object.entries(data.spectra).map(([name, s]) => [name, `${name}: ${s.help}`]));
    byId("spectrum-metric").addEventListener("change", drawSpectra);
    byId("energy").addEventListener("input", drawSpectra);
  }
  if (!hideIfEmpty("costs-section", data.costs.length === 0)) {
    options(byId("cost-context"), [...new Set(data.costs.map((r) => r.context))].map((n) => [n, n.toLocaleString("en")]));
    byId("cost-context").addEventListener("change", drawCosts);
    drawCosts();
  }
  for (const [pattern, layer, head, value] of data.typical) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    const caption = document.createElement("figcaption");
    caption.textContent = `${pattern}: layer ${layer}, head ${head} (${plain(value)})`;
    figure.append(canvas, caption);
    if (drawPicture(canvas, `${layer}.${head}`)) byId("typical").append(figure);
  }
  if (!hideIfEmpty("absent-section", Object.keys(data.absent).length === 0)) {
    byId("absent").append(...Object.entries(data.absent).map(([name, why]) => {
      const item = document.createElement("li");
      item.textContent = `${name}: ${why}`;
      return item;
    }));
  }
  draw();
  if (data.typical.length > 0 && data.heads[0].unit === "head") showHead(data.typical[0][1], data.typical[0][2]);
  byId("heads").on("plotly_click", (event) => showHead(event.points[0].y, event.points[0].x));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.documentElement.dataset.ready = "yes";
})();
