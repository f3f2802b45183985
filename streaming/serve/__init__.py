"""`python -m streaming serve`: live sessions over HTTP, WebSocket and WebRTC, and a page to talk to.

server.py       the process: settings, warm networks, port, log, end;  page/: the page, without a framework
app.py          routes;  answers.py: what every request goes through
  socket.py       a WebSocket that speaks `flashtalk.v1`;  rtc.py: WebRTC;  uploads.py: portraits and recordings
  access.py       token, tickets, origins;  metrics.py: figures for Prometheus
    sessions.py     all sessions of the process: begun, resumed, found, ended. From here on nothing knows HTTP
      session.py      one session: its speaker, viewers and listeners
        broadcast.py    takes moments, encodes each once, hands it to all viewers
          ticks.py        a tick each 40 ms, and the last picture where no moment has come;  viewer.py: a short queue
            encoder.py      H.264, Opus, MP4;  messages.py: `flashtalk.v1`;  limits.py, errors.py
"""
