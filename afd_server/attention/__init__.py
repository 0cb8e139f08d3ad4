"""The attention worker: carries out a StepPlan.

It holds the attention weights, the tensors of the KV cache and the sampling state of running requests, calls the FFN
workers once per layer, and turns the last hidden states into tokens. It decides nothing: engine/ does.
"""
