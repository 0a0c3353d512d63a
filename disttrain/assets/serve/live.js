// Follows the runs of a page. A page that nobody has touched loads new data by itself and keeps its place. One
// that was touched may be zoomed or unfolded, so it offers a button instead.
(() => {
  const { check, version } = document.currentScript.dataset;
  const links = { "All runs": "/" };
  if (location.pathname.startsWith("/run/")) Object.assign(links, { config: "config.yaml", logs: "logs/" });
  const bar = document.createElement("p");
  for (const [textContent, href] of Object.entries(links)) {
    bar.append(bar.firstChild ? " · " : "", Object.assign(document.createElement("a"), { href, textContent }));
  }
  document.body.prepend(bar);

  const reload = Object.assign(document.createElement("button"), { type: "button", textContent: "New data: reload" });
  Object.assign(reload.style, { position: "fixed", right: "1rem", bottom: "1rem", zIndex: 30, padding: ".5rem 1rem" });
  reload.addEventListener("click", () => location.reload());
  let touched = false;
  for (const event of ["pointerdown", "keydown"]) {
    addEventListener(event, ({ target }) => { touched ||= !reload.contains(target); }, true);
  }

  async function look() {
    if (document.hidden) return;
    try {
      const answer = await fetch(check);
      if (!answer.ok || (await answer.json()).version === version) return;
    } catch {
      return; // the server has ended
    }
    if (touched) document.body.append(reload);
    else location.reload();
  }

  setInterval(look, 30000);
  document.addEventListener("visibilitychange", look);
})();
