(async () => {
  if (!window.DecompressionStream) throw new Error("this browser is too old to unpack them (before 2023)");
  const unpack = (id) => {
    const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const script = document.createElement("script");
  script.textContent = await unpack("plotly-packed");
  document.head.append(script);

  const figures = JSON.parse(await unpack("figure-data"));
  const plots = [...document.querySelectorAll("[data-figure]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const options = { responsive: true, displayModeBar: false };

  // The page has its own legends, since plotly's cover the picture in a narrow window.
  for (const figure of Object.values(figures)) {
    figure.data = figure.data.filter((trace) => trace.meta !== "legend");
    figure.keyed = figure.layout.showlegend;
    figure.layout.showlegend = false;
    figure.off = new Set();
    for (const trace of figure.data) if (trace.visible === "legendonly") figure.off.add(trace.meta.at(-1));
  }

  function dressed(figure, width) {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const layout = structuredClone(figure.layout);
    layout.font.color = color("--soft");
    layout.hoverlabel = { ...layout.hoverlabel, bgcolor: color("--card"), bordercolor: color("--rule"), font: { color: color("--ink") } };
    for (const [name, axis] of Object.entries(layout)) if (/^[xy]axis/.test(name)) axis.gridcolor = color("--grid");
    for (const shape of layout.shapes || []) if (shape.type === "line") shape.line.color ??= color("--soft");
    if (layout.coloraxis) {
      layout.coloraxis.colorscale = layout.meta[dark.matches ? "dark" : "light"];
      layout.coloraxis.showscale = false;
      if (width < 500) {
        layout.yaxis.tickfont = { size: 10 };
        layout.yaxis.ticktext = layout.meta.narrow;
      }
    }
    if (coarse) layout.dragmode = false; // a finger on a figure scrolls the page
    return layout;
  }

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }
  function sample(trace, own) {
    const [soft, widths] = [getComputedStyle(document.documentElement).getPropertyValue("--soft"), { dash: "5 3", dot: "2 2" }];
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("width", 18);
    svg.setAttribute("height", 8);
    const stroke = document.createElementNS(svg.namespaceURI, "path");
    const points = trace.mode === "markers";
    const looks = { d: points ? "M6 1L12 7M12 1L6 7" : "M0 4H18", stroke: own ? trace.line.color : soft, "stroke-width": 2.5, fill: "none" };
    if (widths[trace.line.dash]) looks["stroke-dasharray"] = widths[trace.line.dash];
    for (const [name, value] of Object.entries(looks)) stroke.setAttribute(name, value);
    svg.append(stroke);
    return svg;
  }
  function addKeys(plot, figure) {
    const box = plot.parentElement.querySelector(".keys");
    const entries = new Map();
    if (figure.keyed) for (const trace of figure.data) (trace.meta || []).forEach((name, i) => entries.has(name) || entries.set(name, [trace, i === 0]));
    const show = () => Plotly.restyle(plot, "visible", figure.data.map((trace) => !(trace.meta || []).some((name) => figure.off.has(name))));
    const fade = (kept) => Plotly.restyle(plot, "opacity", figure.data.map((trace) => (!kept || (trace.meta || []).includes(kept) ? 1 : 0.12)));
    const ordered = [...entries].sort(([, [, one]], [, [, other]]) => other - one); // kinds of lines after the names
    const buttons = ordered.map(([name, [trace, own]]) => {
      const button = element("button", { type: "button", title: name }, sample(trace, own), element("span", { textContent: name }));
      button.ariaPressed = !figure.off.has(name);
      const press = (change) => {
        change();
        for (const other of buttons) other.ariaPressed = !figure.off.has(other.title);
        return show();
      };
      button.addEventListener("click", () => press(() => figure.off.delete(name) || figure.off.add(name)));
      button.addEventListener("dblclick", () => press(() => {
        for (const [other, [, alike]] of entries) if (alike === own) figure.off.add(other);
        figure.off.delete(name);
      }));
      button.addEventListener("mouseenter", () => fade(name));
      button.addEventListener("mouseleave", () => fade(null));
      return button;
    });
    box.replaceChildren(...buttons);
    box.classList.toggle("long", box.scrollHeight > box.clientHeight + 2);
    if (!figure.layout.coloraxis) return;
    const { colorscale, colorbar } = { ...figure.layout.coloraxis, colorscale: figure.layout.meta[dark.matches ? "dark" : "light"] };
    const ramp = element("div", { className: "ramp" });
    ramp.style.background = `linear-gradient(to right, ${colorscale.map(([at, c]) => `${c} ${100 * at}%`).join(", ")})`;
    const unit = element("span", { className: "unit", textContent: figure.layout.meta.unit });
    box.replaceChildren(unit, colorbar.ticktext[0], ramp, colorbar.ticktext.at(-1));
  }

  async function draw() {
    for (const plot of plots) {
      const figure = figures[plot.dataset.figure];
      for (const trace of figure.data) if (trace.meta) trace.visible = !trace.meta.some((name) => figure.off.has(name));
      addKeys(plot, figure);
      await Plotly.react(plot, figure.data, dressed(figure, plot.clientWidth), options);
    }
  }
  // One zoom for all: whoever finds the step in one figure sees it in the others.
  function link() {
    let busy = false;
    const linked = plots.filter((plot) => !plot.layout.xaxis2);
    for (const plot of linked) plot.on("plotly_relayout", async (change) => {
      if (busy || !Object.keys(change).some((name) => name.startsWith("xaxis."))) return;
      busy = true;
      const range = [...plot.layout.xaxis.range];
      await Promise.all(linked.map((other) => other !== plot && Plotly.relayout(other, { "xaxis.range": range })));
      busy = false;
    });
  }
  await draw();
  link();
  dark.addEventListener("change", draw);
  document.documentElement.dataset.figuresDrawn = plots.length > 0 && plots.every((plot) => plot.querySelector("svg.main-svg"));
})();
