"use strict";
// Draws the charts and tables of a page when they come into sight. Text goes into the page as text, never as HTML.
(() => {
  const ROWS_AT_FIRST = 200;
  const FEW = 8; // rows or names that need no filter
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  const make = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in element) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };

  const inflate = (id) => {
    const coded = atob(document.getElementById(id).textContent);
    const bytes = new Uint8Array(coded.length);
    for (let i = 0; i < coded.length; i++) bytes[i] = coded.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };

  let library; // plotly, a promise once the first chart is in sight
  const plotly = () =>
    (library ??= inflate("plotly").then((code) => {
      document.head.append(make("script", { textContent: code }));
      return window.Plotly;
    }));

  const number = (value) => {
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const small = Math.abs(value) < 1e-4 || Math.abs(value) >= 1e7;
    return small ? value.toExponential(3) : String(Number(value.toPrecision(5)));
  };
  const filterBox = (what, of) =>
    make("input", { type: "search", placeholder: `Filter ${what}`, "aria-label": `Filter ${what} of ${of}` });
  const shown = (value) => (value === null ? "" : typeof value === "number" ? number(value) : String(value));
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });

  // tables

  function drawTable(box, { title, columns, rows }) {
    const strings = rows.map((row) => row.map(shown).join("\t").toLowerCase());
    const numeric = columns.map((_, c) => rows.every((row) => row[c] === null || typeof row[c] === "number"));
    let sorted = { column: -1, way: 1 };
    let limit = ROWS_AT_FIRST;
    const filter = filterBox("rows", title);
    const count = make("output");
    const more = make("button", { type: "button" });
    const body = make("tbody");
    const heads = columns.map((name, c) => {
      const button = make("button", { type: "button", textContent: name });
      button.addEventListener("click", () => {
        const next = sorted.column !== c ? 1 : sorted.way === 1 ? -1 : 0; // up, down, as given
        sorted = next ? { column: c, way: next } : { column: -1, way: 1 };
        fill();
      });
      return make("th", { scope: "col", className: numeric[c] ? "number" : "" }, button);
    });

    function fill() {
      const { column, way } = sorted;
      const wanted = filter.value.toLowerCase();
      const kept = rows.map((_, r) => r).filter((r) => strings[r].includes(wanted));
      if (column >= 0)
        kept.sort((p, q) => {
          const [a, b] = [rows[p][column], rows[q][column]];
          if (a === null || b === null) return (a === null) - (b === null); // empty cells last, either way
          return way * compare(a, b) || p - q;
        });
      heads.forEach((head, c) => {
        head.setAttribute("aria-sort", c !== column ? "none" : way === 1 ? "ascending" : "descending");
      });
      body.replaceChildren(
        ...kept.slice(0, limit).map((r) =>
          make("tr", {}, ...rows[r].map((value, c) => {
            const cell = make(c ? "td" : "th", { textContent: shown(value), className: numeric[c] ? "number" : "" });
            if (!c) cell.scope = "row";
            return cell;
          })),
        ),
      );
      count.textContent = kept.length === rows.length ? `${rows.length} rows` : `${kept.length} of ${rows.length} rows`;
      more.hidden = kept.length <= limit;
      more.textContent = `Show all ${kept.length} rows`;
    }

    filter.addEventListener("input", fill);
    more.addEventListener("click", () => {
      limit = Infinity;
      fill();
    });
    const caption = make("caption", { textContent: title });
    const table = make("table", {}, caption, make("thead", {}, make("tr", {}, ...heads)), body);
    const scroll = make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": title }, table);
    if (rows.length > FEW) box.append(make("div", { className: "tools" }, filter, count));
    box.append(scroll, more);
    fill();
  }

  // charts

  // Plotly reads a little HTML in texts: names are shown as they are.
  const plain = (text) => text.replace(/[&<>$]/g, (c) => `&#${c.charCodeAt(0)};`); // "$": no formula either
  const short = (text, room) => (text.length <= room ? text : "\u2026" + text.slice(1 - room));
  const drawn = new Map(); // box -> redraw

  // What of a chart is shown: names that contain `text`, by size if `bySize`.
  function selected(chart, text, bySize) {
    const has = (name) => String(name).toLowerCase().includes(text.toLowerCase());
    let { x, series } = chart;
    if (chart.kind === "heatmap" || !chart.named) {
      series = series.filter(([name]) => has(name));
      const mean = (values) => values.reduce((sum, v) => sum + (v ?? 0), 0) / (values.length || 1);
      if (bySize) series.sort((a, b) => mean(b[1]) - mean(a[1]));
    } else {
      const kept = x.map((_, i) => i).filter((i) => has(x[i]));
      const first = series[0][1];
      if (bySize) kept.sort((i, j) => (first[j] ?? -Infinity) - (first[i] ?? -Infinity) || i - j);
      x = kept.map((i) => x[i]);
      series = series.map(([name, values]) => [name, kept.map((i) => values[i])]);
    }
    return { ...chart, x, series };
  }

  // Names along an axis, where the range from..to has room for `most` of them.
  function nameTicks(names, from, to, most, room) {
    const [first, last] = [Math.max(0, Math.ceil(from)), Math.min(names.length - 1, Math.floor(to))];
    const step = Math.max(1, Math.ceil((last - first + 1) / most));
    const at = [];
    for (let i = first; i <= last; i += step) at.push(i);
    return { tickmode: "array", tickvals: at, ticktext: at.map((i) => plain(short(String(names[i]), room))) };
  }

  function axisTicks(view, width, height, ranges = {}) {
    const room = width < 600 ? 14 : 34;
    const axes = {};
    const [left, right] = ranges.x ?? [0, view.x.length - 1];
    const [low, high] = [...(ranges.y ?? [0, view.series.length - 1])].sort((a, b) => a - b); // the axis runs down
    if (view.named) axes.x = nameTicks(view.x, left, right, width / 26, room);
    if (view.kind === "heatmap") axes.y = nameTicks(view.series.map(([name]) => name), low, high, height / 18, room);
    return axes;
  }

  function traces(view) {
    const at = view.named ? view.x.map((_, i) => i) : view.x;
    const places = view.x.map((place) => plain(shown(place)));
    const [xLabel, yLabel] = [plain(view.x_label), plain(view.y_label)];
    if (view.kind === "heatmap") {
      const height = (v) => (!view.log_y ? v : v > 0 ? Math.log10(v) : null);
      const z = view.series.map(([, values]) => values.map(height));
      const customdata = view.series.map(([name, values]) => values.map((v, i) => [places[i], plain(name), shown(v)]));
      const hovertemplate = "%{customdata[1]}<br>%{customdata[0]}<br>%{customdata[2]}<extra></extra>";
      const ticks = view.log_y ? { tickprefix: "10<sup>", ticksuffix: "</sup>" } : {};
      const colorbar = { thickness: 12, outlinewidth: 0, ...ticks };
      const y = view.series.map((_, i) => i);
      return [{ type: "heatmap", x: at, y, z, customdata, hovertemplate, colorscale: "Viridis", colorbar }];
    }
    return view.series.map(([name, values], s) => {
      const color = view.colours[s % view.colours.length];
      const y = view.log_y ? values.map((v) => (v > 0 ? v : null)) : values;
      const customdata = values.map((v, i) => [places[i], shown(v)]);
      const hovertemplate = `${xLabel}: %{customdata[0]}<br>${yLabel}: %{customdata[1]}<extra>${plain(name)}</extra>`;
      const common = { name: plain(name), x: at, y, customdata, hovertemplate };
      if (view.kind === "bar" || view.kind === "histogram") return { ...common, type: "bar", marker: { color } };
      const mode = view.kind === "line" ? "lines+markers" : "markers";
      const marker = { size: view.kind === "line" ? 4 : 6, color };
      return { ...common, type: "scatter", mode, line: { width: 1.5, color }, marker };
    });
  }

  function layout(view, width) {
    const map = view.kind === "heatmap";
    const height = map ? Math.min(720, Math.max(240, 130 + 20 * view.series.length)) : 360;
    const { x = {}, y = {} } = axisTicks(view, width, height);
    const axis = { automargin: true, gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line") };
    const clear = "rgba(0,0,0,0)";
    return {
      height,
      margin: { l: 48, r: 12, t: 12, b: 44 },
      paper_bgcolor: clear,
      plot_bgcolor: clear,
      font: { family: "system-ui, sans-serif", size: 12, color: css("--ink") },
      hoverlabel: { align: "left", namelength: -1 },
      hovermode: "closest",
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
      bargap: view.kind === "histogram" ? 0 : 0.2,
      showlegend: !map && view.series.length > 1,
      legend: { orientation: "h", yanchor: "bottom", y: 1.02, x: 0 },
      xaxis: {
        ...axis,
        ...x,
        title: { text: plain(view.x_label) },
        ...(view.named ? { range: [-0.5, view.x.length - 0.5] } : {}),
      },
      yaxis: {
        ...axis,
        ...y,
        title: { text: plain(view.y_label) },
        ...(map ? { autorange: "reversed" } : view.log_y ? { type: "log", exponentformat: "power" } : {}),
      },
    };
  }

  async function drawChart(box, chart) {
    const Plotly = await plotly();
    const [plot, said, values] = [".plot", ".said", "details"].map((part) => box.querySelector(part));
    const filter = filterBox("names", chart.title);
    const bySize = make("input", { type: "checkbox" });
    const names = chart.kind === "heatmap" || !chart.named ? chart.series.map(([name]) => name) : chart.x;
    if (names.length > FEW) {
      const sortable = chart.named && chart.kind !== "line";
      const order = sortable ? [make("label", {}, bySize, " largest first")] : [];
      plot.before(make("div", { className: "tools" }, filter, ...order));
    }
    let view = chart;
    let place = [0, 0]; // [series, point] of the keyboard

    async function draw() {
      view = selected(chart, filter.value, bySize.checked);
      const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
      await Plotly.react(plot, traces(view), layout(view, plot.clientWidth), options);
    }

    function ticksInSight() {
      const full = plot._fullLayout;
      const { x, y } = axisTicks(view, plot.clientWidth, full.height, { x: full.xaxis.range, y: full.yaxis.range });
      const change = {};
      if (x) Object.assign(change, { "xaxis.tickvals": x.tickvals, "xaxis.ticktext": x.ticktext });
      if (y) Object.assign(change, { "yaxis.tickvals": y.tickvals, "yaxis.ticktext": y.ticktext });
      if (x || y) Plotly.relayout(plot, change);
    }

    function step(event) {
      const way = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!way || !view.series.length || !view.x.length) return;
      event.preventDefault();
      const held = (value, size) => Math.min(Math.max(value, 0), size - 1);
      place = [held(place[0] + way[0], view.series.length), held(place[1] + way[1], view.x.length)];
      const [s, p] = place;
      const map = view.kind === "heatmap"; // one trace, its points by row and column
      Plotly.Fx.hover(plot, [{ curveNumber: map ? 0 : s, pointNumber: map ? [s, p] : p }]);
      const [name, numbers] = view.series[s];
      said.textContent = `${name}, ${shown(view.x[p])}: ${numbers[p] === null ? "no value" : shown(numbers[p])}`;
    }

    await draw();
    plot.style.minHeight = 0; // the room that was kept for it
    plot.on("plotly_relayout", (change) => {
      if (Object.keys(change).some((key) => /axis\.(range|autorange)/.test(key))) ticksInSight();
    });
    plot.addEventListener("keydown", step);
    filter.addEventListener("input", draw);
    bySize.addEventListener("change", draw);
    values.addEventListener("toggle", () => {
      if (!values.open || values.querySelector("table")) return;
      const across = [chart.x_label, ...chart.series.map(([name]) => name)];
      const rows = chart.x.map((at, i) => [at, ...chart.series.map(([, numbers]) => numbers[i])]);
      drawTable(values, { title: `Values of ${chart.title}`, columns: across, rows });
    });
    drawn.set(box, draw);
  }

  // the page

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const kept = { get: () => null, set: () => {} };
  try {
    const store = window.localStorage; // forbidden for files in some browsers
    Object.assign(kept, { get: () => store.getItem("theme"), set: (value) => store.setItem("theme", value) });
  } catch {}

  // Charts of closed sections have no size: they are drawn again when their section is opened.
  function redraw(within) {
    for (const [box, draw] of drawn) if (within.contains(box) && box.offsetParent) draw();
  }

  function themed() {
    button.textContent = isDark() ? "Light theme" : "Dark theme";
    redraw(document);
  }

  function openTarget() {
    const target = document.getElementById(location.hash.slice(1));
    if (target?.tagName === "DETAILS") target.open = true;
  }

  async function start() {
    if (["light", "dark"].includes(kept.get())) root.dataset.theme = kept.get();
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      kept.set(root.dataset.theme);
      themed();
    });
    dark.addEventListener("change", themed);
    themed();
    addEventListener("hashchange", openTarget);
    openTarget();
    const { charts, tables, colours } = JSON.parse(await inflate("data"));
    const observer = new IntersectionObserver(
      (entries) => {
        for (const { target, isIntersecting } of entries) {
          if (!isIntersecting) continue;
          observer.unobserve(target);
          if (target.matches("figure")) drawChart(target, { ...charts[target.dataset.number], colours });
          else drawTable(target, tables[target.dataset.number]);
        }
      },
      { rootMargin: "400px" },
    );
    document.querySelectorAll("section > details").forEach((section) => {
      section.addEventListener("toggle", () => redraw(section));
    });
    document.querySelectorAll("figure, .table").forEach((box) => observer.observe(box));
  }

  if (window.DecompressionStream) start();
  else {
    const textContent = "The charts and tables need a browser of 2023 or later.";
    document.querySelector("main").prepend(make("p", { className: "missing", textContent }));
  }
})();
