// Shows how much of an image has been sent, and lets the visitor stop it. Gradio sends the values of a page in one request by
// fetch, which does not report its progress. So a large request is sent by XMLHttpRequest.
(() => {
  "use strict";
  const EVENT = /\/gradio_api\/queue\/join(?:\?|$)/;
  const LARGE_CHARACTERS = 256 * 1024; // a smaller request takes a moment on any line
  const SHOWN_AFTER = 300; // milliseconds
  // Gradio takes it for values that were refused without a reason: it ends the event, and shows nothing.
  const STOPPED = () => new Response('{"detail": []}', { status: 422, headers: { "Content-Type": "application/json" } });
  const byFetch = window.fetch.bind(window);

  const megabytes = (count) => `${(count / 1e6).toFixed(1)} MB`;
  const element = (name, attributes, ...content) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...content);
    return made;
  };

  // The place at the end of the page where it is shown; it stays in view.
  const words = element("p", { role: "status" });
  const amount = element("span", { class: "ds-muted" });
  const filled = element("i", {});
  const bar = element("div", { class: "ds-bar", role: "progressbar", "aria-label": "Sent", "aria-valuemin": 0, "aria-valuemax": 100 }, filled);
  const stop = element("button", { type: "button", class: "ds-button" }, "Stop sending");
  const place = element("div", { class: "ds-sending" }, element("div", { class: "ds-progress" }, words), stop);
  document.getElementById("ds-main").append(place);

  let newest = 0; // the number of the last request
  const show = (text, sending) => {
    words.textContent = text;
    if (sending) words.after(bar, amount);
    else for (const each of [bar, amount]) each.remove();
    stop.hidden = !sending;
    place.hidden = !text;
  };
  show("", false);
  const showSent = (sent, total) => {
    const percent = total ? Math.round(100 * sent / total) : 0;
    bar.setAttribute("aria-valuenow", percent);
    filled.style.width = `${percent}%`;
    amount.textContent = `${megabytes(sent)} of ${megabytes(total)}`;
  };
  // What happened to the last one is shown until the visitor goes on.
  document.addEventListener("click", () => { if (stop.hidden) show("", false); });

  const send = (address, body, headers) => new Promise((resolve, reject) => {
    const number = ++newest, request = new XMLHttpRequest(), before = document.activeElement;
    const end = (text) => {
      clearTimeout(timer);
      if (number !== newest) return;
      const focused = document.activeElement === stop;
      show(text, false);
      if (focused && before?.isConnected) before.focus({ preventScroll: true });
    };
    const timer = setTimeout(() => {
      if (number !== newest) return;
      show("Sending the image", true);
      stop.focus({ preventScroll: true });
    }, SHOWN_AFTER);
    show("", false);
    showSent(0, body.length);
    stop.onclick = (event) => { event.stopPropagation(); request.abort(); };
    request.open("POST", address);
    for (const [name, value] of new Headers(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = ({ loaded, total }) => { if (number === newest) showSent(loaded, total); };
    request.upload.onload = () => end(""); // from here the page shows what is done, and stops it
    request.onload = () => {
      const type = request.getResponseHeader("Content-Type") || "application/json";
      end("");
      resolve(new Response(request.responseText, { status: request.status, headers: { "Content-Type": type } }));
    };
    request.onabort = () => { end("Stopped. The image was not sent."); resolve(STOPPED()); };
    request.onerror = () => { end(""); reject(new TypeError("Failed to fetch")); };
    request.send(body);
  });

  window.fetch = (address, options) => {
    const body = options?.body;
    const large = typeof body === "string" && body.length > LARGE_CHARACTERS && EVENT.test(String(address));
    return large ? send(String(address), body, options.headers) : byFetch(address, options);
  };
})();
