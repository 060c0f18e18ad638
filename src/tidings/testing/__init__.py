"""The test kit: what a team needs to prove that its Tidings keeps its promises.

- `history`, `recorder`, `checker`: record what clients did and saw, then judge it (lost, doubled, reordered, gap …).
- `chaos`: a TCP proxy that delays, stalls, cuts and drops replies on command.
- `process`: a real server as a child process: kill it, freeze it, restart it, measure it.
- `rawsocket`: a WebSocket client that sends every byte it is told to.
- `datasets`: real conversations to run on, where they are at hand.

Nothing here imports the server, and nothing beyond what the SDK needs.
"""
