// Hands the microphone to the page in pieces of 20 ms of int16 samples, and says how loud each is.

registerProcessor("microphone", class extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Int16Array(Math.round(sampleRate / 50));
    this.filled = 0;
    this.peak = 0;
  }

  process([[samples]]) {
    for (const sample of samples ?? []) {
      const value = Math.max(-1, Math.min(1, sample));
      this.peak = Math.max(this.peak, Math.abs(value));
      this.piece[this.filled++] = value * 32767;
      if (this.filled === this.piece.length) this.send();
    }
    return true;
  }

  send() {
    const piece = this.piece.slice();
    this.port.postMessage({piece, peak: this.peak}, [piece.buffer]);
    this.filled = this.peak = 0;
  }
});
