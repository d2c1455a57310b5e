"""What every test process shares."""

import os

import torch

from tests import other_rounding

# Tests run in several processes at once, and torch's threads would wait for each other.
torch.set_num_threads(1)
if os.environ.get("OTHER_ROUNDING"):
    other_rounding.install()
