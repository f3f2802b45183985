"""An endless session: sound comes in pieces, a living face comes out, interrupted and resumed at will.

session.py    LiveSession: threads, clock, iterators, callbacks
  director.py   what to generate next, where to cut, what is handed over when; told the time, never asks for it
    voice.py      queued sound: segments of a voice agent, or a microphone
      pcm.py        any rate, any pieces -> frames of sound, the same whatever the pieces
    face.py       the chunk generator as a value that can be cut after any frame
    pace.py       when frames are due, how long chunks take
    states.py     the state machine, as a table
    stats.py      what is counted and measured
    timeline.py   the values: what a frame hears, a moment, events
snapshot.py   a session in a file
"""
