"use strict";
// Fetches the page anew when the run's files have changed; keeps the place and what was unfolded.
let seen = null;
async function refresh() {
  try {
    const version = await (await fetch("version", { cache: "no-store" })).text();
    if (seen !== null && seen !== version) {
      const page = new DOMParser().parseFromString(await (await fetch(".", { cache: "no-store" })).text(), "text/html");
      const open = [...document.querySelectorAll("details[open] > summary")].map((summary) => summary.textContent);
      page.querySelectorAll("script").forEach((script) => script.remove());
      document.body.replaceChildren(...page.body.children);
      document.title = page.title;
      for (const summary of document.querySelectorAll("details > summary")) summary.parentElement.open = open.includes(summary.textContent);
    }
    seen = version;
  } catch { document.title = "(no connection) " + document.title.replace("(no connection) ", ""); }
  setTimeout(refresh, 2000);
}
refresh();
