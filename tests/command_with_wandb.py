"""Prints a token in a command while wandb, imported in it, records an offline run. Arguments: `--hub_token TOKEN`."""

import logging
import sys

from trl_sgpo.checks.command import run_command


def _train(argv: list[str]) -> int:
    import wandb

    with wandb.init(project="commands"):
        print(f"to {argv[1]}", file=sys.stderr)
        logging.getLogger("trl_sgpo").warning("with %s", argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(run_command("trl-sgpo train", _train, sys.argv[1:]))
