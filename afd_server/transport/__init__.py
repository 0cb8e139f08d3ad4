"""The wire between workers: layer calls from attention to FFN workers and back, and tokens from replicas to the router.

Start with base.py: the verbs (send, receive, wait, answer) and who calls them. Three ways carry the calls: inproc.py
(threads of one process), and one pair of classes for sockets, link.py and listener.py, which either puts the
activations on the socket too (tcp) or leaves them in shared memory, of the host (shared_memory.py) or of a GPU
(device_memory.py), and sends the header alone as a doorbell (shm). wire.py lays activations out in bytes, frames.py does
headers, handshake.py keeps strangers out, connect.py chooses.
control.py is the other channel: whole requests in, new tokens out.

Only this room imports sockets. Nothing here unpickles anything, and nothing here knows what a layer computes.
"""
