(() => {
  "use strict";
  const root = document.documentElement;
  const config = { displayModeBar: false, responsive: true };

  const resolved = (value, style) => {
    if (typeof value === "string") {
      const token = /^var\((--[a-z-]+)\)$/.exec(value);
      return token ? style.getPropertyValue(token[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolved(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
    }
    return value;
  };

  const draw = () => {
    const style = getComputedStyle(root);
    for (const box of document.querySelectorAll("[data-plot]")) {
      const source = document.getElementById(box.dataset.plot);
      const spec = resolved(JSON.parse(source.textContent), style);
      Plotly.react(box, spec.data, spec.layout, config);
    }
  };

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
