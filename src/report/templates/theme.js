(function () {
  // before anything is drawn: the theme that was chosen here before, where it may be remembered
  try {
    var kept = localStorage.getItem("unlora-theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch (error) { /* a page from a file may have no storage */ }
  document.documentElement.classList.add("js");
})();
