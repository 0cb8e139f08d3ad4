"""The FFN worker: weights and nothing else.

It keeps no state between two calls, knows no request and no token, and serves any number of attention replicas.
"""
