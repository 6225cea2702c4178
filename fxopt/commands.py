"""The commands of the console script, in typer; what they do lives in the modules they call."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Annotated, Any

import typer

from fxopt.bench import SUITES
from fxopt.cli import COMMANDS
from fxopt.inspection.command import inspect
from fxopt.passes.technique import SettingError, Technique

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="A compiler backend for dynamic-compute transformers."
)  # fmt: skip

Model = Annotated[str | None, typer.Argument(help="A Hugging Face folder or hub name; default: the shipped model.")]
Folder = Annotated[str | None, typer.Argument(help="A Hugging Face folder or hub name.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Quick = Annotated[bool, typer.Option(help="Small sizes and few rounds: does it work, not how fast is it.")]
Json = Annotated[pathlib.Path | None, typer.Option("--json", help="Also write the result as JSON.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="A technique, e.g. layer_skip='{\"speedup\": 1.5}'. Repeatable.")
]


def fail(message: str) -> None:
    """Print to standard error and leave with exit code 2."""
    print(f"fxopt: {message}", file=sys.stderr)
    raise typer.Exit(2)


def techniques_of(settings: list[str] | None) -> list[Technique]:
    """``name={json fields}`` strings as techniques."""
    from fxopt.options import as_technique
    from fxopt.reporting import check_technique_name

    chosen = []
    for text in settings or []:
        name, _, fields = text.partition("=")
        try:
            technique = as_technique(check_technique_name(name.strip()), json.loads(fields) if fields else True)
        except json.JSONDecodeError as error:
            fail(f'--set {text!r}: the part after = is JSON, such as {{"speedup": 1.5}}: {error}')
        except SettingError as error:
            fail(str(error))
        else:
            if technique is not None:
                chosen.append(technique)
    return chosen


@app.command(help=COMMANDS["demo"])
def demo(
    model: Model = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to show.")] = 48,
    full: Annotated[
        bool, typer.Option("--full", help="Measure tokens per second against context instead, with a picture.")
    ] = False,
) -> None:
    from fxopt import demonstration

    if full and model is not None:
        fail("--full measures the model that ships with fxopt; give either a model or --full.")
    try:
        if full:
            demonstration.measure_contexts()
        else:
            demonstration.run(model, shown=tokens)
    except (SettingError, OSError, ImportError) as error:
        fail(str(error))


@app.command(help=COMMANDS["doctor"])
def doctor(
    model: Folder = None,
    run: Annotated[bool, typer.Option(help="Let the model generate a few tokens, to see what is compiled.")] = True,
    json_path: Json = None,
) -> None:
    from fxopt import doctor as examination

    loaded = load_model(model) if model else None
    findings = examination.examine(loaded, run=run)
    for finding in findings:
        print(finding)
    if json_path is not None:
        json_path.write_text(json.dumps([vars(f) for f in findings], indent=1))
    if any(f.level == "problem" for f in findings):
        raise typer.Exit(1)


@app.command(help=COMMANDS["plan"])
def plan(
    model: Folder = None,
    model_config: Annotated[pathlib.Path | None, typer.Option(help="A config.json instead: no weights.")] = None,
    set_: Setting = None,
    target: Annotated[str | None, typer.Option(help="Device to plan for, such as h200.")] = None,
    phase: Annotated[str, typer.Option(help="prompt, decode or both.")] = "both",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)] = 32,
    cache: Annotated[int, typer.Option(help="Positions of the static cache of the decode step.", min=1)] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    expect: Annotated[list[str] | None, typer.Option(help='Exit with 1 unless it holds, e.g. "flat_gemm>=1".')] = None,
    json_path: Json = None,
    html: Annotated[pathlib.Path | None, typer.Option(help="Write the page.")] = None,
) -> None:
    from fxopt.inspection import views
    from fxopt.planning import plan_phases

    if (model is None) == (model_config is None):
        fail("plan takes a model or --model-config config.json, one of the two.")
    try:
        built = load_model(model) if model else model_from_config(model_config)
        report = plan_phases(
            built, *techniques_of(set_), target=target, phase=phase, tokens=tokens, cache=cache, batch=batch
        )
        print(views.summary(report).text())
        if report.kernels:
            print(views.kernels(report).text())
        unmet = [message for message in (views.unmet(report, text) for text in expect or []) if message]
    except SettingError as error:
        fail(str(error))
    if json_path is not None:
        report.to_json(json_path)
    if html is not None:
        report.to_html(html)
    for message in unmet:
        print(f"fxopt: {message}", file=sys.stderr)
    if unmet:
        raise typer.Exit(1)


@app.command(help=COMMANDS["tune"])
def tune(
    model: Model = None,
    data: Annotated[pathlib.Path | None, typer.Option(help="A text file; default: the shipped held-out text.")] = None,
    only: Annotated[str, typer.Option(help="What to tune, as for --set; early_exit wants a goal.")] = "async_softmax",
    output: Annotated[
        pathlib.Path | None,
        typer.Option(help="The recipe to write; for flat_gemm a table (.json) or a folder, without it the cache."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Tokens of the text to read.")] = 8192,
    goal: Annotated[str | None, typer.Option(help="early_exit: agreement=0.97; sparse_attention: 'kl<0.01'.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    checkpoint: Annotated[
        pathlib.Path | None, typer.Option(help="A file to write after each window, and to go on from when it is there.")
    ] = None,
) -> None:
    from fxopt.evaluation import load_model as load_scored
    from fxopt.sparse_tuning import report_lines
    from fxopt.tinylm import HELDOUT
    from fxopt.tuning import tune as calibrate

    if only.partition("=")[0].strip() == "flat_gemm":
        tune_kernels(model, techniques_of([only])[0], output)
        return
    try:
        watched, tokenizer = load_scored(model or "tinylm")
        if only.strip() == "sparse_attention" and goal is not None:
            only = 'sparse_attention={"budget": 1.0}'  # method and budget are what is sought
        recipe = calibrate(
            watched, data or HELDOUT, *techniques_of([only]), goal=goal, tokenizer=tokenizer, limit=limit,
            context=context, checkpoint=checkpoint,
        )  # fmt: skip
        path = recipe.save(output or pathlib.Path("recipe.safetensors"))
    except (SettingError, OSError, ValueError, TypeError, ImportError) as error:
        fail(str(error))
    for module, technique in recipe.paths.items():
        print(f"{module:<40} {technique}")
    for technique in recipe.techniques:
        print(technique)
    for line in report_lines(recipe):
        print(line)
    print(f"written: {path}")


def tune_kernels(name: str | None, technique: Technique, output: pathlib.Path | None) -> None:
    """Time the linears of a model, whose weights are not needed."""
    from fxopt import gemm_tuning
    from fxopt.tinylm import FOLDER

    try:
        model = model_from_config(pathlib.Path(name) if name else FOLDER, as_stored=True)
        recipe = gemm_tuning.tune(model, technique, output)  # type: ignore[arg-type]
    except (SettingError, OSError, ValueError) as error:
        fail(str(error))
    for table in recipe.notes["tables"]:
        print(f"written: {table}")


@app.command(help=COMMANDS["evaluate"])
def evaluate(
    model: Model = None,
    data: Annotated[pathlib.Path | None, typer.Option(help="A text file; default: the shipped held-out text.")] = None,
    set_: Setting = None,
    limit: Annotated[int | None, typer.Option(help="Tokens of the text to score.")] = None,
    json_path: Json = None,
    plot: Annotated[pathlib.Path | None, typer.Option(help="Draw speed against quality.")] = None,
) -> None:
    from fxopt.evaluation import evaluate as score
    from fxopt.evaluation import load_model as load_scored
    from fxopt.tinylm import HELDOUT

    try:
        scored, tokenizer = load_scored(model or "tinylm")
        table = score(scored, data or HELDOUT, *techniques_of(set_), tokenizer=tokenizer, limit=limit)
    except (SettingError, OSError, ValueError, TypeError, ImportError) as error:
        fail(str(error))
    print(table)
    if json_path is not None:
        table.to_json(json_path)
    if plot is not None:
        table.plot(plot)


PARTS = "For early_exit: model, vocabulary or tuned; for mixture_of_depths: forward, training or decoding."


@app.command(help=COMMANDS["bench"])
def bench(
    suite: Annotated[str, typer.Argument(help=f"One of {', '.join(SUITES)}.")],
    technique: Annotated[str, typer.Option(help="For depth: the technique to measure.")] = "layer_skip",
    part: Annotated[str | None, typer.Option(help=PARTS)] = None,
    device: Device = "cpu",
    quick: Quick = False,
    keep: Annotated[bool, typer.Option(help="Keep the result among the committed ones.")] = False,
    json_path: Json = None,
    plot: Annotated[pathlib.Path | None, typer.Option(help="Draw the medians.")] = None,
) -> None:
    from fxopt.bench import draw, keep_with, load_suite

    if suite not in SUITES:
        fail(f"there is no suite {suite!r}; suites: {', '.join(SUITES)}.")
    if part is not None and suite != "depth":
        fail(f"suite {suite!r} has no parts; --part goes with depth --technique early_exit or mixture_of_depths.")
    options: dict[str, Any] = {"technique": technique, "part": part} if suite == "depth" else {}
    try:
        result = load_suite(suite)(device=device, quick=quick, **options)
    except (ValueError, ImportError, AssertionError) as error:
        fail(str(error))
    print(result.table())
    if json_path is not None:
        result.to_json(json_path)
    if plot is not None:
        draw(suite, result, plot)
    if keep:
        print(f"kept as {result.keep().name}")
        for path in keep_with(suite):
            print(f"kept as {path}")


def load_model(name: str) -> Any:
    """A causal LM (else any model) from a folder or the hub."""
    try:
        from transformers import AutoModel, AutoModelForCausalLM
    except ImportError:
        fail("models are loaded with transformers: pip install 'fxopt[hf]'")
    try:
        try:
            return AutoModelForCausalLM.from_pretrained(name).eval()
        except ValueError:
            return AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        return fail(f"{name!r} could not be loaded: {str(error).splitlines()[0]}")


def model_from_config(path: pathlib.Path | None, as_stored: bool = False) -> Any:
    """A model on the meta device from its config.json, or a name on the hub; `as_stored`: in the checkpoint's dtype."""
    import torch

    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError:
        fail("configs are read with transformers: pip install 'fxopt[hf]'")
    if path is not None and path.suffix == ".json" and not path.exists():  # the hub would be asked for it, in vain
        fail(f"{path} is no model config: there is no such file")
    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        fail(f"{path} is no model config: {str(error).splitlines()[0]}")
    with torch.device("meta"):
        try:
            built = AutoModelForCausalLM.from_config(config).eval()
            return built.to(config.dtype or torch.bfloat16) if as_stored else built
        except ValueError:
            return AutoModel.from_config(config).eval()


app.command(name="inspect", help=COMMANDS["inspect"], context_settings={"allow_extra_args": True})(inspect)
