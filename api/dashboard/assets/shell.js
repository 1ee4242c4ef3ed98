// Before the first paint: light or dark, as chosen or as the system has it. Later: what the browser alone can know.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => (document.cookie.match(/(?:^|; )residency_theme=(light|dark)/) || [])[1];

  function apply() {
    const choice = chosen();
    const dark = choice ? choice === "dark" : system.matches;
    root.dataset.theme = dark ? "dark" : "light";
    if (choice) root.dataset.chosen = choice;
    else delete root.dataset.chosen;
    if (typeof setDark === "function" && window.Quasar) setDark(dark);
  }

  apply();
  system.addEventListener("change", apply);
  document.addEventListener("click", (event) => {
    const choice = event.target.closest?.("[data-choose]")?.dataset.choose;
    if (!choice) return;
    const age = choice === "auto" ? 0 : 31536000;
    document.cookie = `residency_theme=${choice}; path=/; max-age=${age}; samesite=lax`;
    apply();
  });
  document.addEventListener("visibilitychange", () => {
    if (typeof emitEvent === "function") emitEvent("page_seen", !document.hidden);
  });
})();
