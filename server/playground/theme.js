// Runs before the page is drawn, so that a chosen theme does not flash; a module would run after.
document.documentElement.dataset.theme = localStorage.getItem("lpa-theme") ?? "auto";
