"""A deployment in simulated time: this server's own decisions, against workers that are only a model of their times.

Router, admission, scheduler, step-time model, choice of micro-batches, hop order, merging of calls and choice of an FFN worker
are the ones that serve. What is modelled is what they wait for: computing, the wire, failures, restarts.
"""
