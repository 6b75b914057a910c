"""cuDNN's attention, whose backward pass can give NaN on Hopper GPUs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import evenness, save_tiny_model
from trl import GRPOConfig

from trl_sgpo import SGPOConfig, SharedPromptGRPOTrainer
from trl_sgpo.data import warmstart as warm
from trl_sgpo.data.worked import Trace
from trl_sgpo.method import conversation_trainer
from trl_sgpo.speed.attention_kernels import avoid_cudnn_attention


@pytest.fixture
def enabled() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(
    ("device", "capability", "left"),
    [("cuda", (9, 0), False), ("cuda", (8, 9), True), ("cuda", (12, 0), True), ("cpu", (9, 0), True)],
)
def test_is_off_on_hopper_only(
    device: str, capability: tuple[int, int], left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    avoid_cudnn_attention(torch.device(device))
    assert torch.backends.cuda.cudnn_sdp_enabled() is left


def test_whatever_trains_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(conversation_trainer, "avoid_cudnn_attention", lambda device: asked.append(device.type))
    monkeypatch.setattr(warm, "avoid_cudnn_attention", lambda device: asked.append(device.type))
    model = save_tiny_model(tmp_path / "model")
    prompt = [{"role": "user", "content": "Add 1 and 2."}]
    args = GRPOConfig(str(tmp_path / "run"), bf16=False, use_cpu=True)
    SharedPromptGRPOTrainer(model, evenness, args, train_dataset=Dataset.from_list([{"prompt": prompt}]))
    assert asked == ["cpu"]
    config = SGPOConfig(str(tmp_path / "warm"), bf16=False, use_cpu=True, disable_tqdm=True)
    warm.warmstart(model, [Trace(prompt, "Add.", "#### 3", "sums")], config, tmp_path / "warm" / "warmstart")
    assert asked == ["cpu", "cpu"]
