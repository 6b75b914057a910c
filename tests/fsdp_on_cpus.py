"""`trl-sgpo` on a rank with FSDP on CPUs. Arguments of `main`: a folder, and those of the command."""

from two_ranks import shard_on_cpus

from trl_sgpo.cli import main as command


def main(arguments: list[str]) -> int:
    shard_on_cpus()
    return command.main(arguments[1:])
