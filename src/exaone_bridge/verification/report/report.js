// Shows the values of the dot that is nearest to the pointer; without JavaScript a dot has a title.
for (const plot of document.querySelectorAll(".frame svg.plot")) {
  const box = document.getElementById("value");
  const dots = [...plot.querySelectorAll("circle")].map((dot) => {
    const title = dot.querySelector("title");
    title.remove();
    return { dot, text: title.textContent };
  });
  let chosen = null;
  const hide = () => {
    chosen?.dot.classList.remove("chosen");
    chosen = null;
    box.style.visibility = "hidden";
  };
  const show = (event) => {
    const frame = plot.getBoundingClientRect();
    const distance = ({ dot }) => {
      const place = dot.getBoundingClientRect();
      const x = place.left + place.width / 2 - event.clientX;
      const y = place.top + place.height / 2 - event.clientY;
      return x * x + (y * y) / 16; // the pointer's column counts more than its height
    };
    hide();
    chosen = dots.reduce((best, each) => (distance(each) < distance(best) ? each : best));
    chosen.dot.classList.add("chosen");
    box.textContent = chosen.text;
    box.style.visibility = "visible";
    const place = chosen.dot.getBoundingClientRect();
    const left = place.left - frame.left + 14;
    const flipped = left + box.offsetWidth > frame.width ? left - box.offsetWidth - 24 : left;
    box.style.left = `${Math.max(0, Math.min(flipped, frame.width - box.offsetWidth))}px`;
    const top = place.top - frame.top;
    const below = top + 16 + box.offsetHeight > frame.height;
    box.style.top = `${below ? top - box.offsetHeight - 8 : top + 16}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
