"""What a report says of a bundle, a plan and a picture, in the form that the page takes, whoever measured it."""
from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from edgecomp.canvas import on_canvas, pictures
from edgecomp.footprint import cache_bytes, weight_bytes
from edgecomp_runtime.manifest import Manifest, PlanInfo


def about(name: str, manifest: Manifest) -> dict[str, Any]:
    """The bundle."""
    vision, decoder = manifest.vision, manifest.decoder
    return {"name": name, "source": manifest.source.model, "family": manifest.source.family, "precision": manifest.precision,
            "weights": manifest.weights, "bits": bits(manifest), "context": decoder.context, "tokens": vision.tokens,
            "grid": list(on_canvas(manifest, [])[0]), "vision_layers": vision.layers,
            "decoder_layers": decoder.layers, "hidden": decoder.hidden, "weights_bytes": weight_bytes(manifest)}


def bits(manifest: Manifest) -> str:
    """What tells bundles of one model apart: how the decoder's weights are stored, and the tower's products where they were calibrated."""
    return manifest.weights + (f" and {manifest.calibrated.activations} tower" if manifest.calibrated else "")


def counts(manifest: Manifest, plan: PlanInfo) -> dict[str, float]:
    """The three numbers of visual tokens that papers mix up: entering the decoder, behind the last cut, mean over its layers."""
    by_layer = [plan.tokens_at(layer) for layer in range(manifest.decoder.layers)]
    return {"enter": by_layer[0], "after_cut": by_layer[-1], "mean_over_layers": sum(by_layer) / len(by_layer)}


def memory(manifest: Manifest, plan: PlanInfo, prompt_rows: int | None) -> dict[str, Any]:
    """Weights and cache as the manifest has them; what a prompt uses of the cache is None where none was measured."""
    return {"kind": "counted", "weights_bytes": weight_bytes(manifest), "cache_bytes": cache_bytes(manifest, plan),
            "cache_used_bytes": cache_bytes(manifest, plan, prompt_rows) if prompt_rows else None}


def peak(took: Mapping[str, Any] | None) -> dict[str, Any]:
    """The peak of memory, and the meter that read it; None where nothing was measured."""
    return {"kind": "measured", "peak_bytes": (took or {}).get("peak_bytes"), "meter": (took or {}).get("meter")}


def example(picture: str, question: str, answer: str, seen: Mapping[str, tuple[PlanInfo, Sequence[int], str]], manifest: Manifest) -> dict[str, Any]:
    """A picture, and what each plan kept of it and said, by its name in the report."""
    from edgecomp_runtime.images import load
    buffer = io.BytesIO()
    pictures(load(picture), manifest.image)[0].save(buffer, "JPEG", quality=85)
    shown = {name: {"kept": on_canvas(manifest, kept)[1], "said": said, "pooled": pooled(plan) and len(manifest.vision.tiles) == 1}
             for name, (plan, kept, said) in seen.items()}
    return {"image": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), "question": question, "answer": answer, "plans": shown}


def pooled(plan: PlanInfo) -> bool:
    """Whether what is left are the cells of a coarser grid."""
    return bool(plan.steps) and plan.steps[-1].method == "pool"
