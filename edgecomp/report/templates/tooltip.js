"use strict";
const tip = document.getElementById("tip");
function show(event) {
  const mark = event.target.closest(".mark");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("aria-label");
  const at = mark.querySelector("use").getBoundingClientRect(), page = document.documentElement;
  const left = Math.min(at.right + 12, page.clientWidth - tip.offsetWidth - 8);
  const above = at.top - tip.offsetHeight - 12;
  tip.style.left = Math.max(8, left) + scrollX + "px";
  tip.style.top = (above > 0 ? above : at.bottom + 12) + scrollY + "px";
}
function hide() { tip.hidden = true; }
for (const chart of document.querySelectorAll(".chart")) {
  for (const name of ["pointerover", "focusin"]) chart.addEventListener(name, show);
  for (const name of ["pointerleave", "focusout"]) chart.addEventListener(name, hide);
}
addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
