"""Prompts, ids and streamed text against transformers, on the checkpoint of `examples/`; and templates that must not run."""
from __future__ import annotations

import json
import os
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from edgecomp_runtime.errors import BundleError, InputError
from edgecomp_runtime.manifest import TextInfo
from edgecomp_runtime.text import Text

CHECKPOINT = Path(__file__).parents[2] / "examples" / "scenes-llava"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
INFO = TextInfo("tokenizer.json", "chat_template.jinja", SPECIAL, (2,), "<image>", 3, "<image>")

IMAGE = {"type": "image"}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


CONVERSATIONS = {
    "one turn": [{"role": "user", "content": [IMAGE, said("What is in the picture?")]}],
    "the picture last": [{"role": "user", "content": [said("What is in the picture?"), IMAGE]}],
    "several turns": [
        {"role": "user", "content": [IMAGE, said("How many circles are there?")]},
        {"role": "assistant", "content": [said("three")]},
        {"role": "user", "content": [said("And which colour?")]},
    ],
    "two pictures": [{"role": "user", "content": [IMAGE, said("Compare: "), IMAGE, said("which is brighter?")]}],
    "text alone": [{"role": "user", "content": "Hello, wörld! 你好 🙂"}],
    "text in a list": [{"role": "user", "content": [said("  spaces\n\nand lines  ")]}],
    "marks in the text": [{"role": "user", "content": [said("a <b> & \"c\" </s> {{ x }} {% y %}")]}],
}


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(INFO, CHECKPOINT / "tokenizer.json", (CHECKPOINT / "chat_template.jinja").read_text())


def with_template(template: str, special: dict[str, str] | None = None) -> Text:
    info = TextInfo("tokenizer.json", None, SPECIAL if special is None else special, (2,), "<image>", 3, "<image>")
    return Text(info, CHECKPOINT / "tokenizer.json", template)


def reference(template: str, messages: list[dict[str, Any]]) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **SPECIAL)
    return str(rendered[0])


def image_runs_as_one(ids: list[int]) -> list[int]:
    """transformers repeats the placeholder for every visual token: each run becomes one id a picture again."""
    return [token for token, run in groupby(ids) for _ in range(1 if token == INFO.image_id else len(list(run)))]


# Prompts

@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_is_that_of_transformers(text: Text, processor: Any, name: str) -> None:
    messages = CONVERSATIONS[name]
    assert text.render(messages) == processor.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_transformers(text: Text, processor: Any, name: str) -> None:
    messages = CONVERSATIONS[name]
    picture = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    shown = [{**m, "content": [{**c, "image": picture} if c == IMAGE else c for c in m["content"]]}
             if isinstance(m["content"], list) else m for m in messages]
    expected = processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"][0]
    ids = text.encode(text.render(messages))
    assert ids == image_runs_as_one(expected)
    assert ids.count(INFO.image_id) == sum(c == IMAGE for m in messages for c in m["content"])


TEMPLATES = {
    "blocks are trimmed": "{% for m in messages %}\n    {% if true %}\n  {{ m.role }}\n    {% endif %}\n{% endfor %}\nend\n",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json as it is": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'b': '<&>é', 'a': 1} | tojson(sort_keys=1)}}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}",
    "generation prompt": "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "generation blocks": "{% set a = 1 %}{% generation %}{{ messages[0].content }}{% set a = 2 %}{% endgeneration %}{{ a }}",
    "no tools, no documents": "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}-",
    "namespaces": "{% set n = namespace(x=1, self=2) %}{% for m in messages %}{% set n.x = n.x + n.self %}{% endfor %}{{ n.x }}",
    "dicts": "{{ dict(a=1, b='<') | tojson }}",
    "undefined names": "[{{ nobody }}]{% if nobody is defined %}x{% endif %}",
    "macros and slices": "{% macro q(m) %}{{ m.role | upper }}{% endmacro %}{% for m in messages[::-1] %}{{ q(m) }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str) -> None:
    messages = [{"role": "user", "content": "<a & é>"}, {"role": "assistant", "content": "b"}]
    assert with_template(TEMPLATES[name]).render(messages) == reference(TEMPLATES[name], messages)


def test_the_date_is_that_of_today() -> None:
    template = "{{ strftime_now('%Y %B') }}"
    assert with_template(template).render([]) == reference(template, [])


def test_objects_among_the_messages_stay_out_of_reach(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    target = tmp_path / "written.png"
    with pytest.raises(BundleError, match="the chat template fails"):
        with_template("{{ messages[0].content[0].image.save('" + str(target) + "') }}").render(messages)
    assert not target.exists()
    shown = "{{ messages[0].content[0].image }}"
    assert with_template(shown).render(messages) == reference(shown, messages) == "<Image>"


def test_the_callers_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    with pytest.raises(BundleError, match="'append' of 'list' object is unsafe"):
        with_template("{{ messages[0].content.append(1) }}").render(messages)
    assert json.dumps(messages) == before


# Templates and messages that cannot be used

@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ self._TemplateReference__context.environment.globals }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('' | attr('__class__')).mro() }}",
    "{{ namespace(__class__=1) }}",
    "{% set n = namespace() %}{% set n.__html__ = messages.copy %}{{ n }}",
])
def test_a_template_that_reaches_for_internals_is_refused(template: str) -> None:
    with pytest.raises(BundleError, match=r"the chat template fails .*(is unsafe|is no name for a namespace)") as caught:
        with_template(template).render([])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("template", "reason"), [
    ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "Range too big"),
    ("{{ range(999999999) | list }}", "Range too big"),
    ("{{ messages.nobody.content }}", "has no attribute 'nobody'"),
    ("{{ nobody() }}", "'nobody' is undefined"),
    ("{{ messages[7].content }}", "has no element 7"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages + 1 }}", "can only concatenate list"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{% include 'other' %}", "no loader"),
])
def test_a_template_that_fails_is_the_bundles_fault(template: str, reason: str) -> None:
    with pytest.raises(BundleError, match=reason) as caught:
        with_template(template).render([])
    assert str(caught.value).startswith("the chat template fails (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("template", "reason"), [
    ("ok\n{% if %}", "in line 2"),
    ("{% for m in messages %}", "in line 1"),
    ("{{ messages | nofilter }}", "No filter named 'nofilter'"),
    ("{% nosuchtag %}", "nosuchtag"),
    ("{% generation %}", "in line 1"),
])
def test_a_template_with_an_error_is_refused_at_once(template: str, reason: str) -> None:
    with pytest.raises(BundleError, match=reason) as caught:
        with_template(template)
    assert "\n" not in str(caught.value)


def test_a_template_can_refuse_the_messages() -> None:
    with pytest.raises(InputError, match="the chat template refuses the messages: roles must alternate"):
        with_template("{{ raise_exception('roles must alternate') }}").render([])


def test_without_a_template_the_way_out_is_a_raw_prompt() -> None:
    text = Text(INFO, CHECKPOINT / "tokenizer.json", None)
    with pytest.raises(InputError, match=r"no chat template: pass the prompt raw \(--raw\)"):
        text.render([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("messages", [["Hello"], [{"role": "user"}], [{"content": "Hello"}]])
def test_messages_of_another_form_are_refused(text: Text, messages: Any) -> None:
    with pytest.raises(InputError, match="messages are a list of"):
        text.render(messages)


def test_messages_that_hold_themselves_are_refused(text: Text) -> None:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = [message]
    with pytest.raises(InputError, match="the messages are no plain data"):
        text.render([message])


# Ids

@pytest.mark.parametrize("prompt", ["", "Hello", "<s>Hello", "Hello <s>", "<image>\n<image>", "你好 🙂 é", " 12 345\t\n"])
def test_raw_prompts_encode_as_in_transformers(text: Text, tokenizer: Any, prompt: str) -> None:
    assert text.encode(prompt) == tokenizer(prompt)["input_ids"]


def altered(tmp_path: Path, **fields: Any) -> Path:
    """The checkpoint's tokenizer with other settings."""
    data = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**data, **fields}))
    return path


@pytest.mark.parametrize("prompt", ["Hello", "<s>Hello", "Hello <s>"])
def test_the_tokenizers_start_token_is_added_once(tmp_path: Path, prompt: str) -> None:
    start = {"type": "TemplateProcessing", "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
             "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    path = altered(tmp_path, post_processor=start)
    hf = PreTrainedTokenizerFast(tokenizer_file=str(path), **SPECIAL)
    expected = hf(prompt, add_special_tokens=not prompt.startswith(hf.bos_token))["input_ids"]
    assert expected.count(1) == (2 if prompt == "Hello <s>" else 1)
    assert Text(INFO, path, None).encode(prompt) == expected


def test_truncation_and_padding_of_training_are_off(tmp_path: Path, text: Text) -> None:
    path = altered(tmp_path, truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
                   padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "<pad>"})
    hf = PreTrainedTokenizerFast(tokenizer_file=str(path), **SPECIAL)
    prompt = "What is in the picture, and where?"
    assert Text(INFO, path, None).encode(prompt) == hf(prompt)["input_ids"] == text.encode(prompt)


@given(st.lists(st.integers(0, 420), max_size=40))
def test_decoding_is_that_of_transformers(text: Text, tokenizer: Any, ids: list[int]) -> None:
    assert text.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("broken", [os.fsdecode(b"caf\xe9"), "\ud83d"])
def test_a_prompt_that_is_not_unicode_is_refused(text: Text, broken: str) -> None:
    with pytest.raises(InputError, match="is not valid Unicode: write it in UTF-8"):
        text.encode(broken)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json", b"\xff\xfe"])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"the tokenizer tokenizer\.json cannot be read \(.+\): compile the bundle again"):
        Text(INFO, path, None)


@pytest.mark.parametrize(("token", "number", "found"), [("<image>", 4, "3"), ("<picture>", 3, "None")])
def test_another_image_token_than_the_manifests_is_refused(token: str, number: int, found: str) -> None:
    info = TextInfo("tokenizer.json", None, SPECIAL, (2,), token, number, token)
    with pytest.raises(BundleError, match=f"has {token!r} as {found}, the manifest as {number}"):
        Text(info, CHECKPOINT / "tokenizer.json", None)


# Streams

def streamed(text: Text, ids: list[int]) -> tuple[list[str], str]:
    stream = text.stream()
    return [stream.push(token) for token in ids], stream.finish()


SCRIPTS = st.text(st.sampled_from("a b\n. é中文漢字🙂👩‍👩‍👧‍👦ﷺ\u0301\ufffd\u200d"), max_size=20)


@given(SCRIPTS)
def test_a_stream_gives_the_text(text: Text, written: str) -> None:
    ids = text.encode(written)
    pieces, rest = streamed(text, ids)
    assert "".join(pieces) + rest == written
    if not written.endswith("\ufffd"):
        assert rest == ""


@given(st.lists(st.integers(0, 420), max_size=40))
@example([0xE4 + 7, 3, 0xB8 + 7])
def test_a_stream_of_any_ids_gives_what_transformers_decodes(text: Text, tokenizer: Any, ids: list[int]) -> None:
    pieces, rest = streamed(text, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=True)


@given(SCRIPTS, st.integers(0, 60))
def test_a_stream_cut_short_gives_what_transformers_decodes(text: Text, tokenizer: Any, written: str, cut: int) -> None:
    ids = text.encode(written)[:cut]
    pieces, rest = streamed(text, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stream_does_not_wait_without_need(text: Text) -> None:
    ids = text.encode("top 你")
    pieces, rest = streamed(text, ids)
    whole = [n for n in range(1, len(ids) + 1) if not text.decode(ids[:n]).endswith("\ufffd")]
    for n in whole:
        assert "".join(pieces[:n]) == text.decode(ids[:n])
    assert len(whole) == len(ids) - 2  # of the three bytes of the last character, two are waited for
    assert rest == ""


def test_finishing_an_empty_stream_gives_nothing(text: Text) -> None:
    assert text.stream().finish() == ""


WORDS = ["<unk>", "<s>", "</s>", "<image>", *(f"<0x{b:02X}>" for b in range(256)),
         "▁", "▁Hello", "▁world", "a", "▁▁", "中", "\ufffd", "."]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Text, Any]:
    """A tokenizer like Llama's: bytes are tokens of their own, and the first space is no space."""
    made = Tokenizer(models.BPE({w: n for n, w in enumerate(WORDS)}, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>", "</s>", "<image>"])
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.json"
    made.save(str(path))
    return Text(INFO, path, None), PreTrainedTokenizerFast(tokenizer_file=str(path), **SPECIAL)


BYTES = st.integers(4, 259)
SENTENCEPIECE_IDS = st.lists(st.one_of(BYTES, st.integers(260, len(WORDS) - 1), st.integers(0, len(WORDS) + 3),
                                       st.sampled_from([4 + b for b in "中é🙂".encode()])), max_size=30)


@settings(max_examples=500)
@given(SENTENCEPIECE_IDS)
@example([4 + 0x67, 4 + 0xFF, 261])  # "g" until the next byte is wrong: then both are U+FFFD
@example([4 + 0x67, 2, 4 + 0xFF, 261])
@example([260, 260, 261])
def test_a_stream_of_byte_tokens_gives_what_transformers_decodes(sentencepiece: tuple[Text, Any], ids: list[int]) -> None:
    text, hf = sentencepiece
    pieces, rest = streamed(text, ids)
    assert "".join(pieces) + rest == text.decode(ids) == hf.decode(ids, skip_special_tokens=True)
