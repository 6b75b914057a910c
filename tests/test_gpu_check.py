"""The check of a GPU, on a CPU with tiny sizes: what it measures, what it finds, and what a failure leaves."""

import json
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from benchmarks import gpu_check, packed_attention
from benchmarks.gpu_check import ATTENTION, PEAK, STEP, Part
from models import save_tiny_model

from trl_sgpo.vram.estimate import GIB


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_kernels_of_a_cpu_agree(tiny: str) -> None:
    found = packed_attention.summary(list(packed_attention.compare(tiny, [320, 321])))
    assert len(found) == 2 * 2 * 5 * 2
    for line in found:
        if line["kernel"] in ("efficient", "cudnn"):
            assert line["refused_lengths"] == 2 and "values" not in line
        else:
            assert 0 <= line["values"] <= line["values_tolerance"] < 1
            assert 0 < line["gradients"] <= line["gradients_tolerance"] < 1
        assert line["wrong_lengths"] == []


@pytest.mark.parametrize("fault", [lambda output: output * torch.nan, lambda output: output.flip(2)])
def test_a_kernel_that_is_wrong_at_some_lengths_is_found(
    tiny: str, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """With a mask and a multiple of 128 keys, and 64 more."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def wrong(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        output = attention(query, key, value, attn_mask=attn_mask, **kwargs)
        return fault(output) if attn_mask is not None and key.size(2) % 128 == 64 else output

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    monkeypatch.setattr(packed_attention, "KERNELS", {"math": packed_attention.KERNELS["math"]})
    figures = {"summary": packed_attention.summary(list(packed_attention.compare(tiny, [319, 320])))}
    assert {(line["rows"], *line["wrong_lengths"]) for line in figures["summary"]} == {
        ("one by one",),
        ("packed", 320),
    }
    as_written = json.loads(packed_attention.json_text(figures))
    told = list(gpu_check.problems(ATTENTION, as_written, on_gpu=True))
    assert len(told) == 4 and all("packed" in text and "lengths 320" in text for text in told)


def entry(peak: float, outside: float) -> dict[str, Any]:
    figures = {"worst_case_reserved_bytes": peak * GIB, "estimated_bytes": GIB}
    return {"recipes": [{"vram_gb": 8, "figures": figures, "sgpo": {"outside_pytorch_bytes": outside * GIB}}]}


def test_a_peak_over_its_cap_fails() -> None:
    assert list(gpu_check.problems(PEAK, entry(7.4, 0.5), on_gpu=True)) == []
    (told,) = gpu_check.problems(PEAK, entry(7.4, 0.7), on_gpu=True)
    assert "8.10 GB" in told and "cap of 8 GB" in told
    ((_, shown),) = gpu_check.rows_of_table(Part("a", PEAK, []), {"figures": entry(7.4, 0.5), "failed": []})
    assert shown == "estimated 1.00 GB, measured 7.90 GB, cap 8 GB"


def test_times_and_memory_of_steps_are_shown() -> None:
    rows = [{"arm": arm, "step": step, "seconds": 2.0 * step} for arm in gpu_check.STEP_ARMS for step in (0, 1, 2, 3)]
    figures = {"rows": rows, "sgpo_peak_bytes": 3 * GIB, "sgpo_step_bytes": GIB}
    shown = dict(gpu_check.rows_of_table(Part("step", STEP, []), {"figures": figures, "failed": []}))
    assert shown.pop("step, sgpo") == "4.00 s, peak 3.00 GB, step 1.00 GB"
    assert shown == {"step, shared_grpo": "4.00 s", "step, grpo": "4.00 s"}


def test_a_part_is_stopped_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waits.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    monkeypatch.chdir(tmp_path)
    result = gpu_check.measure(Part("a", PEAK, ["waits"]), 3, on_gpu=False)
    assert result["failed"] == ["It was stopped after 3 s."]
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "child").read_text())).wait(timeout=60)
    assert gpu_check.measure(Part("a", PEAK, ["waits"]), -1, on_gpu=False)["failed"]


def test_an_attention_without_figures_has_failed() -> None:
    assert list(gpu_check.problems(ATTENTION, {"rows": []}, on_gpu=True)) == ["No kernel was compared."]


def in_this_process(part: Part, directory: Path, seconds: float) -> tuple[int, str]:
    module, *arguments = part.command
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        return import_module(module).main(
            [*arguments, "--output", str(directory / "figures.json")]
        ), printed.getvalue()


def test_all_parts(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model_name_or_path": tiny,
        "dataset_name": "reasoning_gym/chain_sum?size=24&max_terms=2&max_digits=1",
        "reward_funcs": ["models.evenness"],
        "max_strategy_length": 4,
        "max_completion_length": 4,
        "max_problem_tokens": 80,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "use_bank": False,
        "bf16": False,
        "vram_gb": 8,
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
    }
    paths = {name: str(tmp_path / f"{name}.yaml") for name in ("good", "bad")}
    Path(paths["good"]).write_text(yaml.safe_dump(settings))
    Path(paths["bad"]).write_text(yaml.safe_dump(settings | {"reward_funcs": ["nowhere"]}))
    for name, value in {
        "run_part": in_this_process,
        "MODEL": tiny,
        "LENGTHS": [320],
        "STEP_RECIPE": paths["bad"],
        "RECIPES": (paths["good"],),
    }.items():
        monkeypatch.setattr(gpu_check, name, value)
    output = tmp_path / "out" / "gpu_check.json"
    assert gpu_check.main(["--cpu", "--output", str(output)]) == 1
    report = json.loads(output.read_text())
    assert report["failed"] == ["step"] and list(report["parts"]) == ["attention", "step", paths["good"]]
    assert {"device", "cuda", "cudnn", "versions", "seconds"} < report.keys()
    attention, step, good = report["parts"].values()
    assert "Unknown reward function 'nowhere'" in step["failed"][0]
    assert good["figures"]["recipes"][0]["figures"]["estimated_bytes"] > 0 and good["failed"] == []
    assert {row["length"] for row in attention["figures"]["rows"]} == {320}
    printed = capsys.readouterr().out
    assert "step: FAILED" in printed and "not measured" in printed and "PyTorch's" in printed


def test_it_refuses_to_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: str) -> None:
    """In one line, without a GPU or where a package of a recipe is missing."""
    if not torch.cuda.is_available():
        assert gpu_check.main([]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(gpu_check, "MODEL", tiny)
    monkeypatch.setattr("trl_sgpo.checks.setup.find_spec", lambda name: None)
    assert gpu_check.main(["--cpu"]) == 2
    error = capsys.readouterr().err
    assert "needs bitsandbytes" in error and "gemma-3-1b-it" in error
