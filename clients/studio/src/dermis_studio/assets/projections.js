// The projections that were made in this browser, for the pages that begin with one. The service lists no projections: whoever
// knows the id of one can read it. So the ids stay here, until they are deleted, expire, or the visitor signs out.
(() => {
  "use strict";
  const STORE = "dermis-projections";
  const MOST = 20;
  const tenant = () => document.querySelector(".ds-tenant")?.textContent || "";

  const read = () => {
    try {
      const kept = JSON.parse(localStorage.getItem(STORE) || "[]");
      return Array.isArray(kept) ? kept.filter((each) => /^pr_[0-9a-f]{32}$/.test(each.id) && each.until > Date.now()) : [];
    } catch { return []; } // storage is off
  };
  const write = (kept) => { try { localStorage.setItem(STORE, JSON.stringify(kept.slice(0, MOST))); } catch { /* storage is off */ } };

  window.dermisProjections = {
    // Those of the tenant, the newest first: id and words of each.
    list: () => read().filter((each) => each.tenant === tenant()).map(({ id, made }) => {
      const when = new Date(made).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
      return { id, words: `${when} (${id.slice(0, 11)})` };
    }),
    // Keep the id of a finished projection until it expires. Both times are texts such as 2026-11-30T00:00:00Z.
    remember: (id, made, until) => {
      const others = read().filter((each) => each.id !== id);
      const entry = { id, made: Date.parse(made), until: Date.parse(until), tenant: tenant() };
      write([entry, ...others].sort((one, other) => other.made - one.made));
    },
    forget: (id) => write(read().filter((each) => each.id !== id)),
  };
})();
