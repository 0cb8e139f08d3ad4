"""The paged KV cache: which blocks there are, who holds them, what they hold, and the tensors behind them.

It knows nothing of requests and steps: engine/ asks for blocks, models/ writes into them.
"""
