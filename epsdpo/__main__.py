"""The command line: `python -m epsdpo run CONFIG...`, and what goes with it.

It reads arguments, turns errors into messages and exit codes, and leaves the work to the modules behind each command.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from epsdpo import __version__
from epsdpo.experiment import ConfigError

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 a stage failed, 2 refused before any work, 130 Ctrl-C."""
    options = _parser().parse_args(arguments)
    _log_to_stdout()
    # As an exception, SIGTERM unwinds through the runner, which then ends what it started; else that would be orphaned.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        return options.command(options)
    except (ConfigError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here, training from its last checkpoint", file=sys.stderr)
        return INTERRUPTED


# Imports are late, so that --help and refusals do not wait for papermill and torch.


def _run(options: argparse.Namespace) -> int:
    from epsdpo.experiment import load_experiments
    from epsdpo.index import INDEX
    from epsdpo.runner import Resources, look_at_batch, run_batch
    from epsdpo.stages import resolve_path

    path = resolve_path(options.config)
    experiments = load_experiments(path)
    run_dir = Path(options.output or Path("runs") / path.resolve().name.removesuffix(".yaml"))
    resources = Resources(
        jobs=options.jobs,
        gpus=options.gpus,
        time_limit=options.time_limit,
        profile=options.profile,
        launch_config=options.launch,
        num_processes=options.num_processes,
    )
    if options.dry_run:
        verdicts = look_at_batch(experiments, run_dir, resources)
        for name, verdict in verdicts.items():
            print(f"{'would run' if verdict.due else 'finished '}  {name}" + f": {verdict.reason}" * verdict.due)
        print(f"{sum(verdict.due for verdict in verdicts.values())} of {len(verdicts)} stages would run")
        return 0
    outcome = run_batch(experiments, run_dir, resources)
    for name, error in outcome.failed.items():
        print(f"failed   {name}: {error.splitlines()[0] if error else ''}", file=sys.stderr)
        print(f"         log: {run_dir / name / 'stage.log'}", file=sys.stderr)
    for name in outcome.not_run:
        print(f"not run  {name}, because a stage that it needs failed", file=sys.stderr)
    print(f"Index: {run_dir / INDEX}")
    if (run_dir / "report" / "manifest.json").exists():
        print(f"Report: {run_dir / 'report' / 'notebook.html'}")
    return FAILED if outcome.failed else 0


def _stage(options: argparse.Namespace) -> int:
    if options.end_with_stdin:
        from epsdpo.watch import end_with_stdin

        end_with_stdin()
    from epsdpo.gpus import taken_gpus
    from epsdpo.stages import StageError, run_stage

    try:
        with taken_gpus(options.take_gpus, options.output):
            print(run_stage(options.stage, dict(options.parameter), options.output, options.time_limit))
    except StageError as error:
        print(error, file=sys.stderr)
        return FAILED
    return 0


def _status(options: argparse.Namespace) -> int:
    from epsdpo.progress import print_status

    return print_status(options.run_dir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m epsdpo", description="ε-DPO from data to report.")
    parser.add_argument("--version", action="version", version=f"epsdpo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run what is due of every experiment of a config file or folder")
    run.set_defaults(command=_run)
    run.add_argument("config", help="a YAML config, or a folder of them, e.g. configs/demo")
    run.add_argument("--output", metavar="DIR", help="run folder (default: runs/<name of the file or folder>)")
    run.add_argument("--dry-run", action="store_true", help="print for each stage whether it would run and why")
    run.add_argument("--jobs", metavar="N", type=int, default=1, help="stages at once (default: 1)")
    run.add_argument("--gpus", metavar="N", type=int, default=0, help="GPUs to share out between stages")
    run.add_argument("--time-limit", metavar="HOURS", type=float, help="end a stage that takes longer")
    run.add_argument(
        "--profile", metavar="DIR", default="", help="submit stages to a cluster, as configs/cluster/slurm"
    )
    run.add_argument("--launch", metavar="FILE", default="", help="accelerate config to start training processes by")
    run.add_argument("--num-processes", metavar="N", type=int, default=0, help="how many (default: as FILE says)")

    status = commands.add_parser("status", help="where the stages of a run folder stand, also while they run")
    status.set_defaults(command=_status)
    status.add_argument("run_dir", metavar="DIR", help="a folder of `epsdpo run`")

    stage = commands.add_parser("stage", help="do all the work of one stage, as `run` does for each")
    stage.set_defaults(command=_stage)
    stage.add_argument("stage", choices=("prepare", "train", "trajectory", "evaluate", "report"))
    stage.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the stage")
    stage.add_argument(
        "--parameter", metavar="NAME=VALUE", type=_parameter, action="append", default=[], help="of its notebook"
    )
    stage.add_argument("--time-limit", metavar="HOURS", type=float, help="end it if it takes longer")
    stage.add_argument("--take-gpus", metavar="N/M", default="", help="wait for N of M GPUs that no other stage has")
    stage.add_argument("--end-with-stdin", action="store_true", help="end at once when standard input closes")
    return parser


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, yaml.safe_load(value)


def _log_to_stdout() -> None:
    """Show this package's own log lines, without the chatter of the libraries below it."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("epsdpo")
    package.handlers = [handler]
    package.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
