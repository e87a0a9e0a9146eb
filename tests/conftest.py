"""Settings for all tests."""

import os

# One thread for each of the two tests that run at a time, and for the servers they start: on cores that others use
# too, the threads of one process wait for each other. Set before torch is imported, which reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: GPU kernels run, slowly, on the CPU
# Whatever this machine computes faster: in bfloat16 a token may change with what shares its step.
os.environ["NR_DTYPE"] = "float32"
