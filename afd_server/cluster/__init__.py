"""The workers as processes: what each is made of, where Ray places it, and what happens when one dies.

The plain classes (`workers.py`) know no Ray; `actors.py` wraps them thinly; `ray_cluster.py` starts and supervises them.
This is the only room that imports ray, and Ray is not on the way of any activation or token.
"""
