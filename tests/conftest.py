"""Settings for all tests."""

import torch

torch.set_num_threads(1)  # the models of these tests are tiny: a second thread costs more than it gives
