"""What a layout costs, before it is started: counts of a model, times on a machine, and the search for the best split.

Arithmetic on numbers of config.json, a table of hardware and measured profiles. It imports no torch and no ray, and counts
models that the server does not run. The command line around it is commands/plan.py.
"""
