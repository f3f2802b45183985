// What a viewer of the page sees and hears, and when: the number in each picture, and marks in the sound.
// profiling/measure/viewer.py puts numbers and marks there, and says what they look like.

(() => {
  const POLL = 100; // ms between looks at the sound
  const WINDOW = 96, HOP = 48; // samples over which the mark's tone is measured, and from one to the next
  const PERIOD = 4; // samples of a period of the mark, at 48 kHz
  const LOUD = 0.015, LEAST = 12; // amplitude of a mark, and windows that it lasts at least
  const RENEW = 50; // looks after which a stream is taken anew

  const peers = [];
  window.RTCPeerConnection = class extends window.RTCPeerConnection {
    constructor(...settings) { super(...settings); peers.push(this); }
  };

  const empty = () => ({frames: [], marks: [], peak: 0, behind: []});
  let found = empty(), concealed = 0;

  /** Begins to watch the video, whose pictures have numbers of 4 x 4 blocks, `block` pixels each. */
  function watch(block) {
    const video = document.getElementById("video");
    watchPictures(video, block);
    watchSound(video);
  }

  function watchPictures(video, block) {
    const canvas = new OffscreenCanvas(4 * block, 4 * block), context = canvas.getContext("2d", {willReadFrequently: true});
    const look = (now, frame) => {
      context.drawImage(video, 0, 0);
      const {data} = context.getImageData(0, 0, 4 * block, 4 * block);
      let number = 0;
      for (let bit = 0; bit < 16; bit++) {
        const row = (bit >> 2) * block + block / 2, column = (bit & 3) * block + block / 2;
        if (data[4 * (row * 4 * block + column)] > 127) number |= 1 << bit;
      }
      found.frames.push([frame.expectedDisplayTime, number]);
      video.requestVideoFrameCallback(look);
    };
    video.requestVideoFrameCallback(look);
  }

  function watchSound(video) {
    const audio = new AudioContext({sampleRate: 48000}), analyser = audio.createAnalyser();
    const stream = video.srcObject;
    let source = stream ? audio.createMediaStreamSource(stream) : audio.createMediaElementSource(video);
    source.connect(analyser);
    if (!stream) analyser.connect(audio.destination); // the element itself is silent then
    analyser.fftSize = 16384;
    const wave = new Float32Array(analyser.fftSize);
    let heard = 0, lasts = 0; // context time up to which the sound was looked at; windows of the mark so far
    let looks = 0;
    setInterval(() => {
      if (stream && ++looks % RENEW === 0) { // what waits between a stream and Web Audio grows and never shrinks
        source.disconnect();
        source = audio.createMediaStreamSource(stream);
        source.connect(analyser);
      }
      analyser.getFloatTimeDomainData(wave);
      const {contextTime, performanceTime} = audio.getOutputTimestamp(), now = audio.currentTime;
      const begin = now - wave.length / 48000;
      for (let at = Math.max(0, Math.round((heard - begin) * 48000)); at + WINDOW <= wave.length; at += HOP) {
        const loud = amplitude(wave, at);
        lasts = loud > LOUD ? lasts + 1 : 0;
        if (lasts === LEAST) {
          const time = begin + (at - (LEAST - 1) * HOP + WINDOW / 2) / 48000;
          found.marks.push(performanceTime + 1000 * (time - contextTime));
        }
        heard = begin + (at + HOP) / 48000;
      }
      for (const value of wave) found.peak = Math.max(found.peak, Math.abs(value));
      readStatistics();
    }, POLL);
  }

  /** The amplitude of the mark's tone in a window. */
  function amplitude(wave, at) {
    let cosine = 0, sine = 0;
    for (let k = 0; k < WINDOW; k++) {
      const angle = 2 * Math.PI * k / PERIOD;
      cosine += wave[at + k] * Math.cos(angle);
      sine += wave[at + k] * Math.sin(angle);
    }
    return 2 * Math.hypot(cosine, sine) / WINDOW;
  }

  /** What the browser says of WebRTC: by how much sound is played behind its picture, and how much it made up. */
  async function readStatistics() {
    if (!peers.length) return;
    const times = {};
    (await peers.at(-1).getStats()).forEach(report => {
      if (report.type !== "inbound-rtp") return;
      if (report.estimatedPlayoutTimestamp) times[report.kind] = report.estimatedPlayoutTimestamp;
      if (report.kind === "audio") concealed = report.concealedSamples / 48000;
    });
    if (times.audio && times.video) found.behind.push(times.video - times.audio);
  }

  /** What was found since the last call. */
  function take() {
    const taken = {...found, concealed};
    found = empty();
    return taken;
  }

  window.viewer = {watch, take, peers};
})();
