"""Finding, checking and loading a Hugging Face checkpoint, and reading what stands beside its weights."""
from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from edgecomp_export.families import FAMILIES, family_of
from edgecomp_export.families.base import Family, Geometry
from edgecomp_export.headers import CheckpointError as CheckpointError
from edgecomp_export.headers import first_line, headers, stored_dtype
from edgecomp_export.prequantized import METHODS, Prequantized
from edgecomp_runtime.bundle import sha256_of
from edgecomp_runtime.manifest import ImageInfo, TextInfo

WANTED = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]


def find(model: str) -> Path:
    """The local folder of a checkpoint: a folder as it is, a hub name ('org/name') downloaded to Hugging Face's cache.

    Raises:
        CheckpointError: neither, or a folder without config.json or safetensors weights.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise CheckpointError(f"{model} is not a folder, and not the name of a model on the Hugging Face hub (org/name)")
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(model, allow_patterns=WANTED))
        except Exception as error:  # the hub client raises a dozen kinds; each is shown in one line
            raise CheckpointError(f"{model} could not be fetched from the Hugging Face hub "
                                  f"({type(error).__name__}: {first_line(error)}); give a local folder instead") from None
    if not folder.is_dir():
        raise CheckpointError(f"{model} is a file: give the checkpoint's folder, which holds config.json and the weights")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model} is not a Hugging Face checkpoint: it has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{model} has no safetensors weights; convert it with transformers' save_pretrained first")
    if "model_type" not in read_json(folder, "config.json"):
        raise CheckpointError(f"{folder / 'config.json'} names no model_type: save the model with transformers' save_pretrained")
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint, empty where there is none."""
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} cannot be read ({error}): download the checkpoint again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{folder / name} is not a JSON object but {data!r:.60}: download the checkpoint again")
    return data


def config(folder: Path) -> Any:
    """The checkpoint's config, once it is known to be one that edgecomp could take.

    Raises:
        CheckpointError: a checkpoint quantised by another method than GPTQ and AWQ, a text-only one, one whose code comes with it, one of a family
            that edgecomp lacks, or one that transformers cannot read.
        UnknownNameError: a model type that nobody knows.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    raw = read_json(folder, "config.json")
    model_type = str(raw.get("model_type"))
    if quantised := _quantised(raw):
        method = quantised.get("quant_method", "method unknown") if isinstance(quantised, dict) else quantised
        if method not in METHODS:
            raise CheckpointError(f"{folder} is quantised ({method}): give the checkpoint in bf16, fp16 or fp32 that it was made from, or one of "
                                  f"{' or '.join(METHODS)}")
    if model_type not in CONFIG_MAPPING and raw.get("auto_map"):
        raise CheckpointError(f"{folder} ({model_type}) brings its own model code, which edgecomp does not run: "
                              "look for a conversion to transformers' own classes, whose names often end in -hf")
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise CheckpointError(f"{folder} ({model_type}) is a text-only model: edgecomp compiles models that take pictures")
    if model_type in CONFIG_MAPPING and model_type not in FAMILIES:
        raise CheckpointError(f"{folder} is a {model_type} model, which edgecomp cannot export: it can {', '.join(sorted(FAMILIES))}")
    family_of(model_type)
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"transformers cannot read {folder / 'config.json'} ({type(error).__name__}: {first_line(error)}): "
                              "download the checkpoint again") from None
    for part in (found, found.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # transformers would look for the method's own package
    return found


def _quantised(raw: dict[str, Any]) -> Any:
    """What config.json says of quantisation; the text model may have an entry of its own."""
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    return next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)


def prequantized(folder: Path) -> Prequantized | None:
    """The weights that GPTQ or AWQ quantised, where `config` says there are any; raises what `Prequantized` does."""
    settings = _quantised(read_json(folder, "config.json"))
    if not settings:
        return None
    headers(folder)  # files that can be read
    return Prequantized(folder, settings)


def stored_in(model: str) -> str | None:
    """What GPTQ or AWQ quantised the weights of a checkpoint to, such as 'int4'; None where they are plain. Reads no weight.

    Raises what `find`, `config` and `prequantized` do.
    """
    folder = find(model)
    config(folder)
    stored = prequantized(folder)
    return stored.precision if stored else None


def family_at(folder: Path, geometry: Geometry) -> Family:
    """The family of a checkpoint with its facts, before any weight is read. Raises what `config` and `processor_settings` do."""
    found = config(folder)
    return family_of(found.model_type)(found, processor_settings(folder), geometry)


def load(folder: Path, dtype: torch.dtype | None = None, stored: Prequantized | None = None) -> Any:
    """The model in evaluation mode, in the type that it is stored in (so that its files are mapped, not read) or another.

    Weights that GPTQ or AWQ quantised are NaN: what they stand for is in `stored`, which is looked for where it is not given.

    Raises:
        CheckpointError: transformers cannot load it, would make up weights that the checkpoint lacks, or has no use for some.
    """
    import transformers
    from transformers import AutoModelForImageTextToText, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    from transformers.utils import logging
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype, verbosity = dtype or stored_dtype(folder), logging.get_verbosity()
    stored = stored or prequantized(folder)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what its table of odd weights would say is said below, in one line
    choices: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with ExitStack() as files:
            if stored is None:
                loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, **choices)
            else:  # the Auto class wants a folder, and reads its files then
                made = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[read_json(folder, "config.json")["model_type"]])
                loaded = made.from_pretrained(None, config=config(folder), state_dict=stored.state(dtype, files), **choices)
        if stored and (folder / "generation_config.json").is_file():
            loaded[0].generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"transformers cannot load {folder} ({type(error).__name__}: {first_line(error)}): "
                              "download the checkpoint again") from None
    finally:
        logging.set_verbosity(verbosity)
    model, found = loaded
    if mismatched := sorted(found["mismatched_keys"]):
        name, has, wanted = mismatched[0]
        raise CheckpointError(f"{folder} has weights of another shape than its config.json says, {len(mismatched)} in all: "
                              f"{name} is {list(has)} and should be {list(wanted)}; download the checkpoint again")
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{folder} lacks {len(missing)} of the model's weights, {missing[0]} among them: download the checkpoint again")
    if unexpected := sorted(found["unexpected_keys"]):
        raise CheckpointError(f"{folder} has {len(unexpected)} weights that a {model.config.model_type} model does not, {unexpected[0]} among them: "
                              "its config.json is of another model")
    return model.eval()


def as_oracle(model: Any, attention: str = "sdpa") -> Any:
    """The model with one of HF's own attention implementations, 'eager' where it has no other."""
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        model.set_attn_implementation("eager")
    return model


def fingerprint(folder: Path) -> str:
    """One hash over the names and contents of the config and weight files."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def processor_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings, from processor_config.json (transformers 5) or preprocessor_config.json.

    Beside them `special_tokens`: the tokenizer's named ones (such as start_image_token), which processors put around pictures.
    """
    settings = read_json(folder, "processor_config.json").get("image_processor") or read_json(folder, "preprocessor_config.json")
    if not settings:
        raise CheckpointError(f"{folder} has no processor_config.json or preprocessor_config.json: the image size and scale are unknown")
    return {**settings, "special_tokens": named_tokens(folder)}


def named_tokens(folder: Path) -> dict[str, str]:
    """The tokens that the tokenizer's settings have names for, wherever this version of transformers has put them."""
    settings = read_json(folder, "tokenizer_config.json")
    found = {name: value for name, value in settings.items() if name.endswith("_token")}
    for nested in (settings.get("extra_special_tokens"), settings.get("model_specific_special_tokens")):
        found |= nested if isinstance(nested, dict) else {}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def image_info(settings: dict[str, Any], side: tuple[int, int]) -> ImageInfo:
    """The image contract from an HF image processor's settings; `side` is what the tower takes, (height, width)."""
    size, crop = settings.get("size") or {}, settings.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"]) if crop else None
    shortest = size.get("shortest_edge") if settings.get("do_center_crop", crop is not None) else None
    final = crop if shortest else (size.get("height", shortest), size.get("width", shortest))
    if lacking := [name for name in ("image_mean", "image_std") if len(settings.get(name) or ()) != 3]:
        raise CheckpointError(f"the image processor has no {' and no '.join(lacking)} of 3 channels: it says how pictures become pixels")
    if final != side:
        raise CheckpointError(f"the image processor makes pictures of {final}, the vision tower takes {side}: this checkpoint does not fit together")
    return ImageInfo(side, shortest, settings.get("resample", 3), settings.get("rescale_factor", 1 / 255),
                     tuple(settings["image_mean"]), tuple(settings["image_std"]))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as transformers makes it. Raises CheckpointError where it has no fast form, which the runtime needs."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"transformers cannot load the tokenizer of {folder} ({type(error).__name__}: {first_line(error)})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(f"{folder} has no fast tokenizer; save it with transformers' fast tokenizer first")
    return tokenizer


def text_info(folder: Path, tokenizer: Any, family: Any, names: dict[str, str]) -> TextInfo:
    """Tokenizer facts. `names` maps 'tokenizer' and 'chat_template' to where the bundle keeps them."""
    config, number = family.config, image_id(family.config)
    ends = read_json(folder, "generation_config.json").get("eos_token_id", config.get_text_config().eos_token_id)
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    image_token = str(tokenizer.convert_ids_to_tokens(number))
    return TextInfo(names["tokenizer"], names.get("chat_template"), special,
                    tuple(ends) if isinstance(ends, list) else (ends,) if ends is not None else (),
                    image_token, number, family.placeholder(image_token))


def image_id(config: Any) -> int:
    """The id whose rows visual tokens take."""
    found = getattr(config, "image_token_id", None)
    return int(config.image_token_index if found is None else found)


def chat_template(folder: Path) -> str | None:
    """The chat template, wherever this checkpoint keeps it; None where it has none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = read_json(folder, "chat_template.json").get("chat_template") or read_json(folder, "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else None
