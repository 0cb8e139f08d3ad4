"""What a CUDA graph does, on a CPU: a recorded function is not run again, its operations are, on the tensors that they had."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ASKS_THE_DEVICE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Tape:
    """A Capture (models/graphs.py). Recording leaves no trace in any tensor, and fails for what no graph could hold."""

    def __init__(self):
        self.num_recorded = self.num_replayed = 0

    def __call__(self, function):
        recorder = _Recorder()
        try:
            with recorder:
                function()
        finally:
            for tensor, before in reversed(recorder.overwritten):
                tensor.copy_(before)
        self.num_recorded += 1

        def replay():
            made = {}  # id of a tensor of the recording -> the one in its place

            def current(value):
                return made.get(id(value), value)

            for operation, arguments, outputs in recorder.operations:
                args, kwargs = tree_map(current, arguments)
                again = operation(*args, **kwargs)
                made.update(zip(map(id, tree_leaves(outputs)), tree_leaves(again), strict=True))
            self.num_replayed += 1

        return replay


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations, self.overwritten = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # An index asks only if it is a mask.
        asks = ASKS_THE_DEVICE.intersection(operation.tags) and operation is not torch.ops.aten.index.Tensor
        assert not asks, f"{operation} asks the device"
        if operation._schema.is_mutable:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.overwritten += [(tensor, tensor.clone()) for tensor in tensors]
        outputs = operation(*args, **kwargs)
        self.operations.append((operation, (args, kwargs), outputs))
        return outputs
