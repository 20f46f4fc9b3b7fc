"""The command line: `python -m epsdpo run CONFIG...`, and what goes with it.

Arguments are read here, and errors turned into messages and exit codes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from epsdpo import __version__
from epsdpo.batch.specs import STAGES
from epsdpo.batch.startup import prepare
from epsdpo.experiment import ConfigError, Experiment, load_experiments
from epsdpo.experiment.explain import explain_keys, full_text, list_experiments
from epsdpo.experiment.paths import resolve_path
from epsdpo.experiment.sweep import OVERRIDE, parse_overrides
from epsdpo.files import AFTER_DISK_FULL, DISK_FULL, is_writable

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143

_GOES_ON = "the same command goes on from here, training from its last checkpoint"


class _Terminated(SystemExit):
    """SIGTERM as an exception, which unwinds through the runner, so that it ends what it started."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: done. 1: not everything was. 2: refused before any work. 130: interrupted (Ctrl-C). 143: terminated (SIGTERM).
    75: of a stage, terminated with a checkpoint saved.
    """
    prepare()
    for argument in sys.argv[1:] if arguments is None else arguments:
        if not is_writable(argument):  # bytes of a file name, say, which pages and manifests would have to name
            print(f"{argument!r}: is not UTF-8, as all that is written here. Give it another name", file=sys.stderr)
            return REFUSED
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return options.command(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except OSError as error:
        place = error.filename2 or error.filename
        if error.errno in DISK_FULL:
            print(f"{place or 'writing'}: {error.strerror}. {AFTER_DISK_FULL}", file=sys.stderr)
        elif place:
            print(f"{place}: {error.strerror}. Mend or move it, and give the same command again", file=sys.stderr)
        else:
            raise
        return FAILED
    except KeyboardInterrupt:
        print(f"interrupted; {_GOES_ON}", file=sys.stderr)
        return INTERRUPTED
    except _Terminated:
        print(f"terminated; {_GOES_ON}", file=sys.stderr)
        return TERMINATED


def _terminate(*_: Any) -> None:
    raise _Terminated(TERMINATED)


# Imports are late, so that commands which run nothing do not wait for papermill.


def _run(options: argparse.Namespace) -> int:
    from epsdpo.batch.engine import ENGINE_LOG
    from epsdpo.batch.index import INDEX
    from epsdpo.batch.rounds import run_looks, wanted_experiments
    from epsdpo.batch.runner import Outcome, Resources, look_at_batch, run_batch
    from epsdpo.paper.claims.settings import read_claims
    from epsdpo.paper.published import published_beside
    from epsdpo.runs.layout import PAGE, experiments_in
    from epsdpo.runs.manifest import LOG, MANIFEST

    paths = [resolve_path(path) for path in options.config]
    names = "+".join(path.resolve().name.removesuffix(".yaml") for path in paths)
    run_dir = Path(options.output or Path("runs") / names)
    checked = [(experiment.method, experiment.train) for experiment in experiments_in(run_dir).values()]
    experiments = load_experiments(paths, parse_overrides(options.overrides), checked)
    resources = Resources(
        jobs=options.jobs,
        gpus=options.gpus,
        time_limit=options.time_limit,
        profile=options.profile,
        launch_config=options.launch,
        num_processes=options.num_processes,
    )
    claims = read_claims(resolve_path(options.claims)) if options.claims else None
    looks = claims is not None and bool(claims.looks)
    if options.dry_run:
        experiments = wanted_experiments(claims, experiments, run_dir) if looks else experiments
        found = look_at_batch(experiments, run_dir, resources, claims, options.keep_results, options.real_text)
        for stage_id, standing in found.items():
            does = "would run " if standing.due else "would keep" if standing.keeps else "finished  "
            print(f"{does} {stage_id}" + f": {standing.reason}" * (standing.due or standing.keeps))
        if not options.keep_results:
            could = look_at_batch(
                experiments, run_dir, resources, claims, keep_results=True, real_text=options.real_text
            )
            if keeps := sum(standing.keeps for standing in could.values()):
                print(f"--keep-results would keep {keeps} of them, which differ in code alone")
        print(f"{sum(standing.due for standing in found.values())} of {len(found)} stages would run")
        return 0
    published = published_beside(paths)

    def run(batch: list[Experiment]) -> Outcome:
        return run_batch(batch, run_dir, resources, claims, options.keep_results, options.real_text, published)

    outcome = run_looks(claims, experiments, run_dir, run) if looks else run(experiments)
    for stage_id, reason in outcome.kept.items():
        print(f"kept     {stage_id}, though {reason}")
    for name, (folder, error) in outcome.failed.items():
        print(f"failed   {name}: {error.splitlines()[0] if error else ''}", file=sys.stderr)
        print(f"         log: {folder / LOG}", file=sys.stderr)
    for name, reason in outcome.not_run.items():
        print(f"not run  {name}, {reason}", file=sys.stderr)
    if outcome.trouble:
        print(f"{outcome.trouble}\nwhole log: {run_dir / ENGINE_LOG}", file=sys.stderr)
    print(f"Index: {run_dir / INDEX}")
    page = run_dir / ("claims" if claims is not None else "real_text" if options.real_text else "report")
    if (page / MANIFEST).exists():
        print(f"Report: {page / PAGE}")
    return FAILED if outcome.failed or outcome.not_run else 0


def _stage(options: argparse.Namespace) -> int:
    _log_to_stdout()
    if options.end_with_stdin:
        from epsdpo.runs.watch import end_with_stdin

        end_with_stdin()
    from epsdpo.batch.gpus import taken_gpus
    from epsdpo.batch.stage import StageError, run_stage
    from epsdpo.runs.preempted import PREEMPTED, Preempted

    try:
        with taken_gpus(options.take_gpus, options.output):
            print(run_stage(options.stage, dict(options.parameter), options.output, options.time_limit))
    except StageError as error:
        print(error, file=sys.stderr)
        return FAILED
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    from epsdpo.batch.index import INDEX, write_index
    from epsdpo.batch.progress import batch_status
    from epsdpo.batch.runner import sole_runner
    from epsdpo.batch.stage import renew_report
    from epsdpo.evaluation.benchmarks.measure import harness_version, measure_run
    from epsdpo.evaluation.benchmarks.tasks import tasks_named
    from epsdpo.runs.layout import PAGE
    from epsdpo.runs.manifest import MANIFEST

    run_dir, report = options.run_dir, options.run_dir / "report"
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit is {options.limit}; give 1 or more questions")
    # What makes no sense is refused before hours of work, and before anything is written.
    harness_version()
    batch_status(run_dir)
    with sole_runner(run_dir):
        failures = measure_run(run_dir, tasks_named(options.tasks), options.limit, options.include_path)
        failures += renew_report(run_dir)
        write_index(run_dir)
    for failure in failures:
        print(f"failed   {failure}", file=sys.stderr)
    print(f"Index: {run_dir / INDEX}")
    if (report / MANIFEST).exists():
        print(f"Report: {report / PAGE}")
    return FAILED if failures else 0


def _status(options: argparse.Namespace) -> int:
    from epsdpo.batch.progress import print_status
    from epsdpo.runs.verify import verify

    return verify(options.run_dir) if options.verify else print_status(options.run_dir)


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
    print(text)
    return 0


def _check(options: argparse.Namespace) -> int:
    from epsdpo.batch.check.configs import check_configs, text_of

    paths = [resolve_path(path) for path in options.config]
    found = check_configs(paths, parse_overrides(options.overrides), options.num_processes)
    failed = 0
    for _, in_folder in itertools.groupby(found, key=lambda checked: checked.file.parent):
        checks = list(in_folder)
        print(text_of(checks), flush=True)
        failed += sum(checked.fails for checked in checks)
    return REFUSED if failed else 0


def _doctor(_: argparse.Namespace) -> int:
    from epsdpo.batch.doctor import doctor

    return doctor()


def _winrate(options: argparse.Namespace) -> int:
    from epsdpo.evaluation.scores.annotations import InputError
    from epsdpo.evaluation.scores.score_file import score_file

    try:
        numbers = score_file(options.annotations, options.gamed, options.difficulty, options.c)
    except InputError as error:
        print(f"winrate: {error}", file=sys.stderr)
        return REFUSED
    print(json.dumps(numbers, indent=1, allow_nan=False))
    return 0


def _conform(options: argparse.Namespace) -> int:
    from epsdpo.paper.conformance.conform import conform

    return conform(options.trainer, options.config)


def _verify(options: argparse.Namespace) -> int:
    from epsdpo.trajectory.same_run.verdict import keep_as_gold, verify_folder

    if options.add_to is None:
        return verify_folder(options.run, options.against)
    if options.against is not None:
        raise ConfigError("verify: --add-to compares nothing. Leave --against out")
    for file in keep_as_gold(options.run, options.add_to):
        print(file)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m epsdpo", description="ε-DPO from data to report.")
    parser.add_argument("--version", action="version", version=f"epsdpo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run what is due of every experiment of config files and folders")
    run.set_defaults(command=_run)
    _add_configs(run, at_least="+")
    run.add_argument("--output", metavar="DIR", help="run folder (default: runs/<names of the configs>)")
    run.add_argument(
        "--claims",
        metavar="FILE",
        default="",
        help="end in a test of claims, e.g. configs/paper_mini/_claims.yaml",
    )
    run.add_argument(
        "--real-text", action="store_true", help="end in 08_real_text: what the criterion decides with these policies"
    )
    run.add_argument("--dry-run", action="store_true", help="print for each stage whether it would run and why")
    run.add_argument(
        "--keep-results", action="store_true", help="keep finished results that differ in code alone, and mark them so"
    )
    run.add_argument("--jobs", metavar="N", type=int, default=1, help="stages at once (default: 1)")
    run.add_argument("--gpus", metavar="N", type=int, default=0, help="GPUs to share out between stages")
    run.add_argument("--time-limit", metavar="HOURS", type=float, help="end a stage that takes longer")
    run.add_argument("--profile", metavar="DIR", default="", help="submit to a cluster, see configs/cluster")
    run.add_argument("--launch", metavar="FILE", default="", help="accelerate config to start training processes by")
    run.add_argument("--num-processes", metavar="N", type=int, default=0, help="how many (default: as FILE says)")

    config = commands.add_parser("config", help="print what configs come to, or what their keys mean; runs nothing")
    config.set_defaults(command=_config)
    _add_configs(config, at_least="*")
    config.add_argument("--full", action="store_true", help="print whole resolved configs, not a table of them")
    config.add_argument(
        "--explain", metavar="KEY", nargs="?", const="", help="print the meaning of every key, or of those so named"
    )

    check = commands.add_parser("check", help="verify configs without GPU or network; runs nothing")
    check.set_defaults(command=_check)
    _add_configs(check, at_least="+")
    check.add_argument(
        "--num-processes", metavar="N", type=int, default=1, help="how many processes they are meant for (default: 1)"
    )

    machine = commands.add_parser("doctor", help="what is here, what it is enough for, and what is missing")
    machine.set_defaults(command=_doctor)

    status = commands.add_parser("status", help="where the stages of a run folder stand, also while they run")
    status.set_defaults(command=_status)
    status.add_argument("run_dir", metavar="DIR", type=Path, help="a folder of `epsdpo run`")
    status.add_argument(
        "--verify", action="store_true", help="compare its files with what the finished stages have left"
    )

    verify = commands.add_parser(
        "verify", help="is a run the published one: same bits, within its intervals, or another, and why"
    )
    verify.set_defaults(command=_verify)
    verify.add_argument(
        "run", metavar="RUN", type=Path, help="a folder of `epsdpo run`, of an experiment or a training"
    )
    verify.add_argument(
        "--against", metavar="GOLD", type=Path, help="published runs (default: those of whichever configs have them)"
    )
    verify.add_argument(
        "--add-to", metavar="GOLD", type=Path, help="compare nothing, and add RUN to the published runs in GOLD"
    )

    benchmark = commands.add_parser("benchmark", help="measure the models of a run folder on the tasks of Table 8")
    benchmark.set_defaults(command=_benchmark)
    benchmark.add_argument("run_dir", metavar="DIR", type=Path, help="a folder of `epsdpo run`")
    benchmark.add_argument(
        "--tasks", metavar="TASK", nargs="+", default=[], help="of lm-evaluation-harness (default: those of Table 8)"
    )
    benchmark.add_argument("--limit", metavar="N", type=int, help="ask only the first N questions, to try it out")
    benchmark.add_argument("--include-path", metavar="DIR", default="", help="folder of task files of your own")

    winrate = commands.add_parser("winrate", help="score a file of judgements; prints one JSON object")
    winrate.set_defaults(command=_winrate)
    winrate.add_argument("annotations", metavar="ANNOTATIONS", help="AlpacaEval's annotations.json, or gzipped")
    winrate.add_argument(
        "--gamed", metavar="FILE", help="rows of df_gamed.csv (default: the published file, by the hub)"
    )
    winrate.add_argument(
        "--difficulty", metavar="FILE", help="difficulty of each prompt (default: those in df_gamed.csv)"
    )
    winrate.add_argument(
        "--C", metavar="VALUE", dest="c", type=float, help="of length control (default: cross-validated)"
    )

    conform = commands.add_parser(
        "conform", help="which clause of the paper an implementation of ε-DPO breaks; imports and runs it"
    )
    conform.set_defaults(command=_conform)
    conform.add_argument("trainer", metavar="MODULE:TRAINER", help="e.g. epsdpo:EpsilonDPOTrainer; code that you trust")
    conform.add_argument("--config", metavar="FILE", type=Path, help="what it calls ε, β and its args (YAML)")

    stage = commands.add_parser("stage", help="do all the work of one stage, as `run` does for each")
    stage.set_defaults(command=_stage)
    stage.add_argument("stage", choices=tuple(STAGES))
    stage.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the stage")
    stage.add_argument(
        "--parameter", metavar="NAME=VALUE", type=_parameter, action="append", default=[], help="of its notebook"
    )
    stage.add_argument("--time-limit", metavar="HOURS", type=float, help="end it if it takes longer")
    stage.add_argument("--take-gpus", metavar="N/M", default="", help="wait for N of M GPUs that no other stage has")
    stage.add_argument("--end-with-stdin", action="store_true", help="end at once when standard input closes")
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


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    # What the runner writes is JSON, of which YAML reads two halves of an emoji where one emoji was written.
    try:
        return name, json.loads(value) if value.startswith('"') else yaml.safe_load(value)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(f"the value of {name} is not readable as YAML ({error})") from None


def _log_to_stdout() -> None:
    """Show this package's own log lines, without the chatter of the libraries below it."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("epsdpo")
    package.handlers = [handler]
    package.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
