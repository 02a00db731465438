"""`edgecomp fit`: what meets limits on memory, time and accuracy on a device, before anything is built."""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgecomp.commands.options import JSON, columns, print_json, progress
from edgecomp_runtime.errors import InputError

if TYPE_CHECKING:
    from edgecomp.fit.answer import Relax
    from edgecomp.fit.fitting import Found
    from edgecomp.fit.limits import Limit
    from edgecomp.fit.plans import Plan
    from edgecomp.predict.predict import Estimate

SHOWN = 10  # plans of a table, where methods multiply them; --json has all


@click.command("fit")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--device", "device_name", required=True, help="A device by its id; see `edgecomp devices`.")
@click.option("--max-memory", metavar="SIZE", help="Such as 4GiB or 800MiB. [default: what the device has beside its system]")
@click.option("--max-ttft", metavar="TIME", help="To the first token, such as 500ms or 0.5s.")
@click.option("--max-tpot", metavar="TIME", help="For each further token.")
@click.option("--min-accuracy", metavar="P%|POINTS", help="95% is a share of the full model's accuracy in the sweep, 95 are points of 100.")
@click.option("--sweep", "sweeps", multiple=True, metavar="FOLDER", type=click.Path(path_type=Path),
              help="What `edgecomp sweep` wrote, for accuracies. May be repeated.")
@click.option("--prompt-tokens", type=int, help="Rows of the prompt as they enter, visual tokens among them. [default: these and 64 of text]")
@click.option("--context", type=int, help="Rows in the window when a token is decoded, uncompressed. [default: the prompt's]")
@click.option("--visual-tokens", type=int, help="Visual tokens of all pictures in the prompt. [default: one picture's, of the sweep or the bundle]")
@JSON
def command(model: Path, device_name: str, max_memory: str | None, max_ttft: str | None, max_tpot: str | None, min_accuracy: str | None,
            sweeps: tuple[Path, ...], prompt_tokens: int | None, context: int | None, visual_tokens: int | None, as_json: bool) -> None:
    """Find the method, site, budget and precision that meet limits on a device, the most accurate first.

    MODEL is a config.json, a folder that has one, or a bundle, of which its own plans are looked at. Accuracy is what a sweep measured;
    time and memory are predicted, with 90 % intervals: a limit that the whole interval is within is met surely, one that the predicted
    value is within is likely met. Exits with 1 where nothing meets the limits, and says what comes closest and what to relax.

    \b
    edgecomp fit config.json --device jetson-orin-nano-8gb --max-ttft 500ms --min-accuracy 95% --sweep sweep
    """
    from edgecomp import devices
    from edgecomp.fit.fitting import of_bundle, of_config
    from edgecomp.fit.limits import limits
    from edgecomp.fit.sweeps import read
    from edgecomp_runtime.bundle import Bundle
    asked = limits(max_memory, max_ttft, max_tpot, min_accuracy)
    device, measured = devices.load(device_name), read(sweeps)
    if (model / "edgecomp.json").is_file():
        if visual_tokens is not None:
            raise InputError("--visual-tokens is not for a bundle, which has its own: give a config.json")
        bundle = Bundle.open(model)
        with progress("predicting", len(bundle.manifest.plans)) as bar:
            found = of_bundle(bundle, device, asked, measured, prompt_tokens=prompt_tokens, context=context, done=lambda: bar.update(1))
    else:
        found = of_config(model, device, asked, measured, prompt_tokens=prompt_tokens, context=context, visual_tokens=visual_tokens)
    if as_json:
        print_json(_plain(found))
    else:
        click.echo("\n\n".join(_text(model, found)))
    if not found.answer.meets:
        sys.exit(1)


def _text(model: Path, found: Found) -> Iterator[str]:
    """Paragraphs and tables."""
    from edgecomp.fit.fitting import to_sweep
    answer, request, limits = found.answer, found.request, found.limits
    shown = answer.meets or tuple(filter(None, [answer.closest]))
    kind = "plans" if found.sweeps or found.bundle else "budgets" if found.tokens else "precisions"
    visual = f", {request.visual_tokens} of them visual" if request.visual_tokens else ""
    yield (f"{f'{len(answer.meets)} of' if answer.meets else 'None of'} {found.looked_at} {kind} meet" + ("s" if len(answer.meets) == 1 else "")
           + f" {', '.join(f'{limit.name} {limit.text}' for limit in limits)}\n"
           f"{found.device.label}, {shown[0].prediction.engine}; a prompt of {request.prompt_tokens} rows{visual}, in a window of {request.context}\n"
           + "".join(f"accuracy: measured by {s.folder} in {s.precision}, {s.full.questions} questions about {s.full.pictures} pictures, "
                     f"{s.full.accuracy:.1f} % with all {s.about.tokens} tokens\n" for s in found.sweeps)
           + "times and memory: predicted, with 90 % intervals; surely: the whole interval is within the limit, likely: the value is")
    yield ("" if answer.meets else "What comes closest:\n") + _table(shown, found)
    if answer.relax:
        how = "one of these is enough" if answer.relax[0].alone else "all of these together"
        yield f"What to relax, {how}:\n" + "\n".join(f"  {_relaxed(one, found)}" for one in answer.relax)
    if found.not_measured:
        yield (f"Whose accuracy was not measured, and which meet the other limits, {len(found.not_measured)}:\n"
               + _table(_some_of_each(found.not_measured), found))
    if any(plan.choice.in_tower and not found.bundle for plan in shown[:SHOWN]):
        yield "*: predicted as if the tower were not cut, an upper bound; of a bundle, its own graphs are counted"
    if found.absent:
        yield f"{found.absent} plans of the sweep are not in the bundle: `edgecomp fit` of the model's config.json looks at them all"
    if found.refused:
        yield "Cannot be predicted:\n" + "\n".join(f"  {name}: {why}" for name, why in found.refused.items())
    if not found.sweeps:
        keeps = "".join([*dict.fromkeys(f" --keep {plan.choice.keep}" for plan in shown if plan.choice.keep < found.tokens)][:3])
        yield "Accuracy is not known." + (
            f" `edgecomp sweep {to_sweep(model)} -o sweep --method NAME{keeps} --data QUESTIONS` measures it, for methods that you name "
            "(`edgecomp methods`) and for random and pool, the baselines to beat" if keeps else "")
    elif answer.meets and (known := answer.meets[0].measured) and not found.bundle:
        first = next(s for s in found.sweeps if str(s.folder) == known.sweep)
        yield f"The first is the plan {answer.meets[0].choice.plans[0]!r} of {first.folder / 'bundle'}, in {first.about.precision} there"


def _some_of_each(plans: Sequence[Plan]) -> list[Plan]:
    """The first plans of each precision."""
    precisions = dict.fromkeys(plan.precision for plan in plans)
    return [plan for precision in precisions for plan in [plan for plan in plans if plan.precision == precision][:SHOWN // 3]]


def _table(plans: Sequence[Plan], found: Found) -> str:
    measured, methods = any(plan.measured for plan in plans), any(plan.choice.method for plan in plans)
    first, accuracy = "plan" if found.bundle else "method", ("accuracy %", "of full %", "loses to")
    rows: list[tuple[str, ...]] = [
        (*(["", ""] if methods else []), "", "", *(["measured", "measured", ""] if measured else []), "predicted", "predicted", "predicted", ""),
        (*([first, "site"] if methods else []), "tokens", "precision", *(accuracy if measured else []), "TTFT ms", "ms a token", "GiB", "meets")]
    shown = plans[:SHOWN] if methods else plans
    for plan in shown:
        choice, predicted, known = plan.choice, plan.prediction, plan.measured
        rows.append((*([_method(plan, found), "+".join(choice.sites) or "-"] if methods else []), str(choice.keep or "-"), plan.precision,
                     *([f"{known.accuracy:.1f}", f"{known.share:.1f}", ", ".join(known.loses_to)] if known else []),
                     _interval(predicted.ttft_ms) + ("*" if choice.in_tower and not found.bundle else ""), _interval(predicted.tpot_ms),
                     _interval(predicted.memory_bytes, 2**30), _meets(plan, found.limits)))
    left = {0, 1, 3, 6, 10} if methods and measured else {0, 1, 3, 7} if methods else {1, 5}
    more = f"\nand {len(plans) - len(shown)} more, which --json lists" if len(plans) > len(shown) else ""
    return columns(rows, right=lambda column: column not in left) + more


def _interval(estimate: Estimate, unit: float = 1) -> str:
    """The value and its interval, with three digits."""
    value, low, high = (each / unit for each in (estimate.value, estimate.low, estimate.high))
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _method(plan: Plan, found: Found) -> str:
    """The method with what differs from its defaults in the quota; of a bundle, what the plan is called there."""
    choice = plan.choice
    if found.bundle:
        return choice.plans[0]
    given = "".join(f" {part}" for part in (choice.windows, "compact" if choice.position == "compact" else "") if part)
    return choice.method + given


def _meets(plan: Plan, limits: Sequence[Limit]) -> str:
    """'surely', 'likely' with the options that are met no better than that, or those that are not."""
    how = {limit.short: limit.met(plan) for limit in limits if not (limit.least and plan.measured is None)}
    unmet, likely = ([name for name, met in how.items() if met == kind] for kind in ("no", "likely"))
    return f"not {', '.join(unmet)}" if unmet else f"likely ({', '.join(likely)})" if likely else "surely"


def _relaxed(one: Relax, found: Found) -> str:
    """One line: the limit, what it would have to be, and for which plan."""
    choice = one.plan.choice
    where = f"{_method(one.plan, found)} at {'+'.join(choice.sites)}" if choice.sites else ""
    how = ", ".join(part for part in (where, f"{choice.keep} tokens" if choice.keep else "", one.plan.precision) if part)
    helps = one.plan.prediction.way_out if one.limit.quantity == "memory_bytes" else ""
    needed = f"is the {'most' if one.limit.least else 'least'} with the other limits" if one.alone else "is needed"
    return f"{one.limit.name} {one.limit.text}: {one.text} {needed}, by {how}" + (f"; what helps: {helps}" if helps else "")


def _plain(found: Found) -> dict[str, Any]:
    """The whole answer as JSON has it."""
    from edgecomp.fit.answer import sure

    def plain(plan: Plan) -> dict[str, Any]:
        choice, predicted, rest = plan.choice, plan.prediction, [limit for limit in found.limits if plan.measured or not limit.least]
        return {"method": choice.method or None, "parameters": choice.parameters, "sites": choice.sites, "position": choice.position,
                "windows": choice.windows, "keep": choice.keep, "tokens_mean": choice.mean, "plans": choice.plans, "precision": plan.precision,
                "meets": sure(plan, rest), "limits": {limit.name: limit.met(plan) for limit in rest},
                "accuracy": {"kind": "measured", **dataclasses.asdict(plan.measured)} if plan.measured else None,
                **{name: dataclasses.asdict(getattr(predicted, name)) for name in ("ttft_ms", "tpot_ms", "memory_bytes")},
                "upper_bound": choice.in_tower and not found.bundle}

    answer = found.answer
    return {"device": found.device.label, "engine": (answer.meets[0] if answer.meets else answer.closest).prediction.engine,  # type: ignore[union-attr]
            "request": dataclasses.asdict(found.request), "tokens": found.tokens,
            "limits": [dataclasses.asdict(limit) for limit in found.limits],
            "sweeps": [{"folder": str(s.folder), "machine": s.machine, "precision": s.precision, "questions": s.full.questions,
                        "pictures": s.full.pictures, "accuracy": s.full.accuracy, "kind": "measured"} for s in found.sweeps],
            "looked_at": found.looked_at, "meets": [plain(plan) for plan in answer.meets],
            "closest": plain(answer.closest) if answer.closest else None,
            "relax": [{"limit": one.limit.name, "asked": one.limit.text, "needed": one.text, "value": one.value, "alone": one.alone,
                       "plan": plain(one.plan)} for one in answer.relax],
            "not_measured": [plain(plan) for plan in found.not_measured], "refused": found.refused}
