// What this browser can show at best, now: a canvas that is drawn 25 times a second and sent to itself by WebRTC.
async () => {
  const FRAMES = 125;
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  const video = document.body.appendChild(document.createElement("video"));
  canvas.width = canvas.height = 128;
  let drawn = 0;
  const drawing = setInterval(() => {
    context.fillStyle = `hsl(${drawn++ * 40} 80% 50%)`;
    context.fillRect(0, 0, 128, 128);
  }, 40);
  const here = new RTCPeerConnection(), there = new RTCPeerConnection();
  here.onicecandidate = ({candidate}) => there.addIceCandidate(candidate);
  there.onicecandidate = ({candidate}) => here.addIceCandidate(candidate);
  there.ontrack = ({streams}) => { video.srcObject = streams[0]; };
  const stream = canvas.captureStream(25);
  here.addTrack(stream.getTracks()[0], stream);
  await here.setLocalDescription();
  await there.setRemoteDescription(here.localDescription);
  await there.setLocalDescription();
  await here.setRemoteDescription(there.localDescription);
  video.muted = true;
  const times = [];
  await new Promise(resolve => {
    const look = (now, {expectedDisplayTime}) => {
      times.push(expectedDisplayTime);
      if (times.length < FRAMES) video.requestVideoFrameCallback(look);
      else resolve();
    };
    video.requestVideoFrameCallback(look);
    video.autoplay = true;
  });
  clearInterval(drawing);
  here.close();
  there.close();
  return times.slice(25); // until it has found its pace
}
