const read = (id) => JSON.parse(document.getElementById(id).textContent);
const config = read("chart-config");
const options = {
  mode: "vega-lite",
  renderer: "svg",
  actions: false,
  ast: true, // expressions are walked, not compiled: the page's policy forbids eval
  config,
  tooltip: { disableDefaultStyle: true, theme: "report" },
};
const draw = async (plot) => {
  try {
    await vegaEmbed(plot, read(plot.dataset.spec), options);
    // The chart is one image with a name, and its numbers stand in the table: its parts are no reader's business.
    plot.querySelector("svg").setAttribute("aria-hidden", "true");
  } catch (error) {
    plot.removeAttribute("role");
    plot.textContent = `The chart cannot be drawn: ${error.message}`;
  }
};
await Promise.all([...document.querySelectorAll(".plot")].map(draw));
// A chart drawn inside a closed part has no width until the part is opened.
addEventListener("toggle", () => dispatchEvent(new Event("resize")), true);
for (const event of ["beforeprint", "afterprint"]) addEventListener(event, () => dispatchEvent(new Event("resize")));
document.documentElement.dataset.charts = "drawn";
