// The microphone: asked for when somebody talks, and let go when they stop.

export class Voice {
  /** `onPiece(samples, peak)` gets int16 samples at `rate`, 20 ms at a time. */
  constructor(onPiece) {
    this.context = new AudioContext({latencyHint: "interactive"});
    this.rate = this.context.sampleRate;
    this.onPiece = onPiece;
    this.stream = null;
  }

  get on() {
    return this.stream !== null;
  }

  async start() {
    if (!navigator.mediaDevices) throw new Error("The browser gives a microphone to https:// and 127.0.0.1 only.");
    const wanted = {echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1};
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({audio: wanted});
    } catch (error) {
      throw new Error(error.name === "NotAllowedError" ? "The browser does not allow the microphone." : "There is no microphone.");
    }
    try {
      await this.context.resume(); // fails if `close` was called while the browser asked for permission
      await this.context.audioWorklet.addModule("/page/microphone.js");
      this.source = this.context.createMediaStreamSource(stream);
      this.node = new AudioWorkletNode(this.context, "microphone", {numberOfOutputs: 0});
    } catch (error) {
      release(stream);
      throw error;
    }
    this.stream = stream;
    this.node.port.onmessage = ({data}) => this.on && this.onPiece(data.piece, data.peak);
    this.source.connect(this.node);
  }

  stop() {
    if (!this.on) return;
    this.source.disconnect();
    this.node.port.onmessage = null;
    release(this.stream);
    this.stream = null;
  }

  close() {
    this.stop();
    this.context.close();
  }
}

function release(stream) {
  stream.getTracks().forEach(track => track.stop());
}
