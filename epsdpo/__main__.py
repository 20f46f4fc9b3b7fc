"""The command line: `python -m epsdpo run CONFIG` and `python -m epsdpo config CONFIG`.

It reads arguments, turns errors into messages and exit codes, and leaves the work to `epsdpo.batch` and
`epsdpo.experiment`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from epsdpo import __version__
from epsdpo.experiment import ConfigError, load_experiments
from epsdpo.experiment.explain import explain_keys, full_text, list_experiments
from epsdpo.experiment.sweep import OVERRIDE, parse_overrides
from epsdpo.paths import resolve_path

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 a stage failed, 2 refused before any work, 130 Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED


def _run(options: argparse.Namespace) -> int:
    _log_to_stdout()
    # As an exception, SIGTERM unwinds through the runner, which then ends the kernel; by default it would orphan it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    overrides = parse_overrides(options.overrides)

    # Imported late, so that other commands and --help do not wait for papermill and nbconvert.
    from epsdpo.batch import run_batch
    from epsdpo.stages import StageError

    try:
        report = run_batch(options.config, options.output, options.launch, options.num_processes, overrides)
    except StageError as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command takes training up from its last checkpoint", file=sys.stderr)
        return INTERRUPTED
    print(f"Report: {report}")
    return 0


def _config(options: argparse.Namespace) -> int:
    if options.explain is not None:
        if options.config or options.overrides or options.full:
            raise ConfigError("config: --explain is about keys, not about a config. Use it alone")
        text = explain_keys(options.explain)
    elif options.config:
        paths = [resolve_path(path) for path in options.config]
        experiments = load_experiments(paths, parse_overrides(options.overrides))
        whole = options.full or len(experiments) == 1
        text = full_text(experiments) if whole else list_experiments(experiments)
    else:
        raise ConfigError("config: name a config file or folder, e.g. configs/demo, or use --explain")
    try:
        print(text, flush=True)
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m epsdpo", description="ε-DPO from data to report.")
    parser.add_argument("--version", action="version", version=f"epsdpo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run every experiment of config files and folders, then their report")
    run.set_defaults(command=_run)
    _add_configs(run, at_least="+")
    run.add_argument("--output", metavar="DIR", help="run folder (default: runs/<names of the configs>)")
    run.add_argument("--launch", metavar="FILE", default="", help="accelerate config to start training processes by")
    run.add_argument("--num-processes", metavar="N", type=int, default=0, help="how many (default: as FILE says)")

    config = commands.add_parser("config", help="print what configs come to, or what their keys mean; runs nothing")
    config.set_defaults(command=_config)
    _add_configs(config, at_least="*")
    config.add_argument("--full", action="store_true", help="print whole resolved configs, not a table of them")
    config.add_argument(
        "--explain", metavar="KEY", nargs="?", const="", help="print the meaning of every key, or of those so named"
    )
    return parser


def _add_configs(parser: argparse.ArgumentParser, at_least: str) -> None:
    parser.add_argument("config", nargs=at_least, help="a YAML config, or a folder of them, e.g. configs/demo")
    parser.add_argument(
        OVERRIDE,
        metavar="KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="a value for every experiment, e.g. train.epsilon=0.02; may be repeated",
    )


def _log_to_stdout() -> None:
    """Show this package's own log lines, without the chatter of the libraries below it."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("epsdpo")
    package.handlers = [handler]
    package.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
