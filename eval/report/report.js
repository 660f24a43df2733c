// The panel of the report: own prices, own link, and the lines of both maps move with them. The
// formulas are those of kvzip/cost.py; tests/eval/test_report.py holds the two against each other.
"use strict";
(() => {
  const given = JSON.parse(document.getElementById("kvzip-panel").textContent);
  const form = document.getElementById("panel");
  const field = (name) => form.elements.namedItem(name);
  const own = { a: given.a, b: given.b, layers: given.layers, bytes: given.bytes };
  let model = own;  // whose prefill the maps show

  // --- what was typed ---------------------------------------------------------------------------

  const FIELDS = ["egress", "prefill", "device", "link", "latency", "tokens", "prefillspeed",
    "decodespeed", "bytes"];
  const PRICES = ["egress", "prefill", "device"];  // what a preset fills
  const ABOVE_ZERO = new Set(["link", "tokens", "prefillspeed", "decodespeed", "bytes"]);

  // The numbers, or null with the fields that cannot be marked.
  function read() {
    const found = {};
    let good = true;
    for (const name of FIELDS) {
      const input = field(name), value = Number(input.value);
      const able = input.value.trim() !== "" && Number.isFinite(value) &&
        (ABOVE_ZERO.has(name) ? value > 0 : value >= 0);
      input.setAttribute("aria-invalid", able ? "false" : "true");
      good = good && able;
      found[name] = value;
    }
    return good ? found : null;
  }

  // --- formulas: bytes, seconds, bits per second, dollars; null where there is no threshold -------

  // As measured at the document's own length, which the page's cards and tables show; a model elsewhere.
  const prefillHere = (s) => model === own && s.tokens === given.tokens
    ? given.seconds / s.prefillspeed : prefillSeconds(s.tokens, s);

  const prefillSeconds = (tokens, s) => (model.a * tokens + model.b * tokens * tokens) / s.prefillspeed;

  function fillSeconds(raw, rate) { return raw / model.layers / rate; }

  function loadSeconds(raw, ratio, rate, s) {
    const link = raw / ratio * 8 / (s.link * 1e6);
    return s.latency / 1e3 + fillSeconds(raw, rate) + Math.max(link, raw / rate);
  }

  function breakEvenBandwidth(prefill, raw, ratio, rate, s) {
    const left = prefill - s.latency / 1e3 - fillSeconds(raw, rate);
    return left <= 0 || raw / rate >= left ? null : raw / ratio * 8 / left;
  }

  function breakEvenEgress(prefill, raw, ratio, rate, s) {
    const saved = prefill - raw / rate / 3600 * s.device;
    return saved <= 0 ? null : saved * ratio / (raw / 1e9);
  }

  function ways(s) {
    return given.codecs.map((c) => ({ ...c, rate: c.rate === null ? Infinity : c.rate * s.decodespeed }));
  }

  // --- figures as text ---------------------------------------------------------------------------

  // Mirrors text.py. Infinity has no power of ten: 0.
  const power = (value, digits) => Number(value.toExponential(digits - 1).split("e")[1]) || 0;

  function short(value) {
    const digits = Math.max(0, 2 - power(value, 3));
    const text = value.toLocaleString("en-US",
      { minimumFractionDigits: Math.min(digits, 20), maximumFractionDigits: Math.min(digits, 20) });
    return text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text;
  }

  function usd(value) {
    if (power(value, 3) >= 0)
      return "$" + value.toLocaleString("en-US",
        { minimumFractionDigits: 2, maximumFractionDigits: 2 }).replace(/\.00$/, "");
    if (power(value, 2) < -6) {
      const [factor, ten] = value.toExponential(1).split("e");
      return `$${factor} × 10` + ten.replace("-", "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);
    }
    const digits = value >= 1e-3 ? 3 : 2;
    const text = value.toFixed(digits - 1 - power(value, digits)).replace(/0+$/, "");
    return "$" + (text.length === 3 ? text + "0" : text);
  }

  const seconds = (value) => power(value, 3) >= 0 ? short(value) + " s" : short(value * 1e3) + " ms";

  function bitRate(value) {
    for (const [unit, ten] of [["Tb/s", 12], ["Gb/s", 9], ["Mb/s", 6], ["kb/s", 3]])
      if (power(value, 3) >= ten) return short(value / 10 ** ten) + " " + unit;
    return short(value) + " b/s";
  }

  // --- maps --------------------------------------------------------------------------------------

  const STEPS = 96, LABEL = 15;

  // Mirrors charts.py: places on logarithmic axes, far values kept near the plot.
  function frame(svg) {
    const g = JSON.parse(svg.dataset.geometry), times = Number(svg.dataset.times || 1);
    g.y = g.y.map((edge) => edge * times);
    const place = (v, [low, high]) => Math.log(v / low) / Math.log(high / low);
    return {
      ...g,
      px: (v) => g.left + place(v, g.x) * (g.right - g.left),
      py: (v) => v === null ? g.top - 50
        : g.bottom - Math.min(Math.max(v > 0 ? place(v, g.y) : -1, -1), 2) * (g.bottom - g.top),
      at: (i) => g.x[0] * Math.pow(g.x[1] / g.x[0], i / STEPS),
    };
  }

  const path = (points) => "M" + points.map(([x, y]) => x.toFixed(1) + " " + y.toFixed(1)).join("L");

  function spread(wanted, low, high) {
    const order = wanted.map((_, i) => i).sort((i, j) => wanted[i] - wanted[j]);
    let at = order.map((i) => Math.min(Math.max(wanted[i], low), high));
    for (let turn = 0; turn < 50; turn++) {
      let moved = false;
      for (let i = 0; i + 1 < at.length; i++)
        if (at[i + 1] - at[i] < LABEL - 0.1) {
          const middle = (at[i] + at[i + 1]) / 2;
          at[i] = middle - LABEL / 2; at[i + 1] = middle + LABEL / 2;
          moved = true;
        }
      let shift = at.length ? Math.max(low - at[0], 0) : 0;
      if (at.length && at[at.length - 1] > high) shift = Math.min(high - at[at.length - 1], 0);
      at = at.map((a) => a + shift);
      if (!moved) break;
    }
    const placed = [];
    order.forEach((i, k) => { placed[i] = at[k]; });
    return placed;
  }

  function redraw(svg, line, here) {
    const f = frame(svg), above = svg.dataset.above === "yes", drawn = new Map();
    for (const element of svg.querySelectorAll("[data-line]")) {
      const key = element.dataset.line, points = [];
      for (let i = 0; i <= STEPS; i++) points.push([f.px(f.at(i)), f.py(line(key, f.at(i)))]);
      element.setAttribute("d", path(points));
      drawn.set(key, points);
    }
    const keys = given.order.filter((key) => drawn.has(key));
    const curves = keys.map((key) => drawn.get(key)), first = curves[0];
    const real = keys.filter((key) => key !== "ideal").map((key) => drawn.get(key));
    const furthest = above ? Math.max : Math.min;
    const last = first.map(([x], i) => [x, furthest(...real.map((c) => c[i][1]))]);
    const edge = above ? f.top - 60 : f.bottom + 60;
    svg.querySelector(".wins").setAttribute("d", `${path(first)}L${f.right} ${edge}L${f.left} ${edge}Z`);
    svg.querySelector(".turns").setAttribute("d", `${path(first)}L${path(last.slice().reverse()).slice(1)}Z`);
    const ends = curves.map((c) => Math.min(Math.max(c[STEPS][1], f.top), f.bottom));
    const places = spread(ends, f.top + 4, f.bottom - 4);
    keys.forEach((key, i) => {
      svg.querySelector(`[data-leader="${key}"]`).setAttribute("d",
        `M${f.right} ${ends[i].toFixed(1)}L${f.right + 14} ${places[i].toFixed(1)}`);
      svg.querySelector(`[data-label="${key}"]`).setAttribute("y", (places[i] + 4).toFixed(1));
    });
    const mark = svg.querySelector("[data-own]"), [x, y] = here;
    const inside = x >= f.x[0] && x <= f.x[1] && y >= f.y[0] && y <= f.y[1];
    mark.toggleAttribute("hidden", !inside);
    if (inside) mark.setAttribute("transform", `translate(${f.px(x).toFixed(1)} ${f.py(y).toFixed(1)})`);
  }

  // Another model's cache may come so much faster that its lines lie elsewhere: the axis of bandwidth
  // moves by powers of ten.
  function move(svg) {
    const pace = (m) => m.bytes / (m.a + m.b * given.tokens);
    const times = Math.pow(10, Math.round(Math.log10(pace(model) / pace(own))));
    svg.dataset.times = times;
    for (const tick of svg.querySelectorAll("[data-tick]"))
      tick.textContent = bitRate(Number(tick.dataset.tick) * times);
  }

  function maps(s) {
    const codecs = new Map(ways(s).map((c) => [c.name, c]));
    codecs.set("ideal", { ratio: given.ideal, rate: Infinity });
    if (!codecs.has("raw")) codecs.set("raw", { ratio: 1, rate: Infinity });
    for (const svg of document.querySelectorAll('svg[data-chart^="time-"]')) {
      move(svg);
      redraw(svg, (key, tokens) => {
        const c = codecs.get(key), raw = s.bytes * tokens;
        return breakEvenBandwidth(prefillSeconds(tokens, s), raw, c.ratio, c.rate, s);
      }, [s.tokens, s.link * 1e6]);
    }
    for (const svg of document.querySelectorAll('svg[data-chart^="dollar-"]'))
      redraw(svg, (key, price) => {
        const c = codecs.get(key);
        return breakEvenEgress(price, s.bytes * 1e6, c.ratio, Infinity, s);
      }, [s.prefill, s.egress]);
  }

  // --- words -------------------------------------------------------------------------------------

  function cell(row, name, text, good) {
    const target = row.querySelector(`[data-cell="${name}"]`);
    target.textContent = text;
    target.className = good === undefined ? "" : good ? "good" : "bad";
  }

  function words(s) {
    const raw = s.bytes * s.tokens, prefill = prefillHere(s);
    const cost = s.tokens / 1e6 * s.prefill;
    let quickest = ["prefill", prefill], cheapest = ["prefill", cost];
    for (const c of ways(s)) {
      const time = loadSeconds(raw, c.ratio, c.rate, s);
      const money = raw / c.ratio / 1e9 * s.egress + raw / c.rate / 3600 * s.device;
      const bandwidth = breakEvenBandwidth(prefill, raw, c.ratio, c.rate, s);
      const egress = breakEvenEgress(cost, raw, c.ratio, c.rate, s);
      if (time < quickest[1]) quickest = [c.name, time];
      if (money < cheapest[1]) cheapest = [c.name, money];
      const row = form.querySelector(`tr[data-codec="${c.name}"]`);
      cell(row, "time", seconds(time), time < prefill);
      cell(row, "bandwidth", bandwidth === null ? "never" : bitRate(bandwidth));
      cell(row, "money", usd(money), money < cost);
      cell(row, "egress", egress === null ? "never" : usd(egress));
    }
    const how = (name) => name === "prefill" ? "prefill" : name === "raw" ? "load raw bytes" : "load with " + name;
    document.getElementById("said-time").textContent = quickest[0] === "prefill"
      ? `In time: prefill, ${seconds(prefill)}.`
      : `In time: ${how(quickest[0])}, ${seconds(quickest[1])} against ${seconds(prefill)} of prefill.`;
    document.getElementById("said-money").textContent = cheapest[0] === "prefill"
      ? `In dollars: prefill, ${usd(cost)}.`
      : `In dollars: ${how(cheapest[0])}, ${usd(cheapest[1])} against ${usd(cost)} of prefill.`;
  }

  // --- together ----------------------------------------------------------------------------------

  function update() {
    const s = read();
    if (s === null) {
      document.getElementById("said-time").textContent =
        "No verdict: a field is empty, below zero, or no number.";
      document.getElementById("said-money").textContent = "";
      for (const c of form.querySelectorAll("[data-cell]")) { c.textContent = "–"; c.className = ""; }
      return;
    }
    maps(s);
    words(s);
  }

  form.addEventListener("input", (event) => {
    if (event.target.name === "preset") {
      const chosen = given.presets.find((p) => p.name === event.target.value);
      if (chosen) for (const name of PRICES) field(name).value = chosen[name];
    } else if (event.target.name === "model") {
      model = given.models.find((m) => m.name === event.target.value) || own;
      field("bytes").value = model.bytes;
    } else if (PRICES.includes(event.target.name)) {
      field("preset").value = "";
    }
    update();
  });
  // "reset" is told before the fields are.
  form.addEventListener("reset", () => setTimeout(() => { model = own; update(); }));
  form.addEventListener("submit", (event) => event.preventDefault());
  document.documentElement.classList.add("live");
  update();
})();
