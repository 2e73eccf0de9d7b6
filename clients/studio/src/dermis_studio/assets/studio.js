// What several pages need in the browser: theme, copying, tiles with arrow keys, the focus, opacity of heat maps.
(() => {
  "use strict";
  const root = document.documentElement;

  // A number and the word of what is counted, such as "1 image" and "2 images".
  window.dermisCounted = (count, singular, plural = `${singular}s`) => `${count.toLocaleString("en")} ${count === 1 ? singular : plural}`;

  // A service that stops ends the streams of results, with the message that they were cancelled or without a last message. Gradio
  // takes the first for the end of an action and the second for a complete stream, and would keep showing unfinished results.
  // As an error of the connection, either makes Gradio connect again.
  const RESULTS = /\/gradio_api\/queue\/data(?:\?|$)/;
  const LAST_CHARACTERS = 500; // of a stream, more than its last message has
  const stopped = () => new TypeError("The service ended the connection.");
  const fetchAny = window.fetch.bind(window);
  window.fetch = async (address, options) => {
    const answer = await fetchAny(address, options);
    const url = address instanceof Request ? address.url : String(address);
    if (!answer.ok || !answer.body || !RESULTS.test(url)) return answer;
    const decoder = new TextDecoder();
    let end = "";
    const checked = new TransformStream({
      transform(part, controller) {
        end = (end + decoder.decode(part, { stream: true })).slice(-LAST_CHARACTERS);
        if (end.includes("unexpected_error") && end.includes("Cancelled")) controller.error(stopped());
        else controller.enqueue(part);
      },
      flush(controller) {
        if (!end.includes("close_stream")) controller.error(stopped());
      },
    });
    return new Response(answer.body.pipeThrough(checked), { status: answer.status, headers: answer.headers });
  };

  const applyTheme = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    document.body.classList.toggle("dark", dark);
    const button = document.querySelector("[data-ds-theme]");
    if (button) button.setAttribute("aria-pressed", String(dark));
  };
  applyTheme(root.dataset.theme === "dark");
  // Gradio sets its class when it starts; the theme of the page is the one that counts.
  new MutationObserver(() => {
    if (document.body.classList.contains("dark") !== (root.dataset.theme === "dark")) applyTheme(root.dataset.theme === "dark");
  }).observe(document.body, { attributes: true, attributeFilter: ["class"] });

  const ready = new MutationObserver(() => {
    if (document.querySelector("gradio-app .ds-title")) {
      document.body.classList.add("ds-ready");
      ready.disconnect();
    }
  });
  ready.observe(document.body, { childList: true, subtree: true });

  // The second click of a double click neither starts nor stops anything: what the first one has started may have ended.
  document.addEventListener("click", (event) => {
    const commands = ".gradio-container button.primary, .gradio-container button.stop"; // which take each other's place
    const button = event.target instanceof Element ? event.target.closest(commands) : null;
    if (button && event.detail > 1) { event.stopPropagation(); event.preventDefault(); }
  }, { capture: true });

  document.addEventListener("click", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    if (!target) return;
    if (target.closest("[data-ds-theme]")) {
      const dark = root.dataset.theme !== "dark";
      try { localStorage.setItem("dermis-theme", dark ? "dark" : "light"); } catch { /* storage is off */ }
      applyTheme(dark);
    }
    const copy = target.closest("[data-ds-copy]");
    if (copy) {
      const text = copy.closest(".ds-code").querySelector("code").textContent;
      const done = () => { copy.textContent = "Copied"; setTimeout(() => { copy.textContent = "Copy"; }, 1600); };
      if (navigator.clipboard && window.isSecureContext) navigator.clipboard.writeText(text).then(done, () => select(copy));
      else select(copy, done);
    }
    // The result of a button is at the top of the page.
    if (target.closest(".gradio-container button.primary") && window.scrollY > 200) {
      window.scrollTo({ top: 0, behavior: window.matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    }
    const shown = target.closest("[data-ds-show]");
    if (shown) {
      const views = shown.closest("[data-ds-views]");
      for (const image of views.querySelectorAll("[data-ds-view]")) image.hidden = image.dataset.dsView !== shown.dataset.dsShow;
      for (const button of views.querySelectorAll("[data-ds-show]")) button.setAttribute("aria-pressed", String(button === shown));
    }
    const tile = target.closest(".ds-tile");
    if (tile) {
      for (const other of document.querySelectorAll(".ds-tile[aria-pressed='true']")) other.setAttribute("aria-pressed", "false");
      tile.setAttribute("aria-pressed", "true");
    }
  });

  // Signing out forgets what `projections.js` keeps.
  document.addEventListener("submit", (event) => {
    if (!event.target.action.endsWith("/sign-out")) return;
    try { localStorage.removeItem("dermis-projections"); } catch { /* storage is off */ }
  });

  // Without access to the clipboard, the text is selected so that the keyboard copies it.
  const select = (copy, done) => {
    const range = document.createRange();
    range.selectNodeContents(copy.closest(".ds-code").querySelector("code"));
    const selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    if (document.execCommand("copy") && done) done();
  };

  document.addEventListener("keydown", (event) => {
    const tile = event.target instanceof Element ? event.target.closest(".ds-tile") : null;
    if (!tile || !["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
    const tiles = [...tile.closest(".ds-grid").querySelectorAll(".ds-tile")];
    const columns = tiles.filter((other) => other.offsetTop === tiles[0].offsetTop).length;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    const next = event.key === "Home" ? 0 : event.key === "End" ? tiles.length - 1 : tiles.indexOf(tile) + steps[event.key];
    if (tiles[next]) { tiles[next].focus(); event.preventDefault(); }
  });

  // Gradio replaces what a page shows, and hides the button that was pressed. The focus goes to what took its place, so that
  // nobody who uses the keyboard has to search for it.
  const shownNow = (element) => element.getClientRects().length > 0;
  const nameOf = (element) => {
    const known = element.type === "radio" ? /^(?:name|value)$/ : /^(?:data-|id$|name$|href$)/;
    const named = [...element.attributes].filter(({ name }) => known.test(name) && !name.startsWith("data-testid"));
    const parts = named.map(({ name, value }) => `${name}=${value}`);
    return [element.tagName, ...(parts.length ? parts : [element.getAttribute("aria-label") || element.textContent.trim()])].join("\n");
  };
  let focused = null;
  document.addEventListener("focusin", ({ target }) => {
    if (!target.closest("gradio-app")) { focused = null; return; }
    const around = [];
    for (let parent = target.parentElement; parent; parent = parent.parentElement) around.push(parent);
    focused = { target, around, name: nameOf(target), command: target.matches("button.primary, button.secondary, button.stop") };
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("a, button, input, select, textarea, summary, label, [tabindex]")) focused = null;
  });
  const restoreFocus = () => {
    if (!focused || (document.activeElement && document.activeElement !== document.body)) return;
    if (focused.target.isConnected && shownNow(focused.target) && !focused.target.disabled) return;
    const near = focused.around.filter((parent) => parent.isConnected && shownNow(parent));
    for (const parent of near) {
      if (parent.matches("gradio-app")) break;
      const candidates = [...parent.querySelectorAll("a, button, input, select, textarea, summary, [tabindex]")];
      const usable = candidates.filter((other) => shownNow(other) && !other.disabled);
      // Commands are looked for beside the one that is gone only: a start button and its stop button have the same place.
      const commands = focused.command && parent === near[0] ? ["button.primary, button.stop", "button.secondary"] : [];
      const found = usable.find((other) => nameOf(other) === focused.name)
        || commands.map((kind) => usable.find((other) => other.matches(kind))).find(Boolean);
      if (found) { found.focus({ preventScroll: true }); return; }
    }
  };
  new MutationObserver(() => requestAnimationFrame(restoreFocus)).observe(document.body,
    { childList: true, subtree: true, attributes: true, attributeFilter: ["class", "hidden", "disabled"] });
  // Elements that Gradio makes. Tables of a card can be wider than the page, so the keyboard must be able to scroll them; a
  // message has a button inside of a button, whose outer one does the same.
  const makeAccessible = () => {
    for (const table of document.querySelectorAll(".ds-card-text table:not([tabindex])")) table.tabIndex = 0;
    for (const header of document.querySelectorAll(".toast-header[role=button]")) {
      header.removeAttribute("role");
      header.removeAttribute("tabindex");
    }
  };
  new MutationObserver(makeAccessible).observe(document.body, { childList: true, subtree: true });
  makeAccessible();

  // Gradio gives each radio button a name of its own, and a new one whenever its choice changes. With one name for all of a
  // group, Tab reaches the group once, and arrow keys move the choice in it.
  const groups = new WeakMap();
  let numbered = 0;
  const groupRadioButtons = () => {
    for (const button of document.querySelectorAll("fieldset input[type=radio]")) {
      const group = button.closest("fieldset"), title = group.querySelector("[data-testid=block-info]");
      if (!groups.has(group)) groups.set(group, `ds-choice-${++numbered}`);
      if (title) {
        title.id ||= `${groups.get(group)}-title`;
        group.setAttribute("role", "radiogroup");
        group.setAttribute("aria-labelledby", title.id);
      }
      if (button.name !== groups.get(group)) button.name = groups.get(group);
    }
  };
  new MutationObserver(groupRadioButtons).observe(document.body,
    { childList: true, subtree: true, attributes: true, attributeFilter: ["name"] });
  groupRadioButtons();

  // Gradio opens a list of choices at any key, and does so after Tab has moved the focus away: then the list would stay open.
  document.addEventListener("keydown", (event) => {
    const leaves = ["Tab", "Shift", "Control", "Alt", "Meta"].includes(event.key);
    if (leaves && event.target instanceof Element && event.target.matches("input[role=combobox]")) event.stopPropagation();
  }, { capture: true });

  // The key that started something, held down, does not stop it.
  document.addEventListener("keydown", (event) => {
    if (event.repeat && event.key === "Enter" && event.target instanceof HTMLButtonElement) event.preventDefault();
  });

  // Gradio would refuse a negative number without the name of its field, so a field without negative numbers takes no minus.
  document.addEventListener("beforeinput", (event) => {
    const field = event.target instanceof HTMLInputElement && event.target.type === "number" ? event.target : null;
    if (field && field.min !== "" && Number(field.min) >= 0 && (event.data || "").includes("-")) event.preventDefault();
  });

  // Films: the images of a strip one after the other, there and back. They move only after "Play film" was pressed.
  const showFrame = (film, number) => {
    const images = film.closest("[data-ds-series]").querySelectorAll(".ds-strip img");
    const place = Math.min(Math.max(0, number), images.length - 1);
    const slider = film.querySelector("[data-ds-frame]"), picture = film.querySelector("img");
    if (picture.src !== images[place].src) picture.src = images[place].src;
    slider.value = place + 1;
    slider.nextElementSibling.textContent = `${place + 1} of ${images.length}`;
    slider.setAttribute("aria-valuetext", images[place].alt);
    return images.length;
  };
  const setPlaying = (button, playing) => {
    button.setAttribute("aria-pressed", String(playing));
    button.textContent = playing ? "Pause film" : "Play film";
  };
  const play = (film, button) => {
    let step = 1;
    const timer = setInterval(() => {
      if (!film.isConnected || button.getAttribute("aria-pressed") !== "true") { clearInterval(timer); return; }
      const place = Number(film.querySelector("[data-ds-frame]").value) - 1;
      const count = Number(film.querySelector("[data-ds-frame]").max);
      if (place + step < 0 || place + step >= count) step = -step;
      showFrame(film, place + step);
    }, Number(film.dataset.dsFilm));
  };
  document.addEventListener("click", (event) => {
    const button = event.target instanceof Element ? event.target.closest("[data-ds-play]") : null;
    if (!button) return;
    const playing = button.getAttribute("aria-pressed") !== "true";
    setPlaying(button, playing);
    if (playing) play(button.closest("[data-ds-film]"), button);
  });
  document.addEventListener("input", (event) => {
    const slider = event.target instanceof Element ? event.target.closest("[data-ds-frame]") : null;
    if (!slider) return;
    const film = slider.closest("[data-ds-film]");
    setPlaying(film.querySelector("[data-ds-play]"), false);
    showFrame(film, Number(slider.value) - 1);
  });

  document.addEventListener("input", (event) => {
    const slider = event.target instanceof Element ? event.target.closest("[data-ds-opacity]") : null;
    if (!slider) return;
    const overlay = slider.closest(".ds-overlay");
    overlay.style.setProperty("--ds-opacity", slider.value / 100);
    overlay.querySelector("output").textContent = `${slider.value} %`;
  });
})();
