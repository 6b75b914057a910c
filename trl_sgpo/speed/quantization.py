"""Corrections for training adapters on quantized weights."""

import torch


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """
    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights for inference at the first forward pass without
    gradients, such as in generation. Later gradients are wrong, and logits differ from those of training.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def keep_adapters_in_float32(model: torch.nn.Module) -> None:
    """
    TRL 1.16 casts the adapters of quantized models to bfloat16. Training in float16 scales gradients, which PyTorch
    refuses for anything but float32.
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
