"""Settings of all tests: one thread, because tiny models lose more in waiting than they gain."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
