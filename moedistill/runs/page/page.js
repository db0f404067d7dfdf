"use strict";
const data = JSON.parse(document.getElementById("videos").textContent);

/* One player: its videos show the same frame at any time. They play by themselves, which is smooth; the first one leads,
   and those that have gone more than half a frame away from it are put back. */
function player(root) {
  const videos = [...root.querySelectorAll("video")];
  const [play, back, on] = ["play", "back", "on"].map((name) => root.querySelector(`[data-do=${name}]`));
  const slider = root.querySelector("input");
  const shown = root.querySelector("output");
  const speed = root.querySelector("[data-speed]");
  const caption = root.querySelector("[data-caption]");
  let [frames, fps] = [1, 1];
  let playing = false;

  const present = () => videos.filter((video) => !video.closest("figure").hidden);
  const middle = (frame) => (frame + 0.5) / fps;
  const frameOf = (time) => Math.max(0, Math.min(frames - 1, Math.floor(time * fps + 1e-3)));

  function say(frame) {
    slider.value = frame;
    shown.textContent = `${frame + 1} / ${frames}`;
  }
  function seek(frame) {
    for (const video of present()) video.currentTime = middle(frame);
    say(frame);
  }
  function stop() {
    playing = false;
    play.textContent = "Play";
    for (const video of videos) video.pause();
  }
  function start() {
    const all = present();
    if (!all.length) return;
    playing = true;
    play.textContent = "Pause";
    seek(frameOf(all[0].currentTime) >= frames - 1 ? 0 : frameOf(all[0].currentTime));
    for (const video of all) {
      video.playbackRate = Number(speed.value);
      video.play().catch(stop);
    }
    requestAnimationFrame(follow);
  }
  function follow() {
    if (!playing) return;
    const [first, ...others] = present();
    if (first.ended) {
      start();
      return;
    }
    for (const video of others) {
      const apart = Math.abs(video.currentTime - first.currentTime);
      if (apart > 0.5 / fps && !video.seeking) video.currentTime = first.currentTime;
    }
    say(frameOf(first.currentTime));
    requestAnimationFrame(follow);
  }
  function choose() {
    stop();
    const row = caption ? Number(caption.value) : 0;
    for (const video of videos) {
      const key = JSON.parse(video.dataset.keys)[row];
      video.closest("figure").hidden = !key;
      if (!key) continue;
      video.src = data[key].uri;
      video.onloadeddata = () => {
        video.classList.toggle("small", video.videoWidth < 200);
        if (!playing) video.currentTime = middle(Number(slider.value));
      };
      [frames, fps] = [data[key].frames, data[key].fps];
    }
    slider.max = frames - 1;
    say(Math.min(Number(slider.value), frames - 1));
  }

  const step = (by) => {
    const frame = Number(slider.value);
    stop();
    seek(Math.max(0, Math.min(frames - 1, frame + by)));
  };
  play.onclick = () => (playing ? stop() : start());
  back.onclick = () => step(-1);
  on.onclick = () => step(1);
  slider.oninput = () => {
    stop();
    seek(Number(slider.value));
  };
  speed.onchange = () => {
    for (const video of videos) video.playbackRate = Number(speed.value);
  };
  if (caption) caption.onchange = choose;
  choose();
}

document.querySelectorAll(".player").forEach(player);
