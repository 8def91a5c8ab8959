"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"], signs = {auto: "◐", light: "☀", dark: "☾"};
  const kept = {get: () => { try { return localStorage.getItem("unbroken-theme"); } catch { return null; } },
                set: (value) => { try { localStorage.setItem("unbroken-theme", value); } catch { /* a page without a store */ } }};
  let theme = themes.includes(kept.get()) ? kept.get() : "auto";
  const paint = () => {
    if (theme === "auto") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
    button.textContent = signs[theme];
    button.setAttribute("aria-label", "Colours: " + (theme === "auto" ? "as the system" : theme));
    button.title = button.getAttribute("aria-label");
  };
  button.hidden = false;
  button.addEventListener("click", () => { theme = themes[(themes.indexOf(theme) + 1) % 3]; kept.set(theme); paint(); });
  paint();

  const ranges = new Map();  // the part of each chart that is looked at, which outlives a new page
  const rounded = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max(1, [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough * 0.999));
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high; at += step) found.push(at);
    return found;
  };

  function enliven(figure) {
    const data = JSON.parse(figure.querySelector("script").textContent), plane = figure.querySelector(".plane");
    const svg = plane.querySelector("svg"), readout = figure.querySelector(".readout");
    const columns = figure.querySelector(".columns"), key = figure.id, [first, last] = data.x;
    const hint = "Point to read, drag to zoom, double-click for all. Keys: ← → + − Esc.";
    let [low, high] = ranges.get(key) || data.x, at = null, dragged = null;
    const cursor = plane.appendChild(Object.assign(document.createElement("div"), {className: "cursor", hidden: true}));
    const picked = plane.appendChild(Object.assign(document.createElement("div"), {className: "picked", hidden: true}));
    const xs = [...new Set(data.curves.flatMap((c) => c.points.map((p) => p[0])))].sort((a, b) => a - b);
    const near = (points, x) => {
      let a = 0, b = points.length - 1;
      while (b - a > 1) { const m = (a + b) >> 1; if (points[m][0] <= x) a = m; else b = m; }
      return x - points[a][0] <= points[b][0] - x ? a : b;
    };
    const say = () => {
      readout.replaceChildren();
      cursor.hidden = at === null;
      if (at === null) { readout.textContent = figure === document.querySelector("figure.chart") ? hint : ""; return; }
      cursor.style.left = 100 * (at - low) / (high - low) + "%";
      readout.append(data.name + " ", Object.assign(document.createElement("b"), {textContent: at.toLocaleString("en")}));
      for (const curve of data.curves) {
        const index = near(curve.points, at), x = curve.points[index][0];
        if (Math.abs(x - at) > (last - first) / 50 + 0.5) continue;
        readout.append(" · " + curve.name + " ", Object.assign(document.createElement("b"), {textContent: curve.values[index]}));
        if (x !== at) readout.append(" (at " + x.toLocaleString("en") + ")");
      }
    };
    const look = (a, b) => {
      const least = Math.min(4, last - first);
      low = Math.max(first, Math.min(a, last - least)); high = Math.min(last, Math.max(b, low + least));
      if (low === first && high === last) ranges.delete(key); else ranges.set(key, [low, high]);
      const scale = 1000 / (last - first);
      svg.setAttribute("viewBox", `${(low - first) * scale} 0 ${(high - low) * scale} 300`);
      columns.replaceChildren(...rounded(low, high, 7).map((x) => {
        const span = Object.assign(document.createElement("span"), {textContent: x.toLocaleString("en")});
        span.style.left = 100 * (x - low) / (high - low) + "%";
        return span;
      }));
      for (const flag of figure.querySelectorAll(".flag")) {
        const x = first + (last - first) * flag.dataset.left / 100;
        flag.style.left = 100 * (x - low) / (high - low) + "%";
        flag.hidden = x < low || x > high;
      }
      say();
    };
    const under = (event) => {
      const box = plane.getBoundingClientRect();
      return low + (high - low) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    };
    const nearest = (x) => xs[near(xs.map((each) => [each]), x)];
    plane.addEventListener("pointermove", (event) => {
      const x = under(event);
      at = nearest(x);
      if (dragged !== null) {
        const [a, b] = [Math.min(x, dragged), Math.max(x, dragged)];
        picked.hidden = false;
        picked.style.left = 100 * (a - low) / (high - low) + "%";
        picked.style.width = 100 * (b - a) / (high - low) + "%";
      }
      say();
    });
    plane.addEventListener("pointerdown", (event) => {
      at = nearest(under(event)); say();
      if (event.pointerType === "mouse" && event.button === 0) { dragged = under(event); plane.setPointerCapture(event.pointerId); }
    });
    plane.addEventListener("pointerup", (event) => {
      if (dragged !== null && Math.abs(under(event) - dragged) > (high - low) / 60) look(Math.min(under(event), dragged), Math.max(under(event), dragged));
      dragged = null; picked.hidden = true;
    });
    plane.addEventListener("pointercancel", () => { dragged = null; picked.hidden = true; });
    plane.addEventListener("pointerleave", () => { if (dragged === null) { at = null; say(); } });
    plane.addEventListener("dblclick", () => look(first, last));
    plane.addEventListener("keydown", (event) => {
      const index = at === null ? -1 : xs.indexOf(at), middle = at === null ? (low + high) / 2 : at, half = (high - low) / 2;
      if (event.key === "ArrowRight") at = xs[Math.min(index + 1, xs.length - 1)];
      else if (event.key === "ArrowLeft") at = xs[Math.max(index < 0 ? xs.length - 1 : index - 1, 0)];
      else if (event.key === "+" || event.key === "=") return look(middle - half / 2, middle + half / 2);
      else if (event.key === "-") return look(middle - 2 * half, middle + 2 * half);
      else if (event.key === "Escape") { at = null; return look(first, last); }
      else return;
      event.preventDefault(); say();
    });
    if (ranges.has(key)) look(low, high); else say();
  }
  const all = () => document.querySelectorAll("figure.chart").forEach(enliven);
  all();

  if (!("served" in document.body.dataset)) return;
  const again = async () => {
    try {
      const state = await (await fetch("state", {cache: "no-store"})).json();
      if (state.version !== document.body.dataset.version) {
        const page = new DOMParser().parseFromString(await (await fetch("report.html", {cache: "no-store"})).text(), "text/html");
        const open = new Set([...document.querySelectorAll("details[open] > summary")].map((each) => each.textContent));
        for (const part of ["header h1", "header .said", "main"]) document.querySelector(part).replaceWith(page.querySelector(part));
        for (const summary of document.querySelectorAll("details > summary")) summary.parentElement.open = open.has(summary.textContent);
        document.body.dataset.version = page.body.dataset.version;
        all();
      }
      if (!state.running) return;
    } catch { /* the server is gone, or comes back */ }
    setTimeout(again, 3000);
  };
  setTimeout(again, 3000);
})();
