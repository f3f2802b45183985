"""An endless session: sound comes in pieces, a living face comes out, interrupted and resumed at will.

opening.py        checks what is asked for, and puts a session together;  pipe.py: a session that hears a pipe
session.py        LiveSession: threads, clock, iterators, events
snapshot.py       a session in a file
director.py       what is generated next, where it is cut, what is handed over when; it is told the time
  playback.py       states, beginnings and ends of segments, latencies;  quality.py: what there is time for
    voice.py          sound that waits: segments of a voice agent, or a microphone
      pcm.py            any rate, any pieces -> frames of sound, the same whatever the pieces
    face.py           the chunk generator, as a value that can be cut after any frame
    pace.py           when frames are due, how long chunks take;  states.py: the table;  stats.py: what is counted
    timeline.py       the values: what a frame hears, a moment, events
"""
