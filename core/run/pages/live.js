"use strict";
// The run writes live.js beside this page with each change. It is read as a script, since pages that are opened as files may read no others.
const every = 5000, quiet = 600;
let stamp = 0, missing = 0;
function treetune(update) {
  missing = 0;
  const age = Date.now() / 1000 - update.stamp, note = document.getElementById("news");
  note.textContent = age < quiet ? "" : "no news for " + Math.round(age / 60) + " minutes: the run waits, or has ended without a word";
  if (update.stamp === stamp) return;
  stamp = update.stamp;
  for (const [id, html] of Object.entries(update.parts)) document.getElementById(id).innerHTML = html;
}
function gone() {
  // The run has ended, and this page is another one now. A server may be away for a while, whose error page would take its place.
  if (location.protocol === "file:") { if (++missing > 1) location.reload(); return; }
  fetch(location.href, { cache: "no-store" }).then(answer => { if (answer.ok && ++missing > 1) location.reload(); }).catch(() => {});
}
function ask() {
  const script = document.createElement("script");
  script.src = "live.js?" + Date.now();
  script.onload = () => script.remove();
  script.onerror = () => { script.remove(); gone(); };
  document.head.append(script);
}
ask();
setInterval(ask, every);
