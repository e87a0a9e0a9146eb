"""The kernels' and the GPU path's own tests, on the device. Skipped where there is none.

python -m pytest tests/gpu -rs
"""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

if torch.cuda.is_available():
    from tests.unit.test_gpu_operators import *  # noqa: F403
    from tests.unit.test_gpu_path import *  # noqa: F403
    from tests.unit.test_gpu_sampler import *  # noqa: F403
    from tests.unit.test_kernels import *  # noqa: F403
