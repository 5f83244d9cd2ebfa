// Papers, Executed: what CSS alone cannot do. No library, nothing fetched.
"use strict";

document.documentElement.classList.add("js");
if (document.getElementById("search-results")) document.documentElement.classList.add("search-page");

// Formulas and generated tables that scroll in their own box can be reached with the keyboard; the theme does this for code.
function boxWideContent() {
  for (const formula of document.querySelectorAll("mjx-container:not([display])")) {
    const room = formula.closest("p, li, dd, td, th, h1, h2, h3, figcaption, div").clientWidth;
    formula.classList.toggle("wide", formula.scrollWidth > room);
  }
  for (const box of document.querySelectorAll(".scroll-box, mjx-container")) {
    if (box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX === "auto") {
      box.tabIndex = 0;
    } else {
      box.removeAttribute("tabindex");
    }
  }
}

// The list of all papers: show those that have every word typed.
function filterPapers() {
  const input = document.getElementById("paper-filter");
  if (!input) return;
  const papers = [...document.querySelectorAll(".paper")];
  const count = document.querySelector(".paper-filter-count");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const paper of papers) {
      const text = paper.textContent.toLowerCase();
      paper.hidden = !words.every((word) => text.includes(word));
      shown += paper.hidden ? 0 : 1;
    }
    for (const part of document.querySelectorAll(".paper-list section")) {
      part.hidden = !part.querySelector(".paper:not([hidden])");
    }
    count.textContent = shown === 1 ? "1 paper" : `${shown} papers`;
  });
}

// The theme's folding arrows in the sidebar have no name.
function nameFolds() {
  for (const summary of document.querySelectorAll(".bd-links summary")) {
    const link = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `Pages under ${link.textContent.trim()}`);
  }
}

// Paper is light.
function printLight() {
  const root = document.documentElement;
  let theme;
  addEventListener("beforeprint", () => { theme = root.dataset.theme; root.dataset.theme = "light"; });
  addEventListener("afterprint", () => { root.dataset.theme = theme; });
}

filterPapers();
printLight();
nameFolds();
new ResizeObserver(boxWideContent).observe(document.querySelector("article") ?? document.body);
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  boxWideContent();
});
