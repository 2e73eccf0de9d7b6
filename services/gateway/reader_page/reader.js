// The page for readers of a study: shows one image after another and stores the answers with the service.
(() => {
  "use strict";
  const element = (id) => document.getElementById(id);
  // The secret is in the fragment, which browsers do not send; it leaves the page only in the header Authorization.
  const token = location.hash.slice(1);
  const storageName = `dermis-study-${token.split("_")[2] ?? ""}`;
  const RETRY_SECONDS = [1, 2, 4, 8, 15];

  let reading = null; // what the service says of the study
  const answers = new Map(); // by position, as the service has them
  let position = 1;
  let draft = { answer: null, confidence: null, seconds: 0 };
  const pictures = new Map(); // by position: address of the loaded image, or the promise of one
  let zoom = null; // pixels of the screen for one of the image; null to fit
  let busy = false;

  // ---- The service ----

  class Refusal extends Error {
    constructor(status, title, detail) {
      super(detail || title);
      this.status = status;
      this.title = title;
    }
  }

  const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

  async function send(path, options = {}) {
    const response = await fetch(path, {
      ...options,
      headers: { Authorization: `Bearer ${token}`, ...options.headers },
      cache: "no-store",
      credentials: "omit",
    });
    if (response.ok) return response;
    let problem = {};
    try { problem = await response.json(); } catch { /* not a problem document */ }
    throw new Refusal(response.status, problem.title ?? "The service refused this", problem.detail);
  }

  // Send, and repeat while the service does not respond or restarts. Every request can be repeated without harm.
  async function insist(path, options, waiting) {
    for (let attempt = 0; ; attempt++) {
      try {
        return await send(path, options);
      } catch (error) {
        if (error instanceof Refusal && ![429, 500, 502, 503, 504].includes(error.status)) throw error;
        waiting();
        await pause(RETRY_SECONDS[Math.min(attempt, RETRY_SECONDS.length - 1)]);
      }
    }
  }

  // ---- Views ----

  function show(id) {
    for (const view of document.querySelectorAll("main > section")) view.hidden = view.id !== id;
    const title = element(id).querySelector("h1");
    if (title) title.focus({ preventScroll: true });
    scrollTo(0, 0);
  }

  function refuse(title, text) {
    stopClock();
    element("refused-title").textContent = title;
    element("refused-text").textContent = text;
    document.title = `${title} - reader study`;
    show("refused");
  }

  function refuseWith(error) {
    const titles = { 401: "This link does not work", 409: "This is not possible now" };
    refuse(titles[error.status] ?? error.title ?? "The study cannot be shown", `${sentence(error.message)}`);
  }

  const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".") : "");

  async function start() {
    show("loading");
    if (!/^dermis_rd_[a-z0-9]{12}_[A-Za-z0-9_-]{43}$/.test(token)) {
      refuse("This link is not complete", "Open the whole link that you were sent, or ask for another one.");
      return;
    }
    try {
      for (;;) {
        const response = await insist("v1/reading", {}, () => {
          element("loading-text").textContent = "The service does not respond. Trying again.";
        });
        reading = await response.json();
        if (reading.state !== "preparing") break;
        element("loading-text").textContent = "The images of the study are being prepared. This page continues by itself.";
        await pause(3);
      }
    } catch (error) {
      refuseWith(error);
      return;
    }
    for (const answer of reading.answers) answers.set(answer.position, answer);
    document.title = `${reading.study} - reader study`;
    element("name").textContent = reading.study;
    element("reader").textContent = `For ${reading.reader}`;
    element("total").textContent = reading.images;
    const until = new Date(reading.expires_at);
    element("until").textContent = `The link works until ${until.toLocaleDateString(undefined, { dateStyle: "long" })}.`;
    if (reading.state === "closed") {
      showEnd("The study is closed", `You have answered ${answers.size} of ${reading.images} images. No more answers are taken.`);
      element("return").hidden = true;
    } else if (answers.size >= reading.images) {
      finish();
    } else {
      element("begin").textContent = answers.size ? `Continue with image ${answers.size + 1}` : "Begin";
      show("welcome");
      picture(answers.size + 1).catch(() => {});
    }
  }

  function showEnd(title, text) {
    stopClock();
    element("end-title").textContent = title;
    element("end-text").textContent = text;
    show("end");
  }

  function finish() {
    showEnd("Thank you", `You have answered all ${reading.images} images. Your answers are stored; you can close this page. `
      + "Until the study is closed you can still go back and change them.");
  }

  // ---- Images ----

  function picture(at) {
    if (!pictures.has(at)) {
      const loaded = (async () => {
        const response = await insist(`v1/reading/images/${at}`, {}, () => tell("The service does not respond. Trying again.", true));
        return URL.createObjectURL(await response.blob());
      })();
      pictures.set(at, loaded);
      loaded.catch(() => pictures.delete(at));
      for (const known of [...pictures.keys()]) {
        if (Math.abs(known - at) <= 2) continue;
        pictures.get(known).then(URL.revokeObjectURL, () => {});
        pictures.delete(known);
      }
    }
    return pictures.get(at);
  }

  // Pixels of the screen for one pixel of the image: a whole number, the largest one with which the image fits.
  function fitting() {
    const view = element("view");
    const space = Math.min(view.clientWidth, view.clientHeight) * devicePixelRatio;
    return Math.max(1, Math.floor((space + 0.5) / reading.size));
  }

  function applyZoom() {
    if (!reading || element("task").hidden) return;
    const factor = zoom ?? fitting();
    const side = (reading.size * factor) / devicePixelRatio;
    element("image").style.width = element("image").style.height = `${side}px`;
    element("factor").textContent = `${factor} : 1`;
    element("out").disabled = factor <= 1;
    element("in").disabled = factor >= 32;
  }

  function changeZoom(step) {
    const view = element("view");
    const x = (view.scrollLeft + view.clientWidth / 2) / view.scrollWidth;
    const y = (view.scrollTop + view.clientHeight / 2) / view.scrollHeight;
    zoom = step === 0 ? null : Math.min(32, Math.max(1, (zoom ?? fitting()) + step));
    applyZoom();
    view.scrollTo(x * view.scrollWidth - view.clientWidth / 2, y * view.scrollHeight - view.clientHeight / 2);
  }

  // ---- Time: counted while the image is on the screen and the page is visible ----

  let since = null;

  function countTime() {
    if (since !== null) draft.seconds += (performance.now() - since) / 1000;
    since = since === null || document.hidden ? null : performance.now();
  }

  function startClock() { since = document.hidden ? null : performance.now(); }
  function stopClock() { countTime(); since = null; }

  document.addEventListener("visibilitychange", () => {
    if (element("task").hidden || busy) return;
    if (document.hidden) { stopClock(); keepDraft(); } else startClock();
  });
  addEventListener("pagehide", () => { if (!element("task").hidden) { countTime(); keepDraft(); } });

  // ---- What is chosen and not stored yet survives going to another image and a reload of the page ----

  const drafts = new Map(); // by position
  try {
    for (const [at, kept] of JSON.parse(sessionStorage.getItem(storageName)) ?? []) drafts.set(at, kept);
  } catch { /* nothing was kept */ }

  function storeDrafts() {
    try { sessionStorage.setItem(storageName, JSON.stringify([...drafts])); } catch { /* storage is off */ }
  }

  function keepDraft() {
    drafts.set(position, { ...draft });
    storeDrafts();
  }

  function forgetDraft(at) {
    drafts.delete(at);
    storeDrafts();
  }

  function draftOf(at) {
    const known = answers.get(at);
    const stored = { answer: known?.answer ?? null, confidence: known?.confidence ?? null, seconds: known?.seconds ?? 0 };
    const kept = drafts.get(at);
    return kept && kept.seconds >= stored.seconds ? { ...kept } : stored;
  }

  // ---- The current image ----

  async function showImage(at) {
    position = at;
    draft = draftOf(at);
    show("task");
    element("where").textContent = `Image ${at} of ${reading.images}`;
    element("progress").max = reading.images;
    element("progress").value = answers.size;
    element("done").textContent = `${answers.size} answered`;
    element("back").disabled = at === 1;
    element("next").textContent = at === reading.images ? "Finish" : "Next";
    showDraft();
    const image = element("image");
    image.hidden = true;
    busy = true;
    tell("Loading the image");
    try {
      image.src = await picture(at);
      await image.decode();
    } catch (error) {
      busy = false;
      if (error instanceof Refusal) refuseWith(error);
      else tell("The image cannot be shown. Load the page again.", true);
      return;
    }
    busy = false;
    if (position !== at) return;
    image.alt = `Image ${at}`;
    image.hidden = false;
    tell("");
    applyZoom();
    element("view").scrollTo(0, 0);
    startClock();
    if (at < reading.images && at <= answers.size + 1) picture(at + 1).catch(() => {});
  }

  // The browser shows a choice as soon as it is clicked. What is shown is what will be stored.
  function showDraft() {
    for (const input of element("work").querySelectorAll("input")) input.checked = String(draft[input.name]) === input.value;
  }

  function tell(text, problem = false) {
    element("message").textContent = text;
    element("message").classList.toggle("problem", problem);
  }

  function choose(name, value) {
    if (busy) { // the image is not there yet, or the answer is being stored
      showDraft();
      return;
    }
    draft[name] = value;
    element("work").querySelector(`input[name="${name}"][value="${value}"]`).checked = true;
    tell("");
    countTime();
    startClock();
    keepDraft();
  }

  async function next() {
    if (busy) return;
    if (draft.answer === null) { tell("First choose whether the image is real or generated."); return; }
    if (draft.confidence === null) { tell("First choose how sure you are."); return; }
    stopClock();
    busy = true;
    const answer = { answer: draft.answer, confidence: draft.confidence, seconds: Math.min(86400, Math.round(draft.seconds * 1000) / 1000) };
    tell("Storing the answer");
    try {
      const options = { method: "PUT", headers: { "Content-Type": "application/json" }, body: JSON.stringify(answer) };
      await insist(`v1/reading/answers/${position}`, options, () => tell("The answer is not stored yet. Trying again.", true));
    } catch (error) {
      busy = false;
      refuseWith(error);
      return;
    }
    busy = false;
    answers.set(position, { position, ...answer });
    forgetDraft(position);
    if (answers.size >= reading.images && position === reading.images) finish();
    else showImage(Math.min(position + 1, reading.images));
  }

  function back() {
    if (busy || position === 1) return;
    stopClock();
    keepDraft();
    showImage(position - 1);
  }

  // ---- Controls and keys ----

  element("reload").addEventListener("click", () => location.reload());
  element("begin").addEventListener("click", () => showImage(Math.min(answers.size + 1, reading.images)));
  element("return").addEventListener("click", () => showImage(reading.images));
  element("back").addEventListener("click", back);
  element("in").addEventListener("click", () => changeZoom(1));
  element("out").addEventListener("click", () => changeZoom(-1));
  element("fit").addEventListener("click", () => changeZoom(0));
  element("work").addEventListener("submit", (event) => { event.preventDefault(); next(); });
  element("work").addEventListener("change", (event) => {
    const { name, value } = event.target;
    if (name === "answer" || name === "confidence") choose(name, name === "confidence" ? Number(value) : value);
  });
  element("shortcuts").addEventListener("change", (event) => document.body.classList.toggle("silent", !event.target.checked));
  addEventListener("resize", applyZoom);
  addEventListener("hashchange", () => location.reload());

  document.addEventListener("keydown", (event) => {
    if (element("task").hidden || event.ctrlKey || event.metaKey || event.altKey || !element("shortcuts").checked) return;
    const key = event.key.toLowerCase();
    const button = event.target instanceof HTMLButtonElement;
    if (key === "enter" && !button && !event.repeat) next();
    else if (key === "backspace" && !event.repeat) back();
    else if (key === "r") choose("answer", "real");
    else if (key === "g") choose("answer", "generated");
    else if (/^[1-5]$/.test(key)) choose("confidence", Number(key));
    else if (key === "+" || key === "=") changeZoom(1);
    else if (key === "-") changeZoom(-1);
    else if (key === "0") changeZoom(0);
    else return;
    event.preventDefault();
  });

  start();
})();
