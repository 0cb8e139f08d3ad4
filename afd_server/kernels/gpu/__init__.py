"""Triton kernels for CUDA devices, each beside the plain torch that it is compared with.

attention.py, experts.py and rows.py are what models call, on tensors; *_triton.py hold the kernels and are imported when one
is first used, so that all but them can be imported where Triton is not installed. Every kernel also runs on CPU tensors under
Triton's interpreter (TRITON_INTERPRET=1 from before the first import of Triton): slowly, and with the same arithmetic.

Nothing here waits for the device or copies from it, and a call's launches depend on shapes alone: a CUDA graph can hold it.
"""
