"""The engine of one attention replica: what runs in each step, and the thread that runs it.

It decides and keeps count. Tensors belong to attention/, which it knows only as something that executes a StepPlan.
"""
