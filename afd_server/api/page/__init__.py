"""The page at `/`: a chat playground and a live view of the machine.

What lives here: the page's files (static/, served as they are; nothing is built), their routes, and the live view's data:
one sampler that runs only while somebody looks. What does not: what the page asks like any other client
(`/v1/chat/completions`), and the counting of requests and steps (telemetry/).
"""
