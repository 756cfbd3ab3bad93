// Sliders beside the numbers of a form.

/** One beside every number that has both limits; the keyboard has the number itself. */
export function addSliders(form) {
  for (const control of form.querySelectorAll(".control:not(.plain, .wide)")) {
    const number = control.querySelector("input");
    const slider = Object.assign(document.createElement("input"), { type: "range", tabIndex: -1 });
    for (const name of ["min", "max", "step"]) slider[name] = number[name];
    slider.setAttribute("aria-hidden", "true");
    slider.defaultValue = number.value;
    slider.addEventListener("input", () => {
      number.value = slider.value;
      number.dispatchEvent(new Event("input", { bubbles: true }));
    });
    number.addEventListener("input", () => (slider.value = number.value));
    control.append(slider);
  }
}
