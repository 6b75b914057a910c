"""vLLM on a CPU: small, without compilation, and with weights that can be loaded again."""

import os
from collections.abc import Iterator


os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_CI_ENV": "1",  # no warm-up, and no kernels made by a compiler
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise the whole process is bound to one core
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import pytest
import torch
import vllm.model_executor.layers.utils as layers


@pytest.fixture(autouse=True, scope="session")
def weights_that_stay() -> Iterator[None]:
    """
    vLLM 0.31 packs weights for the CPU and drops them, so that TRL's next synchronisation fails with `'Parameter'
    object has no attribute 'weight_loader'`. On GPUs they stay.
    """

    def keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "dispatch_cpu_unquantized_gemm", keep)
        yield
