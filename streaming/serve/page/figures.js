// The live figures: what the server measures, and how many frames this page shows.

const $ = id => document.getElementById(id);
const seconds = value => value == null ? "–" : value < 9.95 ? value.toFixed(2) : value.toFixed(0);

export class Figures {
  constructor(video) {
    this.video = video;
    this.frames = 0;
    this.since = performance.now();
    this.history = {fps: [], latency: []};
    this.counting = true;
    const count = (now, frame) => {
      this.frames = frame.presentedFrames - (this.first ??= frame.presentedFrames);
      if (this.counting) video.requestVideoFrameCallback(count);
    };
    video.requestVideoFrameCallback?.(count);
  }

  /** The server's `stats`, once a second. */
  show(stats) {
    const now = performance.now(), shown = (this.frames - (this.last ?? 0)) * 1000 / (now - this.since);
    const fps = Math.min(shown, stats.fps); // frames that are held and shown again do not count
    this.last = this.frames;
    this.since = now;
    put("fps", fps.toFixed(1), "", fps < 22);
    put("latency", `${seconds(stats.latency_p50)} / ${seconds(stats.latency_p95)}`, "s");
    put("queue", seconds(stats.queue), "s", stats.queue > 5);
    put("made", seconds(stats.made), "s");
    if (stats.speed == null) put("speed", "–");
    else put("speed", stats.speed.toFixed(2), "× real time", stats.lagging || stats.speed < 1);
    put("held", stats.held, stats.dropped ? `and ${stats.dropped} lost` : "");
    this.draw("fps", fps, 30);
    if (stats.latency_p50 != null) this.draw("latency", stats.latency_p50, 4);
  }

  draw(name, value, top) {
    const values = this.history[name];
    values.push(value);
    if (values.length > 60) values.shift();
    const points = values.map((v, k) => `${60 - values.length + k + 1},${(19 - 18 * Math.min(1, v / top)).toFixed(1)}`);
    $(`${name}-spark`).firstElementChild.setAttribute("points", points.join(" "));
  }

  path(name) {
    put("path", name);
  }

  trip(ms) {
    put("trip", ms.toFixed(0), "ms");
  }

  stop() {
    this.counting = false;
  }
}

function put(id, value, unit = "", warn = false) {
  const place = $(id), small = document.createElement("small");
  small.textContent = unit && ` ${unit}`;
  place.replaceChildren(String(value), small);
  place.classList.toggle("warn", warn);
}
