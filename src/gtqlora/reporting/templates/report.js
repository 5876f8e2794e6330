(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const config = { displayModeBar: false, responsive: true };

  const unpacked = async (id) => {
    const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };

  const coloured = (value, style = getComputedStyle(document.documentElement)) => {
    if (typeof value === "string") {
      const name = /^var\((--[a-z-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
    }
    return value;
  };

  const drawPlots = () => {
    for (const box of all("[data-plot]")) {
      const spec = coloured(JSON.parse(byId(box.dataset.plot).textContent));
      Plotly.react(box, spec.data, spec.layout, config);
    }
  };

  // numbers as the tables have them
  const narrow = "\u202f";
  const told = (form) => (value) => (value === null ? "—" : form(value).replace("-", "−"));
  const fixed = (value) => value.toFixed(1).replace(/^-?0\.0$/, "0").replace(/\.0$/, "");
  const forms = {
    percent: told((value) => fixed(100 * value) + narrow + "%"),
    points: told((value) => fixed(100 * value)),
    number: told((value) => String(Number(value.toPrecision(3)))),
    q: told((value) => (value < 0.001 ? `<${narrow}0.001` : value.toFixed(3))),
  };

  const heatMap = (grid) => {
    const { layers, experts, fields, views, twin } = grid;
    const box = byId("heat-map"), frame = byId("heat-map-box"), panel = byId("expert");
    const spec = JSON.parse(byId("heat-map-spec").textContent);
    const width = experts.length;
    const rows = (values) => layers.map((_, row) => values.slice(row * width, (row + 1) * width));
    const scales = {
      heat: [[0, "var(--heat-low)"], [0.5, "var(--heat-mid)"], [1, "var(--heat-high)"]],
      share: [[0, "var(--share-low)"], [1, "var(--share-high)"]],
    };
    let view = views[0], opener = frame;
    const strength = fields.difference.map(Math.abs);
    let cell = strength.reduce((best, value, i) => (value > strength[best] ? i : best), 0);

    const name = (i) => `Layer ${layers[Math.floor(i / width)]}, expert ${experts[i % width]}`;
    const facts = (i) => {
      const of = (field, form) => forms[form](fields[field][i]);
      const effect = fields.effect[i] === null ? [] : [`effect when ablated alone ${of("effect", "percent")} of the gap`];
      return [
        `flagged ${of("rate_flagged", "percent")}, ${twin} ${of("rate_twin", "percent")}`,
        `difference ${of("difference", "points")} points (${of("low", "points")} to ${of("high", "points")}), q\u00a0${of("q", "q")}`,
        `stability ${of("stability", "percent")}, gradient ${of("gradient", "number")}`,
        ...effect,
      ];
    };
    const texts = rows(fields.difference.map((_, i) => `<b>${name(i)}</b><br>${facts(i).join("<br>")}`));

    const cursor = () => {
      const x = cell % width, y = Math.floor(cell / width);
      const aside = Math.max(0.5, (6 * width) / box.clientWidth); // a frame that is wider than its line
      const around = { type: "rect", x0: x - aside, x1: x + aside, y0: y - 0.5, y1: y + 0.5 };
      const line = (color, width) => ({ ...around, line: { color, width } });
      return coloured([line("var(--card)", 6), line("var(--mark)", 3)]);
    };
    const shapes = () => (document.activeElement === frame || !panel.hidden ? cursor() : []);

    const draw = () => {
      const { data: [heat, ...marks], layout } = spec;
      const shown = { ...heat, z: rows(fields[view.field]), hovertext: texts, colorscale: scales[view.ramp] };
      Object.assign(shown, { zmin: view.ramp === "heat" ? -view.limit : 0, zmax: view.limit });
      const drawn = coloured({ layout, heat: { ...shown, z: 0, hovertext: 0 }, marks });
      Object.assign(drawn.heat, { z: shown.z, hovertext: texts });
      Plotly.react(box, [drawn.heat, ...drawn.marks], { ...drawn.layout, shapes: shapes() }, config);
      byId("ramp").className = `ramp ramp-${view.ramp}`;
      byId("ramp-low").textContent = view.low;
      byId("ramp-high").textContent = view.high;
    };
    const moved = () => Plotly.relayout(box, { shapes: shapes() });

    const point = (i) => {
      cell = i;
      byId("heat-map-read").textContent = `${name(i)}: ${facts(i).join("; ")}.`;
      frame.scrollLeft = ((i % width) / width) * frame.scrollWidth - frame.clientWidth / 2;
      moved();
    };
    const open = (i, from) => {
      opener = from;
      byId("expert-title").textContent = name(i);
      for (const place of all("[data-field]", panel)) {
        place.textContent = forms[place.dataset.form](fields[place.dataset.field][i]);
      }
      const [layer, expert] = [layers[Math.floor(i / width)], experts[i % width]];
      const tested = byId(`tested-${layer}-${expert}`) ?? byId("untested");
      byId("expert-tested").replaceChildren(tested.content.cloneNode(true));
      panel.hidden = false;
      point(i);
      byId("expert-title").focus();
    };
    const close = () => {
      panel.hidden = true;
      opener.focus();
      moved();
    };

    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const edges = { Home: 0, End: width - 1 };
    const within = (value, end) => Math.min(Math.max(value, 0), end - 1);
    frame.addEventListener("keydown", (event) => {
      const [x, y] = [cell % width, Math.floor(cell / width)];
      if (event.key in steps) {
        const [right, up] = steps[event.key];
        point(within(y + up, layers.length) * width + within(x + right, width));
      } else if (event.key in edges) point(y * width + edges[event.key]);
      else if (event.key === "Enter" || event.key === " ") open(cell, frame);
      else return;
      event.preventDefault();
    });
    frame.addEventListener("focus", () => frame.matches(":focus-visible") && point(cell));
    frame.addEventListener("blur", moved);
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !panel.hidden) close();
    });
    byId("expert-close").addEventListener("click", close);
    for (const button of all("button[data-layer]")) {
      const place = layers.indexOf(Number(button.dataset.layer)) * width + experts.indexOf(Number(button.dataset.expert));
      button.addEventListener("click", () => open(place, button));
    }
    for (const choice of all("input[name=view]")) {
      choice.addEventListener("change", () => {
        view = views.find((one) => one.field === choice.value);
        draw();
      });
    }
    draw();
    box.on("plotly_click", ({ points: [{ pointNumber: [row, column] }] }) => open(row * width + column, frame));
    return draw;
  };

  const start = async () => {
    const plotly = document.createElement("script");
    plotly.textContent = await unpacked("plotly");
    document.head.append(plotly);
    const drawings = [drawPlots];
    if (byId("heat-map")) drawings.push(heatMap(JSON.parse(await unpacked("heat-map-grid"))));
    drawPlots();
    byId("undrawn").hidden = true;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawings.forEach((draw) => draw()));
  };
  start();
})();
