"""Messages into token ids and back: the chat template in jinja2's sandbox, the tokenizer, and text as it streams in."""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from edgecomp_runtime.errors import BundleError, EdgecompError, InputError
from edgecomp_runtime.manifest import TextInfo

BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")

Message = Mapping[str, Any]  # {"role": ..., "content": text, or a list of {"type": "image"} and {"type": "text", "text": ...}}


class Text:
    """The text side of a bundle.

    The template comes with the bundle and is not trusted: it runs in jinja2's sandbox, which keeps it from Python's internals
    and from ranges above 100,000. It can still be slow: neither its time nor its memory is limited.
    """

    def __init__(self, info: TextInfo, tokenizer_path: Path, template: str | None):
        """Reads the tokenizer and compiles the template.

        Args:
            info: the manifest's part on text.
            tokenizer_path: a `tokenizer.json`.
            template: the chat template itself, None where the checkpoint has none.

        Raises:
            BundleError: the tokenizer cannot be read or has another image token than the manifest; the template has an error.
        """
        self.info = info
        self._tokenizer = _read_tokenizer(tokenizer_path, info)
        self._template = None if template is None else _compile(template)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that the chat template makes of messages in Hugging Face's form, up to where the answer starts.

        Raises:
            InputError: there is no template, the messages have another form, or the template refuses them.
            BundleError: the template fails, reaches for Python's internals or asks for an endless range.
        """
        if self._template is None:
            raise InputError("the checkpoint has no chat template: pass the prompt raw (--raw), written as the model expects it")
        if not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
            raise InputError(f"messages are a list of {{'role': ..., 'content': ...}}, not {messages!r:.100}")
        # Names that Hugging Face defines too: templates ask `tools is not none`, which an undefined name would answer with yes.
        names = {"tools": None, "documents": None, **self.info.special_tokens,
                 "messages": _plain(messages), "add_generation_prompt": True}
        try:
            return self._template.render(names)
        except EdgecompError:
            raise
        except Exception as error:  # a template is code and can raise anything
            raise BundleError(f"the chat template fails ({_reason(error)}): use a bundle with a sound one, "
                              "or pass the prompt with --raw") from None

    def encode(self, text: str) -> list[int]:
        """The ids of a text. The tokenizer adds its special tokens, unless the text (a rendered template) starts with the first.

        Each image placeholder is one id, `info.image_id`. Raises InputError where the text is not valid Unicode.
        """
        start = self.info.special_tokens.get("bos_token")
        try:
            return self._tokenizer.encode(text, add_special_tokens=start is None or not text.startswith(start)).ids
        except (TypeError, UnicodeError):  # lone surrogates, which Python makes of bytes that are not UTF-8
            raise InputError(f"the prompt {text!r:.60} is not valid Unicode: write it in UTF-8") from None

    def encode_prompt(self, text: str, around: Sequence[str]) -> tuple[int, list[int]]:
        """How many places for pictures a prompt has, and its ids, one image id for each run of a picture's visual tokens.

        Args:
            text: with a placeholder a picture.
            around: the texts around a picture's runs, `VisionInfo.texts`.
        """
        return text.count(self.info.placeholder), self.encode(text.replace(self.info.placeholder, self.info.image_token.join(around)))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A new `TextStream`, for one answer."""
        return TextStream(self._tokenizer)


class TextStream:
    """Text of an answer as its ids come in. All pieces together are what `Text.decode` gives for all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {n for n, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._bytes: list[int] = []  # a run of byte tokens, which means one thing or another as it goes on
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that one more id makes certain; empty in the middle of a character."""
        self._ids.append(token)
        name = self._tokenizer.id_to_token(token)
        if token in self._special or name is None:
            return ""
        # SentencePiece decodes a run of byte tokens as a whole, each byte to U+FFFD if any is wrong: wait for its end,
        # or DecodeStream gives text that it would have to take back (and then raises).
        self._bytes.append(token)
        if BYTE_TOKEN.fullmatch(name):
            return ""
        piece = self._stream.step(self._tokenizer, self._bytes) or ""
        self._bytes = []
        self._shown += piece
        return piece

    def finish(self) -> str:
        """The rest: what an unfinished character, now U+FFFD, held back."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(self._shown):]


def _read_tokenizer(path: Path, info: TextInfo) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise BundleError(f"the tokenizer {path.name} cannot be read ({_reason(error)}): compile the bundle again") from None
    if (found := tokenizer.token_to_id(info.image_token)) != info.image_id:
        raise BundleError(f"the tokenizer {path.name} has {info.image_token!r} as {found}, the manifest as {info.image_id}: "
                          "compile the bundle again")
    tokenizer.no_truncation()  # some files keep their training's settings; Hugging Face resets them at every call
    tokenizer.no_padding()
    return tokenizer


def _plain(messages: Sequence[Message]) -> Any:
    """A copy of JSON types alone: a picture among the messages has methods that write files, which no sandbox knows of."""
    try:
        return json.loads(json.dumps(list(messages), default=lambda value: f"<{type(value).__name__}>"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the messages are no plain data ({_reason(error)}): make them of text, lists and dicts") from None


def _compile(template: str) -> jinja2.Template:
    """The template with what Hugging Face's `render_jinja_template` offers to it."""
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=[_Generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals.update(raise_exception=_refuse, strftime_now=_now, dict=_dict, namespace=_Namespace)
    try:
        return sandbox.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise BundleError(f"the chat template has an error in line {error.lineno} ({_reason(error)}): "
                          "mend it in the checkpoint and compile again") from None
    except Exception as error:  # constant expressions run while compiling
        raise BundleError(f"the chat template cannot be compiled ({_reason(error)}): use a bundle with a sound one") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an answer for training; here it is only its content."""
    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()`, without the names that Python itself asks objects for."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`, so that it can be a name in the namespace
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} is no name for a namespace")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise InputError(f"the chat template refuses the messages: {message}")


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
