"""What every test process shares."""

import torch

# Tests run in several processes at once, and torch's threads would wait for each other.
torch.set_num_threads(1)
