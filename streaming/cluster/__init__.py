"""`python -m streaming cluster`: many sessions on many machines, behind one address.

command.py      the process: Ray, replicas, the front, and an end with snapshots
  deployment.py   a Ray Serve replica: a GPU, networks, a server;  scaling.py: how many are wanted
  replica.py      the server of `streaming.serve` on a port of its own, which reports to the front. Knows no Ray
  front.py        the address that clients know: finds the replica of each request. Knows no Ray
    relay.py        carries requests and WebSockets, and knows the last moment that went to a viewer
      placement.py    which replica has a session, and which one has room. Knows neither HTTP nor Ray
"""
