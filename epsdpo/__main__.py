"""The command line: `python -m epsdpo run CONFIG`.

It reads arguments, turns errors into messages and exit codes, and leaves the work to `epsdpo.batch`.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from epsdpo import __version__
from epsdpo.experiment import ConfigError

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 a stage failed, 2 refused before any work, 130 Ctrl-C."""
    options = _parser().parse_args(arguments)
    _log_to_stdout()
    # As an exception, SIGTERM unwinds through the runner, which then ends the kernel; by default it would orphan it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))

    # Imported late, so that --help does not wait for papermill and nbconvert.
    from epsdpo.batch import run_batch
    from epsdpo.stages import StageError

    try:
        report = run_batch(options.config, options.output, options.launch, options.num_processes)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except StageError as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command takes training up from its last checkpoint", file=sys.stderr)
        return INTERRUPTED
    print(f"Report: {report}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m epsdpo", description="ε-DPO from data to report.")
    parser.add_argument("--version", action="version", version=f"epsdpo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run every experiment of a config file or folder, then their report")
    run.add_argument("config", help="a YAML config, or a folder of them, e.g. configs/demo")
    run.add_argument("--output", metavar="DIR", help="run folder (default: runs/<name of the file or folder>)")
    run.add_argument("--launch", metavar="FILE", default="", help="accelerate config to start training processes by")
    run.add_argument("--num-processes", metavar="N", type=int, default=0, help="how many (default: as FILE says)")
    return parser


def _log_to_stdout() -> None:
    """Show this package's own log lines, without the chatter of the libraries below it."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("epsdpo")
    package.handlers = [handler]
    package.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
