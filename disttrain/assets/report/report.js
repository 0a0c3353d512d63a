// Gives the charts the colours of the page, also when it turns dark or is printed, and leaves dragging to
// scrolling where there is no mouse.
(() => {
  const dark = matchMedia("screen and (prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");

  function paint() {
    const style = getComputedStyle(document.documentElement);
    const [text, soft, line] = ["--text", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
    for (const model of Bokeh.documents.flatMap((page) => [...page.all_models])) {
      if (model.type.endsWith("Axis")) {
        model.setv({
          axis_label_text_color: soft, major_label_text_color: text, axis_line_color: soft,
          major_tick_line_color: soft, minor_tick_line_color: null,
        });
      } else if (model.type === "Grid") {
        model.setv({ grid_line_color: line, grid_line_alpha: 0.7 });
      } else if (model.type === "Legend") {
        model.setv({ label_text_color: text, inactive_fill_alpha: 0.6, inactive_fill_color: line });
      } else if (model.type === "BoxZoomTool" && touch.matches) {
        model.active = false;
      }
    }
  }

  function unfold(open) {
    for (const part of document.querySelectorAll("details.print")) part.open = open;
  }

  addEventListener("beforeprint", () => unfold(true));
  addEventListener("afterprint", () => unfold(false));
  if (!window.Bokeh) return;
  dark.addEventListener("change", paint);
  const drawn = setInterval(() => {
    if (Bokeh.documents.length === 0) return;
    clearInterval(drawn);
    paint();
  }, 10);
})();
