"""`trl-sgpo export`: exports a trained model for transformers or llama.cpp."""

import argparse
from typing import Any

from ..checks.arguments import Parser, path_option
from ..checks.paths import check_directory


def main(argv: list[str]) -> int:
    """Exports a trained model."""
    options = _parser().parse_args(argv)
    check_directory("--output_dir", options.output_dir)

    from ..export.export import EXPORT_FILE, ExportPlan, export

    report = export(ExportPlan(**vars(options)))
    _print(report)
    print(f"Exported to {options.output_dir}; these figures are in its {EXPORT_FILE}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-sgpo export",
        allow_abbrev=False,
        description="Export a trained model. The export is read again and its logits are "
        "compared with those of the model as it was trained, adapter apart and 4-bit weights included: an export that "
        "differs is refused. Tokenizer, prompts (sgpo.json) and strategies of the run's bank go with it.",
    )
    parser.add_argument(
        "--model", type=path_option, required=True, metavar="DIR_OR_ID", help="directory or Hub id of a trained model"
    )
    parser.add_argument(
        "--output_dir", type=path_option, required=True, metavar="DIR", help="directory to write; it must not exist"
    )
    parser.add_argument("--merge", action="store_true", help="write it for transformers, with the adapter merged")
    parser.add_argument(
        "--gguf",
        nargs="?",
        const="f16",
        choices=("f32", "f16", "bf16", "q8_0"),
        metavar="TYPE",
        help="write a GGUF file for llama.cpp, of type f32, f16, bf16 or q8_0 (f16): llama, qwen2 and qwen3 models",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="data type of --merge (auto: that of the base)",
    )
    parser.add_argument(
        "--base",
        choices=("trained", "original"),
        default="trained",
        help="after 4-bit training: merge into the 4-bit weights that were trained on, dequantized, or into the "
        "original ones, with which the logits are not those that were trained (trained)",
    )
    parser.add_argument(
        "--compute_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="data type to merge and check in; bfloat16 takes half the memory and checks less precisely (float32)",
    )
    parser.add_argument("--license", default="other", help="licence of the exported strategies (other)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from ..checks.console import console

    title = f"Logits at {report['positions']} positions, compared with the trained model"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "type", "error", "allowed", "KL, nats a token", "same likeliest token"):
        table.add_column(column, overflow="fold")

    def add(name: str, kind: str, allowed: str, parity: dict[str, float]) -> None:
        figures = (f"{parity['error']:.2g}", allowed, f"{max(parity['kl'], 0.0):.2g}", f"{parity['top1']:.1%}")
        table.add_row(name, kind, *figures)

    for form in report["forms"]:
        add(form["name"], form["kind"], f"{form['tolerance']:g}", form["parity"])
    terminal = console()
    terminal.print(table)
    if report["merged_into"] is not None:
        terminal.print(f"Change of the logits by the adapter: {report['effect_of_adapter']:.2g}")
    if "difference_to_trained" in report:
        difference = report["difference_to_trained"]
        terminal.print(
            f"Merged into the original weights, on which it was not trained: difference to the trained model "
            f"{difference['error']:.2g}, KL {difference['kl']:.2g} nats a token, same likeliest token "
            f"{difference['top1']:.1%}."
        )
