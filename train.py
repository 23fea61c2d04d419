"""Trains UniDEC as a recipe says, on the ranks that the launcher started.

    deepspeed train.py --recipe quickstart --ds_config ds_configs/cpu.json
    accelerate launch --use_deepspeed --num_processes 2 train.py --recipe ... --ds_config ...
    torchrun --nproc_per_node 2 train.py --recipe ... --ds_config ...
    python train.py --recipe ... --ds_config ...

Exit codes: 0 done, 1 failed, 2 the input was wrong (the message says what to do), 75 stopped by
SIGTERM, SIGINT, SIGUSR1 or SIGHUP with everything saved (go on with --resume auto).
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from pathlib import Path

from unidec_ds.config import load_recipe, recipe_names
from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message
from unidec_ds.lifeline import DEFAULT_TIMEOUT, Lifeline


def parse_args() -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", required=True, help=f"a YAML file, or one of: {', '.join(recipe_names())}"
    )
    parser.add_argument(
        "--ds_config", required=True, type=Path, help="DeepSpeed configuration (JSON)"
    )
    parser.add_argument("--corpus", help="raw or prepared corpus; replaces corpus.path")
    parser.add_argument("--output", type=Path, help="run directory (default: runs/RECIPE)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value"
    )
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="continue from the newest or the given checkpoint"
    )
    parser.add_argument(
        "--init_from", type=Path, metavar="RUN", help="begin with the model of another run"
    )
    parser.add_argument(
        "--timeout_minutes",
        type=float,
        default=DEFAULT_TIMEOUT.total_seconds() / 60,
        help="how long a rank waits for another before it fails (default: %(default)g)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from `deepspeed`
    return parser.parse_args()


def main(args: argparse.Namespace, lifeline: Lifeline) -> None:
    """Checks everything that can be checked alone, joins the other ranks, trains, evaluates."""
    if not args.timeout_minutes > 0:
        raise UserError(f"--timeout_minutes: found {args.timeout_minutes:g}; needs more than 0")
    overrides = [*args.set, *([f"corpus.path={args.corpus}"] if args.corpus else [])]
    recipe = load_recipe(args.recipe, overrides)

    from unidec_ds.job import prepare_job, run_job  # heavy imports after the recipe is known good
    from unidec_ds.run import default_run

    run = args.output or default_run(args.recipe)
    lifeline.open(timedelta(minutes=args.timeout_minutes))
    job = prepare_job(recipe, args.ds_config, run, args.resume, args.init_from, lifeline)
    run_job(job, lifeline)


if __name__ == "__main__":
    args, lifeline = parse_args(), Lifeline.of_launch()
    sys.exit(exit_with_message(lambda: main(args, lifeline), lifeline))
