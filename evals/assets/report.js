"use strict";
// A link into the page opens the section it leads to.
const unfold = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
  }
};
addEventListener("hashchange", unfold);
unfold();
const form = document.querySelector(".filters");
if (form) {
  const rows = [...document.querySelectorAll(".samples tbody tr")].map((row) => ({
    row,
    domain: row.closest(".domain").dataset.domain,
    outcomes: row.dataset.outcomes.split(" "),
    text: [...row.querySelectorAll("pre")].map((pre) => pre.textContent).join("\n").toLowerCase(),
  }));
  const apply = () => {
    const { domain, outcome, text } = form.elements;
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const one of rows) {
      const fits =
        (!domain.value || one.domain === domain.value) &&
        (!outcome.value || one.outcomes.includes(outcome.value)) &&
        one.text.includes(wanted);
      one.row.hidden = !fits;
      shown += fits;
    }
    for (const block of document.querySelectorAll(".domain")) {
      block.hidden = !block.querySelector("tbody tr:not([hidden])");
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length} examples shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}

// Browsers without `::details-content` print what is open; what was closed closes again.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach((details) => (details.open = true));
});
addEventListener("afterprint", () => closed.forEach((details) => (details.open = false)));
