// Shows a session in a video element: by WebRTC, or where that does not get through, by MP4 over a WebSocket.

const CONNECT = 5000; // ms until WebRTC is given up
const TARGET = 0.15; // s of MP4 that are buffered

/**
 * Plays the session; resolves to the player once the video plays. `way` is "mp4" to not try WebRTC.
 * Once `gone` is rejected, it is given up. `lost` is called if the connection of the video fails later.
 */
export async function play(session, video, way, gone, lost) {
  if (way !== "mp4" && window.RTCPeerConnection) {
    try {
      return await playRtc(session, video, gone, lost);
    } catch (error) {
      console.info("WebRTC does not get through, so the video comes as MP4:", error.message);
    }
  }
  return playMp4(session, video, gone, lost);
}

async function playRtc(session, video, gone, lost) {
  const peer = new RTCPeerConnection({iceServers: session.facts.ice_servers});
  const stream = new MediaStream();
  let place = null, shown = false;
  try {
    for (const kind of ["audio", "video"]) peer.addTransceiver(kind, {direction: "recvonly"});
    peer.ontrack = ({track}) => stream.addTrack(track);
    const connected = new Promise((resolve, reject) => {
      peer.onconnectionstatechange = () => {
        if (peer.connectionState === "connected") resolve();
        if (peer.connectionState === "failed") shown ? lost() : reject(new Error("no way through"));
      };
      setTimeout(reject, CONNECT, new Error(`no connection within ${CONNECT / 1000} s`));
    });
    connected.catch(() => {}); // it may fail before it is awaited
    await peer.setLocalDescription();
    await gathered(peer);
    const {sdp, location} = await session.offer(peer.localDescription.sdp);
    place = location;
    await peer.setRemoteDescription({type: "answer", sdp});
    await Promise.race([connected, gone]);
    video.srcObject = stream;
    await Promise.race([start(video), gone]);
    shown = true;
  } catch (error) {
    video.srcObject = null;
    peer.close();
    if (place) session.leave(place).catch(() => {}); // it may have ended there first
    throw error;
  }
  return {path: "WebRTC", close: () => { video.srcObject = null; peer.close(); }};
}

/** Until all candidates are known, but no longer than a second: the first ones are the near ones. */
function gathered(peer) {
  return new Promise(resolve => {
    const done = () => peer.iceGatheringState === "complete" && resolve();
    peer.onicegatheringstatechange = done;
    setTimeout(resolve, 1000);
    done();
  });
}

async function playMp4(session, video, gone, lost) {
  const Source = window.ManagedMediaSource ?? window.MediaSource;
  if (!Source?.isTypeSupported(session.facts.mime)) throw new Error("This browser plays neither WebRTC nor MP4 streams.");
  const source = new Source(), waiting = [];
  video.disableRemotePlayback = true; // ManagedMediaSource wants that
  video.src = URL.createObjectURL(source);
  await new Promise(resolve => source.addEventListener("sourceopen", resolve, {once: true}));
  const buffer = source.addSourceBuffer(session.facts.mime);
  const append = () => {
    if (buffer.updating || source.readyState !== "open") return;
    const end = buffered(video), old = video.currentTime - 10;
    if (waiting.length) buffer.appendBuffer(waiting.shift());
    else if (end && video.buffered.start(0) < old - 10) buffer.remove(0, old);
  };
  buffer.addEventListener("updateend", append);
  let shown = false, fail;
  const failed = new Promise((_, reject) => { fail = reject; });
  const socket = await session.socket({video: "fmp4"}, {
    media: (kind, body) => { waiting.push(body); append(); },
    clear: () => { if (buffered(video)) video.currentTime = buffered(video) - 0.02; },
    error: ({message}) => fail(new Error(message)),
    bye: () => socket.close(), // the page hears it, too
    close: () => shown ? lost() : fail(new Error("The connection for the video was lost.")),
  });
  let steering;
  const close = () => { clearInterval(steering); socket.close(); video.removeAttribute("src"); video.load(); };
  try {
    const begins = new Promise(resolve => buffer.addEventListener("updateend", () => buffered(video) && resolve()));
    await Promise.race([begins, failed, gone]);
    video.currentTime = Math.max(video.buffered.start(0), buffered(video) - TARGET);
    await Promise.race([start(video), failed, gone]);
  } catch (error) {
    close();
    throw error;
  }
  shown = true;
  steering = setInterval(() => steer(video), 100);
  return {path: "MP4", close};
}

/** Plays the video; without its sound where the browser allows that only after another click. */
async function start(video) {
  try {
    await video.play();
  } catch (error) {
    if (error.name !== "NotAllowedError") throw error;
    video.muted = true;
    await video.play();
  }
}

function buffered(video) {
  return video.buffered.length ? video.buffered.end(video.buffered.length - 1) : 0;
}

/** Stays at the live edge: a little faster or slower where that is enough, else by a jump. */
function steer(video) {
  const ahead = buffered(video) - video.currentTime;
  if (ahead > TARGET + 0.5) video.currentTime = buffered(video) - TARGET;
  else video.playbackRate = ahead > TARGET + 0.1 ? 1.05 : ahead < TARGET - 0.08 ? 0.97 : 1;
}
