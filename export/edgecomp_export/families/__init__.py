"""One module a Hugging Face `model_type`; the file's name is the type. The table is the only place that lists them."""
from __future__ import annotations

from edgecomp_export.families.base import Family
from edgecomp_runtime.tables import look_up

FAMILIES = {
    "gemma3": "edgecomp_export.families.gemma3:Gemma3",
    "idefics3": "edgecomp_export.families.idefics3:Idefics3",
    "internvl": "edgecomp_export.families.internvl:InternVL",
    "llava": "edgecomp_export.families.llava:Llava",
    "llava_next": "edgecomp_export.families.llava_next:LlavaNext",
    "llava_onevision": "edgecomp_export.families.llava_onevision:LlavaOnevision",
    "paligemma": "edgecomp_export.families.paligemma:PaliGemma",
    "qianfan_ocr": "edgecomp_export.families.qianfan_ocr:QianfanOCR",
    "qwen2_5_vl": "edgecomp_export.families.qwen2_5_vl:Qwen2_5VL",
    "qwen2_vl": "edgecomp_export.families.qwen2_vl:Qwen2VL",
    "qwen3_vl": "edgecomp_export.families.qwen3_vl:Qwen3VL",
    "smolvlm": "edgecomp_export.families.smolvlm:SmolVLM",
}


def family_of(model_type: str) -> type[Family]:
    """The family class for a `model_type`. Raises UnknownNameError with what is known."""
    found: type[Family] = look_up("model family", model_type, FAMILIES)
    return found
