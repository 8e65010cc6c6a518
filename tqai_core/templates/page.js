// The slider between two pictures, and everything that moves in step.
for (const slide of document.querySelectorAll(".slide")) {
  const over = slide.parentElement.querySelector(".over");
  slide.oninput = () => over.style.setProperty("--cut", slide.value + "%");
  slide.oninput();
}
addEventListener("load", () => {
  document.body.classList.add("playing");
  for (const moving of document.querySelectorAll("img[src$='.gif'], img[src$='.webp']")) moving.src = moving.src;
  const films = [...document.querySelectorAll("video")];
  for (const film of films) film.play().catch(() => {});
  const first = films[0];
  if (first) first.ontimeupdate = () => {
    for (const film of films) if (Math.abs(film.currentTime - first.currentTime) > 0.05) film.currentTime = first.currentTime;
  };
});
