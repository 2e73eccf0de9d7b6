// Sends the images of a reader study in requests of a few images. A request is repeated when the service is busy, and is made
// small enough for a slow line: the service waits 60 s for the images of one (DERMIS_UPLOAD_TIMEOUT_SECONDS).
(() => {
  "use strict";
  const MIB = 1024 * 1024;
  const MOST_FILES = 8;
  const FIRST_BYTES = MIB; // of the first request, which measures the line
  const LEAST_BYTES = MIB / 4;
  const MOST_BYTES = 24 * MIB;
  const REQUEST_SECONDS = 8; // that a request should take
  const LONGEST_WAIT = 120; // quotas of a day name hours, for which nobody waits with an open page
  const MOST_REFUSALS = 30; // one after another
  const MOST_LOST = 5;
  const LOST_WAIT = 5;
  const LATE_SECONDS = 45; // a connection that breaks after so long was too slow

  // The next files whose sizes are at most `bytes` together, at least one.
  const nextFiles = (files, first, bytes) => {
    const batch = [];
    let sum = 0;
    for (const file of files.slice(first, first + MOST_FILES)) {
      if (batch.length && sum + file.size > bytes) break;
      sum += file.size;
      batch.push(file);
    }
    return batch;
  };

  const pause = (seconds, signal) => new Promise((resolve) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });

  const send = async (address, batch, signal) => {
    const form = new FormData();
    batch.forEach((file, place) => form.append("files", file, `image-${place}`));
    try {
      return await fetch(address, { method: "POST", body: form, signal });
    } catch {
      return null; // the connection was lost, or the upload was stopped
    }
  };

  // What is wrong, with the names of the files that the service does not take, and what the problem document says of it.
  const problemOf = async (answer, batch) => {
    const document = await answer.json().catch(() => ({}));
    const names = (document.errors || []).map((item) => {
      const place = /^files\[(\d+)\]$/.exec(item.field);
      return place ? `${batch[Number(place[1])].name} ${item.message}` : "";
    }).filter(Boolean);
    const problem = names.join("; ") || document.detail || document.title || "The service refused the images";
    return { problem, title: document.title || "", status: answer.status, wait: Number(answer.headers.get("Retry-After")) || null };
  };

  const waitOf = (answer) => {
    const seconds = Number(answer.headers.get("Retry-After") || NaN);
    return Number.isFinite(seconds) && seconds >= 0 ? Math.max(1, seconds) : LOST_WAIT;
  };

  // Send files to an address. `tell(done, words)` is called with the number of those that have arrived.
  // Returns that number and what is wrong, which is empty if nothing is; if the service says it, with its title and status.
  window.dermisUpload = async (address, files, signal, tell) => {
    let done = 0, bytes = FIRST_BYTES, refusals = 0, lost = 0;
    while (done < files.length && !signal.aborted) {
      const batch = nextFiles(files, done, bytes);
      tell(done, "");
      const started = performance.now();
      const answer = await send(address, batch, signal);
      const seconds = (performance.now() - started) / 1000;
      if (signal.aborted) break;
      const size = batch.reduce((sum, file) => sum + file.size, 0);
      const late = answer === null ? seconds > LATE_SECONDS : answer.status === 408; // the images did not arrive in time
      if (late) {
        if (size <= LEAST_BYTES) lost += 1; // the next attempt sends the same files
        if (batch.length === 1 || lost >= MOST_LOST) {
          const what = batch.length === 1 ? batch[0].name : "The images";
          return { done, problem: `${what} did not arrive in time. Choose smaller files, or use a faster connection` };
        }
        bytes = Math.max(LEAST_BYTES, size / 4);
      } else if (answer === null) {
        lost += 1;
        if (lost >= MOST_LOST) return { done, problem: "The service does not respond. Choose the files again to continue" };
        tell(done, `The service does not respond. The upload continues in ${LOST_WAIT} s.`);
        await pause(LOST_WAIT, signal);
      } else if (answer.status === 429 || answer.status === 503) {
        const wait = waitOf(answer);
        refusals += 1;
        if (wait > LONGEST_WAIT || refusals >= MOST_REFUSALS) return { done, ...(await problemOf(answer, batch)) };
        tell(done, `The service is busy. The upload continues in ${Math.ceil(wait)} s.`);
        await pause(wait, signal);
      } else if (!answer.ok) {
        return { done, ...(await problemOf(answer, batch)) };
      } else {
        done += batch.length;
        refusals = lost = 0;
        bytes = Math.min(MOST_BYTES, Math.max(LEAST_BYTES, (size / Math.max(seconds, 0.001)) * REQUEST_SECONDS));
      }
    }
    return { done, problem: "" };
  };
})();
