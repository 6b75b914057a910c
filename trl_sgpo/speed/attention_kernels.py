"""Which kernels of PyTorch's attention training may use."""

import logging

import torch


logger = logging.getLogger(__name__)

_HOPPER = 9  # compute capability of H100 and H200


def avoid_cudnn_attention(device: torch.device) -> None:
    """
    Switches cuDNN's attention off for the process, where it is the default and its backward pass can give NaN.

    On Hopper GPUs, since PyTorch 2.11, it does with a mask, low scores and L % 128 = 64 (pytorch#196678). Models like
    Qwen2.5 have such scores (trl#7181). Flash or memory-efficient attention takes its place.

    Args:
        device (`torch.device`):
            Device of the training.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return
    if torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)
        logger.info("cuDNN's attention is off: on this GPU its backward pass can give NaN (pytorch#196678).")
