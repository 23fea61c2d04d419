"""The command `unidec-ds`; thin: every subcommand calls one function of the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message

if TYPE_CHECKING:
    import torch


def main() -> None:
    """Entry point of the console script."""
    sys.exit(exit_with_message(_main))


def _main() -> None:
    args = _parser().parse_args()
    args.run_command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unidec-ds", description="UniDEC on DeepSpeed")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="tokenise a raw corpus once")
    prepare.add_argument("raw_dir", type=Path, help="a folder in one of the accepted layouts")
    prepare.add_argument("--out", type=Path, required=True, help="where the corpus goes")
    prepare.add_argument("--encoder", help="encoder whose tokenizer to use")
    prepare.add_argument("--max-length", type=int, default=32, help="tokens per text")
    prepare.add_argument("--text", choices=["title", "title+content"], default="title+content")
    prepare.add_argument(
        "--quarantine",
        type=Path,
        metavar="FILE",
        help="write bad lines here and go on without them (default: the first is an error)",
    )
    prepare.set_defaults(run_command=_prepare)

    info = commands.add_parser("info", help="describe a corpus or a run")
    info.add_argument("folder", type=Path, help="a prepared corpus or a run directory")
    info.set_defaults(run_command=_info)

    evaluate = commands.add_parser("evaluate", help="evaluate a trained run")
    evaluate.add_argument("run", type=Path, help="run directory")
    evaluate.add_argument("--split", choices=["test", "validation"], default="test")
    evaluate.add_argument("--view", choices=["de", "classifier", "unified"], help="default: all")
    evaluate.add_argument("--corpus", type=Path, help="where the corpus is now")
    _add_checkpoint(evaluate)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the metrics here too")
    evaluate.set_defaults(run_command=_evaluate)

    predict = commands.add_parser("predict", help="predict labels for texts")
    predict.add_argument("run", type=Path, help="run directory")
    predict.add_argument(
        "--input", metavar="FILE|-", help="one text a line; without it, you are asked for texts"
    )
    predict.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    predict.add_argument("--overwrite", action="store_true", help="replace --output")
    predict.add_argument("--k", type=int, default=5, help="labels per text")
    predict.add_argument("--view", choices=["de", "classifier", "unified"])
    predict.add_argument(
        "--weight-de",
        default="0.5",
        metavar="W|tuned",
        help="weight of the dual encoder in the unified view, from 0 to 1; tuned: the one that "
        "the run's validation queries chose (default: 0.5, equal)",
    )
    predict.add_argument(
        "--index",
        default="auto",
        metavar="auto|exact|ivf|hnsw|FILE",
        help="how labels are searched, or an index of this run (default: exact, ivf over many)",
    )
    predict.add_argument(
        "--new-labels", type=Path, metavar="FILE", help="labels the run never saw: `id, text`"
    )
    predict.add_argument("--batch-size", type=int, default=256, help="texts at once")
    predict.add_argument("--device", help="cpu or cuda; default: the GPU if there is one")
    predict.add_argument("--corpus", type=Path, help="where the corpus is now")
    _add_checkpoint(predict)
    predict.add_argument("--json", action="store_true", help="one JSON object per text")
    predict.set_defaults(run_command=_predict)

    report = commands.add_parser("report", help="one HTML page about a run, finished or not")
    report.add_argument("run", type=Path, help="a run directory")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    report.set_defaults(run_command=_report)

    export = commands.add_parser("export", help="write a run in a form that others use")
    export.add_argument("run", type=Path, help="run directory")
    export.add_argument("--out", type=Path, required=True, help="new folder")
    export.add_argument(
        "--format", required=True, choices=["sentence-transformers", "faiss", "vectors"]
    )
    export.add_argument("--view", choices=["de", "classifier", "unified"], help="default: the best")
    export.add_argument(
        "--index", choices=["auto", "exact", "ivf", "hnsw"], help="kind of the FAISS index"
    )
    export.add_argument("--dtype", choices=["fp32", "fp16"], help="of --format vectors")
    export.add_argument(
        "--new-labels", type=Path, metavar="FILE", help="labels the run never saw: `id, text`"
    )
    export.add_argument("--license", metavar="ID", help="of the model, such as apache-2.0")
    export.add_argument("--corpus", type=Path, help="where the corpus is now")
    _add_checkpoint(export)
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.set_defaults(run_command=_export)

    plan = commands.add_parser("plan", help="what a run will take: memory, disk, FLOPs, time")
    plan.add_argument("--recipe", required=True, help="a YAML file, or a recipe's name")
    plan.add_argument("--ds_config", required=True, type=Path, help="DeepSpeed configuration")
    plan.add_argument("--world-size", type=int, default=1, metavar="W", help="ranks (default: 1)")
    plan.add_argument(
        "--ranks-per-machine", type=int, metavar="N", help="that share memory (default: all)"
    )
    plan.add_argument("--corpus", help="raw or prepared corpus; replaces corpus.path")
    plan.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value"
    )
    plan.add_argument(
        "--measure",
        type=int,
        default=3,
        metavar="N",
        help="steps to time on this machine (default: 3); 0 gives no time",
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    sizes = plan.add_argument_group("instead of a corpus")
    sizes.add_argument("--labels", type=int, metavar="L", help="number of labels")
    sizes.add_argument("--queries", type=int, metavar="N", help="number of train queries")
    sizes.add_argument("--test-queries", type=int, default=0, metavar="N")
    sizes.add_argument(
        "--positives", type=float, default=5.0, metavar="X", help="per query (default: 5)"
    )
    sizes.add_argument(
        "--query-tokens", type=float, metavar="X", help="mean (default: encoder.max_length)"
    )
    sizes.add_argument("--label-tokens", type=float, metavar="X", help="likewise")
    machine = plan.add_argument_group("instead of this machine")
    machine.add_argument("--device", choices=["cpu", "cuda"], help="default: what is here")
    machine.add_argument("--host-gib", type=float, metavar="X", help="its memory")
    machine.add_argument("--device-gib", type=float, metavar="X", help="each accelerator's memory")
    plan.set_defaults(run_command=_plan)

    score = commands.add_parser("score", help="score any system's predictions")
    score.add_argument("--truth", type=Path, required=True, help="XMC sparse text or .npz")
    score.add_argument("--predictions", type=Path, required=True, help="likewise, with scores")
    score.add_argument("--train", type=Path, required=True, help="train positives")
    score.add_argument("--filter", type=Path, help="filter pairs, `row col` lines")
    score.add_argument("--propensity", required=True, metavar="A,B", help="such as 0.55,1.5")
    score.add_argument("--json", type=Path, metavar="FILE")
    score.set_defaults(run_command=_score)
    return parser


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        default="latest",
        metavar="latest|best|PATH",
        help="which of the run's (best: on validation, see checkpoint.keep_best; default: latest)",
    )


def _prepare(args: argparse.Namespace) -> None:
    from unidec_ds.data.prepare import prepare
    from unidec_ds.encoders import PACKAGED_ENCODER

    corpus = prepare(
        args.raw_dir,
        args.out,
        encoder=args.encoder or PACKAGED_ENCODER,
        max_length=args.max_length,
        text=args.text,
        quarantine=args.quarantine,
    )
    print(corpus.describe())
    if args.quarantine and not corpus.num_lines_put_aside:
        print("  no bad lines")


def _info(args: argparse.Namespace) -> None:
    from unidec_ds.data.corpus import MANIFEST, open_corpus
    from unidec_ds.run import describe_run

    if (args.folder / MANIFEST).is_file():
        print(open_corpus(args.folder).describe())
    elif (args.folder / "config.yaml").is_file():
        print(describe_run(args.folder))
    else:
        raise UserError(
            f"{args.folder}: neither a prepared corpus ({MANIFEST}) nor a run (config.yaml)"
        )


def _evaluate(args: argparse.Namespace) -> None:
    from unidec_ds.assembly import evaluate_split, load_run, trained_views, tune_unified
    from unidec_ds.evaluation import format_table
    from unidec_ds.run import read_unified_weight
    from unidec_ds.unified import TUNED_VIEW

    run = load_run(args.run, _device(), args.corpus, args.checkpoint)
    views = trained_views(run.recipe)
    if args.view:
        if args.view not in views:
            raise UserError(f"--view: this run trained {', '.join(views)}, not {args.view}")
        views = (args.view,)
    weight_de = None
    if "unified" in views:
        weight_de = read_unified_weight(run.folder, run.checkpoint)
        if weight_de is None:
            tuned = tune_unified(run.model, run.rows, run.corpus, run.recipe)
            weight_de = tuned.weight_de if tuned else None
    weights = {} if weight_de is None else {TUNED_VIEW: weight_de}
    result = evaluate_split(
        run.model, run.rows, run.corpus, run.recipe, args.split, views, unified_weights=weights
    )
    print(f"{args.split} set, {result.describe_queries()}, {run.checkpoint}")
    print(format_table(result.metrics, run.recipe.evaluation.propensity))
    if weights:
        print(f"{TUNED_VIEW}: weight of the dual encoder {weight_de:g}, chosen on validation")
    if args.json:
        args.json.write_text(json.dumps({args.split: result.metrics}, indent=2) + "\n")


def _predict(args: argparse.Namespace) -> None:
    for option, value in (("--k", args.k), ("--batch-size", args.batch_size)):
        if value < 1:
            raise UserError(f"{option}: found {value}; needs at least 1")

    from unidec_ds.serving.console import answer_lines, check_files, converse

    check_files(args.input, args.output, args.overwrite)

    from unidec_ds.serving.label_search import parse_index
    from unidec_ds.serving.predict import load

    predictor = load(
        args.run,
        device=args.device,
        corpus=args.corpus,
        view=args.view,
        index=parse_index(args.index),
        new_labels=args.new_labels,
        weight_de=_weight_de(args.weight_de, args.run, args.checkpoint),
        checkpoint=args.checkpoint,
    )
    if args.input is None:
        converse(predictor, k=args.k)
    else:
        answer_lines(
            predictor,
            args.input,
            args.output,
            k=args.k,
            batch_size=args.batch_size,
            as_json=args.json,
        )


def _plan(args: argparse.Namespace) -> None:
    from unidec_ds.preflight.command import PlanRequest, plan_run

    request = PlanRequest(
        recipe=args.recipe,
        ds_config=args.ds_config,
        overrides=[*args.set, *([f"corpus.path={args.corpus}"] if args.corpus else [])],
        world_size=args.world_size,
        ranks_per_machine=args.ranks_per_machine,
        labels=args.labels,
        queries=args.queries,
        test_queries=args.test_queries,
        positives=args.positives,
        query_tokens=args.query_tokens,
        label_tokens=args.label_tokens,
        device=args.device,
        host_gib=args.host_gib,
        device_gib=args.device_gib,
        measured_steps=args.measure,
        json_file=args.json,
    )
    print(plan_run(request))


def _report(args: argparse.Namespace) -> None:
    from unidec_ds.report.page import write_report

    print(write_report(args.run, args.out))


def _weight_de(text: str, run: Path, which: str) -> float:
    from unidec_ds.checkpoint import choose
    from unidec_ds.run import read_unified_weight

    if text == "tuned":
        chosen = choose(run, which)
        tuned = read_unified_weight(run, chosen)
        if tuned is None:
            raise UserError(
                f"--weight-de tuned: {run / 'evaluation.json'} names no weight for {chosen.name}; "
                "one is chosen at the end of training where the recipe keeps "
                "validation queries (corpus.validation_fraction); give a number instead"
            )
        return tuned
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= 1:
        raise UserError(f"--weight-de: found {text!r}; needs a number from 0 to 1, or tuned")
    return weight


def _export(args: argparse.Namespace) -> None:
    from unidec_ds.assembly import load_run
    from unidec_ds.export.formats import ExportConfig, export_run
    from unidec_ds.index import IndexConfig

    for option, wanted in (("index", "faiss"), ("dtype", "vectors")):
        if getattr(args, option) and args.format != wanted:
            raise UserError(f"--{option}: has no effect on --format {args.format}; leave it out")
    if args.new_labels and args.format == "sentence-transformers":
        raise UserError(
            "--new-labels: has no effect on --format sentence-transformers, which holds no labels; "
            "leave it out, and encode them with the exported model"
        )
    config = ExportConfig(
        format=args.format,
        view=args.view,
        index=IndexConfig(kind=args.index or "auto"),
        dtype=args.dtype or "fp32",
        new_labels=args.new_labels,
        license_id=args.license or None,
    )
    export_run(
        load_run(args.run, _device(), args.corpus, args.checkpoint),
        args.out,
        config,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {args.format}; how to use it is in {args.out / 'README.md'}")


def _score(args: argparse.Namespace) -> None:
    from unidec_ds.data.predictions import score_files

    try:
        a, b = (float(part) for part in args.propensity.split(","))
    except ValueError:
        raise UserError(f"--propensity: found {args.propensity!r}; needs A,B") from None
    scores = score_files(
        args.truth, args.predictions, args.train, filter_pairs=args.filter, propensity=(a, b)
    )
    for name, value in scores.items():
        print(f"{name:<12}{value:8.2f}")
    print(f"percent; propensity a={a} b={b}")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=2) + "\n")


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
