"""Fast paths: arithmetic written for one kind of hardware, each with a plain torch reference that tests compare it with.

native/ holds C++ for CPUs, which library.py compiles and loads; matmul.py, experts.py, attention.py and rows.py call it on
tensors. gpu/ holds Triton kernels. Models know these only through models/operations.py, so every one can be switched off.
"""
