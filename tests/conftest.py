"""Settings for all tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: GPU kernels run, slowly, on the CPU
# Whatever this machine computes faster: in bfloat16 a token may change with what shares its step.
os.environ["NR_DTYPE"] = "float32"
torch.set_num_threads(1)  # the models of these tests are tiny: a second thread costs more than it gives
