"""What every test starts from: one thread for torch (two cores are shared with real server processes)."""

import torch

torch.set_num_threads(1)
