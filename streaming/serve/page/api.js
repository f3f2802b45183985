// The server's API: requests with a key, and a socket that speaks flashtalk.v1.

const SOUND = 1;

async function request(method, path, key, body, headers = {}) {
  let response;
  try {
    response = await fetch(path, {method, body, headers: {Authorization: `Bearer ${key}`, ...headers}});
  } catch {
    throw new Error("The server cannot be reached.");
  }
  const type = response.headers.get("Content-Type") ?? "";
  const answer = type.includes("json") ? await response.json() : await response.text();
  if (!response.ok) {
    const error = new Error(answer.error?.message ?? `The server answers ${response.status}.`);
    error.code = answer.error?.code;
    throw error;
  }
  return {answer, response};
}

export async function portraits() {
  return (await request("GET", "/v1/portraits", "")).answer.portraits;
}

/** Begins a session. `portrait` is the name of a known one, or a file. */
export async function create(token, portrait, options) {
  const form = new FormData();
  form.append("options", JSON.stringify(options));
  form.append("portrait", portrait);
  return new Session((await request("POST", "/v1/sessions", token, form)).answer);
}

/** A session of this page. */
class Session {
  constructor(facts) {
    this.facts = facts;
    this.path = `/v1/sessions/${facts.id}`;
    this.ended = false;
    this.over = new Promise(resolve => { this.settle = resolve; });
  }

  /** To be called when it has ended, whoever ended it. */
  markEnded() {
    this.ended = true;
    this.settle();
  }

  say(recording) {
    return request("POST", `${this.path}/audio`, this.facts.key, recording);
  }

  /** Goes on with a session that its server has ended, wherever there is room. */
  async resume() {
    this.facts = (await request("POST", `${this.path}/resume`, this.facts.key)).answer;
  }

  interrupt() {
    return request("POST", `${this.path}/interrupt`, this.facts.key);
  }

  /** Ends it, if it has not ended yet. */
  end() {
    if (this.ended) return;
    this.markEnded();
    // keepalive: the request goes out though the page is being closed
    return fetch(this.path, {method: "DELETE", keepalive: true, headers: {Authorization: `Bearer ${this.facts.key}`}});
  }

  async offer(sdp) {
    const type = {"Content-Type": "application/sdp"};
    const {answer, response} = await request("POST", `${this.path}/whep`, this.facts.key, sdp, type);
    return {sdp: answer, location: response.headers.get("Location")};
  }

  leave(location) {
    return request("DELETE", location, this.facts.key);
  }

  /** Opens a socket. `on` has a function for each type of message, and `media` for binary ones. */
  async socket(hello, on) {
    const {answer} = await request("POST", `${this.path}/ticket`, this.facts.key);
    const base = location.origin.replace(/^http/, "ws");
    const socket = new WebSocket(`${base}${this.path}/ws?ticket=${answer.ticket}`, "flashtalk.v1");
    socket.binaryType = "arraybuffer";
    socket.onopen = () => socket.send(JSON.stringify({type: "hello", ...hello}));
    socket.onmessage = ({data}) => {
      if (typeof data === "string") {
        const message = JSON.parse(data);
        on[message.type]?.(message);
        on.any?.(message);
      } else {
        on.media?.(new DataView(data).getUint8(0), new Uint8Array(data, 8));
      }
    };
    socket.onclose = () => on.close?.();
    return {
      tell: message => socket.readyState === WebSocket.OPEN && socket.send(JSON.stringify(message)),
      sound: (segment, samples) => {
        const message = new Uint8Array(8 + samples.byteLength);
        new DataView(message.buffer).setUint8(0, SOUND);
        new DataView(message.buffer).setUint32(4, segment, true);
        message.set(new Uint8Array(samples.buffer), 8);
        if (socket.readyState === WebSocket.OPEN) socket.send(message);
      },
      close: () => {
        socket.onmessage = socket.onclose = null; // what still comes is of a session that is over
        socket.close();
      },
    };
  }
}
