// The page: choose a face, talk or drop a recording, see and hear the portrait.

import {create, portraits} from "./api.js";
import {Figures} from "./figures.js";
import {play} from "./player.js";
import {Voice} from "./voice.js";

const $ = id => document.getElementById(id);
const body = document.body, video = $("video");
const PATIENCE = 30000; // ms in which a session whose connection was lost has to be found again
const RETRY = 2000; // ms from one try to the next
const BEHIND = 3; // s of sound that wait; with more, the microphone pauses until the face has caught up
const STATES = {
  idle: "Waiting", listening: "Listening", speaking: "Speaking", interrupted: "Interrupted", closed: "Ended",
  reconnecting: "Reconnecting", moving: "Moving to another server",
};
const ENDS = {
  idle: "The session has ended: nobody has spoken for a while.",
  unattended: "The session has ended: the connection was lost.",
  draining: "The server is shutting down.",
  lost: "The connection to the server was lost, and the session could not go on.",
  failed: "Generation has failed.",
};

let session = null, socket = null, player = null, voice = null, figures = null;
let segment = 0, talking = false, opening = false, queued = 0, upload = null;

// --- Token, theme, faces ---------------------------------------------------------------------------------------------

const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.token = given;
  history.replaceState(null, "", location.pathname + location.search);
}
const needToken = () => { $("token-field").hidden = false; $("token").focus(); };
if (!sessionStorage.token) $("token-field").hidden = false;

const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => { document.documentElement.dataset.theme = localStorage.theme ?? (dark.matches ? "dark" : "light"); };
dark.addEventListener("change", paint);
paint();
$("theme").onclick = () => {
  localStorage.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  paint();
};

async function showFaces() {
  const names = await portraits();
  $("faces").replaceChildren(...names.map((name, k) => {
    const label = document.createElement("label"), input = document.createElement("input");
    const image = document.createElement("img"), text = document.createElement("span");
    Object.assign(input, {type: "radio", name: "face", value: name, checked: k === 0});
    Object.assign(image, {src: `/v1/portraits/${encodeURIComponent(name)}`, alt: ""});
    text.textContent = name;
    input.onchange = () => { upload = null; $("portrait").value = ""; showChoice(image.src); };
    label.append(input, image, text);
    return label;
  }));
  const first = $("faces").querySelector("img");
  if (first) showChoice(first.src);
}

function showChoice(source) {
  $("still").src = source;
  $("upload").classList.toggle("chosen", upload !== null);
  $("upload-text").textContent = upload ? upload.name : "Use a picture of your own";
}

$("portrait").onchange = ({target}) => {
  if (!target.files.length) return;
  upload = target.files[0];
  const chosen = $("faces").querySelector(":checked");
  if (chosen) chosen.checked = false;
  showChoice(URL.createObjectURL(upload));
};

// --- A session -------------------------------------------------------------------------------------------------------

$("choose").onsubmit = async event => {
  event.preventDefault();
  const face = upload ?? $("faces").querySelector(":checked")?.value;
  if (!face) return complain("Choose a face first.");
  if ($("token").value) sessionStorage.token = $("token").value.trim();
  $("start").disabled = true;
  phase("starting");
  tell("Preparing the portrait");
  voice = new Voice(hear); // within the click, so that the browser lets it run
  try {
    session = await create(sessionStorage.token ?? "", face, {kind: "segments"});
    await begin(session);
  } catch (error) {
    if (body.dataset.phase === "starting") await giveUp(error); // else it has ended already, and the page said why
  }
  $("start").disabled = false;
};

async function giveUp(error) {
  const refused = error.code === "unauthorised";
  if (refused) needToken();
  complain(refused ? "The token is missing or wrong: see what the server has printed." : error.message);
  await finish();
}

/** Connects to a session and shows it. Throws if that fails, or if the session ends before it is seen. */
async function begin(begun, way = new URLSearchParams(location.search).get("video")) {
  let seen = false, welcome, fail;
  const ready = new Promise(resolve => { welcome = resolve; });
  const gone = new Promise((_, reject) => { fail = reject; });
  gone.catch(() => {}); // it may fail before it is awaited
  begun.over.then(() => fail(new Error("The session has ended.")));
  const lose = (reason, state) => seen ? move(reason, state) : fail(new Error(ENDS[reason]));
  const opened = socket = await begun.socket({audio: {rate: voice.rate}}, {
    ready: message => { segment = message.next_segment; show(message.state); welcome(); },
    state: ({state}) => show(state),
    playback_started: message => { if (!talking) use(message.segment + 1); },
    playback_finished: message => use(message.segment + 1), // while somebody talks, it was interrupted
    stats: stats => { queued = stats.queue; figures?.show(stats); socket.tell({type: "ping", t: performance.now()}); },
    pong: ({t}) => figures?.trip(performance.now() - t),
    error: error => complain(error.message),
    bye: ({reason}) => {
      if (reason === "lost" || reason === "draining") return lose(reason, "moving");
      if (ENDS[reason]) complain(ENDS[reason]);
      begun.markEnded();
      finish();
    },
    close: () => lose("unattended", "reconnecting"),
    any: note,
  });
  try {
    await Promise.race([ready, gone]);
    tell("Connecting");
    $("frame").style.setProperty("--ratio", begun.facts.width / begun.facts.height);
    player = await play(begun, video, way, gone, () => move("unattended", "reconnecting", "mp4"));
  } catch (error) {
    opened.close();
    throw error;
  }
  seen = true;
  figures = new Figures(video);
  figures.path(player.path);
  phase("live");
  body.dataset.shown = "video";
  show(body.dataset.state); // a session that goes on may speak
  hint(video.muted ? "Press Sound to hear the portrait." : "Press Talk, or drop a recording onto the portrait.");
}

/** Finds the session again: where it was, or at another server, where the last one has left it. */
async function move(reason, state, way) {
  const moved = session, end = performance.now() + PATIENCE;
  stopTalking();
  disconnect();
  phase("moving");
  show(state);
  hint("The session goes on as soon as the connection is back.");
  while (session === moved && performance.now() < end) {
    try {
      await moved.resume();
      if (session === moved) return await begin(moved, way);
    } catch (error) {
      if (error.code === "not_found") { // it was not kept
        moved.markEnded();
        break;
      }
      await new Promise(resolve => setTimeout(resolve, RETRY));
      if (session === moved) show(state);
    }
  }
  if (session !== moved) return; // it was ended meanwhile
  complain(ENDS[reason]);
  finish();
}

function disconnect() {
  figures?.stop();
  player?.close();
  socket?.close();
  figures = player = socket = null;
  delete body.dataset.shown;
}

async function finish() {
  const ended = session;
  session = null;
  stopTalking();
  disconnect();
  voice?.close();
  voice = null;
  queued = 0; // the next session has nothing queued
  phase("choose");
  show("idle");
  tell("Ready");
  hint("");
  await ended?.end()?.catch(() => {}); // the server may be gone
}

$("end").onclick = finish;
addEventListener("pagehide", () => session?.end());

// --- Sound -----------------------------------------------------------------------------------------------------------

/** What is said next is no segment before this one: a number that was finished is not heard any more. */
function use(next) {
  segment = Math.max(segment, next);
}

$("talk").onclick = async () => {
  if (talking) return stopTalking();
  if (opening) return;
  const microphone = voice;
  opening = true;
  try {
    if (body.dataset.state === "speaking") await interrupt();
    await microphone.start();
    talking = true;
    $("talk").ariaPressed = "true";
    $("talk-text").textContent = "Stop";
  } catch (error) {
    if (voice === microphone) complain(error.message); // else the session has ended meanwhile
  }
  opening = false;
};

function hear(samples, peak) {
  $("talk").style.setProperty("--level", Math.min(1, peak * 1.5).toFixed(2));
  hint(queued > BEHIND ? "Catching up: the microphone pauses." : "Speak. The portrait says it a moment later.");
  if (queued <= BEHIND) socket?.sound(segment, samples);
}

function stopTalking() {
  voice?.stop();
  $("talk").style.removeProperty("--level");
  if (!talking) return;
  talking = false;
  socket?.tell({type: "end"});
  segment += 1;
  $("talk").ariaPressed = "false";
  $("talk-text").textContent = "Talk";
  hint("");
}

async function say(file) {
  if (!session) return;
  stopTalking();
  if (file.size > session.facts.limits.recording_bytes) return complain("The recording is too large.");
  hint(`Saying ${file.name}`);
  try {
    const {answer} = await session.say(file);
    use(answer.segment + 1);
  } catch (error) {
    hint("");
    complain(error.message);
  }
}

async function interrupt() {
  await session?.interrupt().catch(error => complain(error.message));
  hint("");
}

$("interrupt").onclick = interrupt;
$("file-button").onclick = () => $("file").click();
$("file").onchange = ({target}) => { if (target.files.length) say(target.files[0]); target.value = ""; };
$("sound").onclick = () => { video.muted = !video.muted; };
video.onvolumechange = () => { $("sound").ariaPressed = String(video.muted); };

addEventListener("dragover", event => { event.preventDefault(); if (session) body.dataset.drop = ""; });
addEventListener("dragleave", event => { if (!event.relatedTarget) delete body.dataset.drop; });
addEventListener("drop", event => {
  event.preventDefault();
  delete body.dataset.drop;
  const [file] = event.dataTransfer.files;
  if (file && session) say(file);
});
addEventListener("keydown", event => {
  if (!session || event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
  if (event.key === "Escape") interrupt();
  if (event.key === "m") $("talk").click();
});

// --- What is seen ----------------------------------------------------------------------------------------------------

function phase(name) {
  const begun = name === "live" || name === "moving";
  body.dataset.phase = name;
  $("choose").hidden = begun;
  $("live").hidden = !begun;
  $("dock").inert = !begun;
  $("talk").disabled = $("file-button").disabled = name === "moving";
}

function show(state) {
  body.dataset.state = state;
  tell(STATES[state] ?? state);
  $("interrupt").disabled = state !== "speaking" && state !== "listening";
}

function tell(text) {
  $("state-text").textContent = text;
}

function hint(text) {
  $("hint").textContent = text;
}

let silence;
function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
  clearTimeout(silence);
  silence = setTimeout(() => { $("problem").hidden = true; }, 8000);
}

function note({type, ...values}) {
  if (type === "stats" || type === "pong" || type === "ready") return;
  const line = document.createElement("li");
  const said = Object.entries(values).map(([name, value]) => `${name} ${typeof value === "number" ? +value.toFixed(2) : value}`);
  line.textContent = `${new Date().toTimeString().slice(0, 8)} ${type} ${said.join(", ")}`;
  $("events").prepend(line);
  if ($("events").children.length > 50) $("events").lastChild.remove();
}

showFaces().catch(error => complain(error.message));
