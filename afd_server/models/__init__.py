"""Models, split in two: what a checkpoint describes, which tensors each half needs, and the forward pass of each half.

`spec.py` reads config.json, `families.py` has a row per architecture, `checkpoint.py` loads one half's tensors, and
`halves.py` holds AttentionHalf, FFNHalf and WholeModel, which composes both in one process. Nothing here knows of
requests beyond one step's tensors, of the network, or of scheduling.
"""
