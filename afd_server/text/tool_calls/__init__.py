"""Tool calls in a model's text: a parser for each format that models are trained to write.

What lives here: pure machines, text in and deltas out. What does not: reasoning, which is taken off before (reasoning.py),
and what a client may ask for (api/). Called by message_parser.py.
"""
