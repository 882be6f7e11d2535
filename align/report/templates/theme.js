(() => {
  const KEY = "align-report-theme";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const kept = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // no storage for this file: the choice lasts as long as the page
    }
  };
  let chosen = ["light", "dark"].includes(kept()) ? kept() : null;
  const now = () => chosen ?? (system.matches ? "dark" : "light");
  const show = () => {
    root.dataset.theme = now();
    const button = document.getElementById("theme");
    if (!button) return;
    const other = now() === "dark" ? "light" : "dark";
    button.hidden = false;
    button.textContent = other === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `${button.textContent} theme`);
  };
  show();
  system.addEventListener("change", show);
  addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = now() === "dark" ? "light" : "dark";
      try {
        localStorage.setItem(KEY, chosen);
      } catch {
        // as above
      }
      show();
    });
    const openFor = () => {
      const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
      if (!target) return;
      for (const fold of [target.querySelector(":scope > details"), target.closest("details")]) if (fold) fold.open = true;
      target.scrollIntoView();
    };
    addEventListener("hashchange", openFor);
    openFor();
  });
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")].filter((one) => !one.classList.contains("values"));
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
  });
})();
