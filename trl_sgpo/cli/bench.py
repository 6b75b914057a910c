"""`trl-sgpo bench`: time and memory of SGPO."""

from importlib import import_module

from ..checks.arguments import Parser, path_option
from ..checks.paths import check_file
from ..errors import ConfigError


SUBJECTS = {
    "step": "time and memory of a training step: SGPO and shared-prompt GRPO against TRL's GRPOTrainer",
    "throughput": "speed against GRPOTrainer, plain `generate` and the memory's bandwidth",
    "speedups": "time that each fast path of SGPO saves",
    "memory": "peak memory against GRPOTrainer at equal rows and total lengths",
    "fit": "what recipes take on this GPU, in memory and time, with random weights",
}


def main(argv: list[str]) -> int:
    """Runs the benchmark of a subject."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<10} {text}" for name, text in SUBJECTS.items())
        print(f"usage: trl-sgpo bench SUBJECT [options]\n\nsubjects:\n{lines}\n")
        print("`trl-sgpo bench SUBJECT --help` lists the options of one.")
        return 0
    if argv[0] not in SUBJECTS:
        raise ConfigError(f"There is no benchmark of {argv[0]!r}: choose one of {', '.join(SUBJECTS)}.")
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=path_option)
    output = parser.parse_known_args(argv[1:])[0].output
    if output is not None:
        check_file("--output", output)  # before hours of measurements
    return import_module(f"trl_sgpo.bench.{argv[0]}").main(argv[1:])
