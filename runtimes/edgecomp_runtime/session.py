"""Image and prompt in, a stream of text out: the one generation loop that all backends share."""
from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from edgecomp_runtime import backends, memory
from edgecomp_runtime.backends import aligned_zeros, is_state
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import InputError
from edgecomp_runtime.rows import Rows, VisualTokens, lay_out
from edgecomp_runtime.sampling import Sampling, sampler
from edgecomp_runtime.text import Text

if TYPE_CHECKING:
    import PIL.Image

Picture = Union[str, "PathLike[str]", "PIL.Image.Image", NDArray[np.uint8]]
Messages = Sequence[dict[str, Any]]


@dataclass
class Statistics:
    """What one call took. Times in milliseconds; visual tokens are counted over all images of the call.

    first_token_ms runs from the call to its first token; per_token_ms is the mean over the tokens after it.
    """
    plan: str = ""
    backend: str = ""
    visual_tokens_in: int = 0
    visual_tokens_kept: int = 0
    prompt_rows: int = 0
    reused_rows: int = 0
    new_tokens: int = 0
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    per_token_ms: float = 0.0
    peak_memory_bytes: int = 0
    memory_meter: str = ""
    stopped_by: str = ""


@dataclass
class Generation(Iterator[str]):
    """A running answer: iterate for its pieces. `text` is what has come so far, `statistics` complete at the end."""
    _pieces: Iterator[str]
    statistics: Statistics
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    _cancelled: bool = False

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def cancel(self) -> None:
        """Ends the answer before its next token. May be called from another thread."""
        self._cancelled = True

    def finish(self) -> str:
        """Runs to the end and returns the whole text."""
        for _ in self:
            pass
        return self.text


class Session:
    """A bundle's plan, loaded and ready. Not for use by two threads at once.

    What was computed is reused: a later call whose conversation starts as the last one did prefills only its new rows,
    and an image seen in the last call is not run through the vision tower again.

    Args:
        bundle: an open bundle.
        plan: a budget of the bundle by name; its default where None.
        backend: 'auto', 'onnxruntime' or 'null'.
        threads: for one operator; None is one a core.

    Raises:
        UnknownNameError, EdgecompError: the plan or backend does not exist or its package is not installed.
    """

    def __init__(self, bundle: Bundle, *, plan: str | None = None, backend: str = "auto", threads: int | None = None):
        self.bundle, self._manifest = bundle, bundle.manifest
        self.plan_name, self.plan = bundle.plan(plan)
        self._backend = backends.backend(backend, threads)
        if self._backend.dialect not in self.plan.variants:
            raise InputError(f"plan {self.plan_name!r} has no graphs for {self._backend.name}: lower it with "
                             f"`edgecomp compress BUNDLE -o BUNDLE --dialect {self._backend.dialect}`")
        graphs = self.plan.variants[self._backend.dialect]
        template = bundle.manifest.text.chat_template
        self.text = Text(bundle.manifest.text, bundle.file(bundle.manifest.text.tokenizer),
                         bundle.file(template).read_text(encoding="utf-8") if template else None)
        self._embeddings = bundle.embeddings()
        rows = min(self.plan.cache_rows)
        self._state = {t.name: aligned_zeros((1, *(rows if s == "capacity" else int(s) for s in t.shape[1:])), t.dtype)
                       for t in graphs["prefill"].inputs if is_state(t.role)}
        self._decoder = self._backend.load(bundle.file(graphs["prefill"].file), graphs["prefill"], self._state)
        self._vision_graph = graphs["vision"]
        self._vision = self._backend.load(bundle.file(graphs["vision"].file), graphs["vision"], {})
        self._pixel_type = next(t.dtype for t in graphs["vision"].inputs if t.role == "pixels")
        self._capacity = rows
        self._cached: list[object] = []  # what each row of the KV cache was made from
        self._visual: dict[str, VisualTokens] = {}
        self._running: Statistics | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache's buffers."""
        return sum(array.nbytes for array in self._state.values())

    def generate(self, prompt: str | Messages, images: Sequence[Picture] = (), *, max_new_tokens: int = 256, temperature: float = 0.0,
                 top_p: float = 1.0, seed: int | None = None, stop: Sequence[str] = (), raw: bool = False) -> Generation:
        """Answers a prompt about images.

        Args:
            prompt: the question; or a conversation as Hugging Face's chat templates take it, a list of {role, content}.
            images: paths, PIL images or uint8 arrays [H, W, 3], one for each image place of the conversation, in order.
            max_new_tokens: the answer's length at most.
            temperature, top_p, seed: see `Sampling`; greedy by default.
            stop: texts that end the answer; they are not part of it.
            raw: take the prompt as it is, with the image token in it, instead of through the chat template.

        Returns:
            A `Generation`. Nothing has been computed when this returns; iterate it.

        Raises:
            InputError: an empty prompt, a picture that cannot be used, another number of pictures than of places for
                them, or a prompt longer than the window; before anything is computed.
        """
        from edgecomp_runtime import images as pictures
        began = time.perf_counter()
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; an answer has at least 1 token")
        sampling = Sampling(temperature, top_p, seed)
        ids = self.text.encode(self._prompt_text(prompt, len(images), raw))
        places = ids.count(self._manifest.text.image_id)
        if places != len(images):
            raise InputError(f"the prompt has {places} places for images and {len(images)} images were given: give one for each "
                             f"{self._manifest.text.image_token}")
        needed = len(ids) - places + places * self.plan.visual_tokens
        span = len(ids) - places + places * (self._manifest.vision.tokens if self.plan.position == "keep" else self.plan.visual_tokens)
        room = min(self._capacity - needed, self._manifest.decoder.context - span)
        if room < 1:
            raise InputError(f"the prompt takes {needed} rows ({places * self.plan.visual_tokens} of them visual tokens) and {span} positions; the window "
                             f"has {self._capacity} rows and {self._manifest.decoder.context} positions: shorten the prompt, or compile with a larger --context")
        pixels = [pictures.preprocess(pictures.load(image), self._manifest.image) for image in images]
        statistics = Statistics(self.plan_name, self._backend.name, len(images) * self._manifest.vision.tokens, len(images) * self.plan.visual_tokens,
                                needed, preprocess_ms=(time.perf_counter() - began) * 1e3)
        self._running = statistics
        generation = Generation(iter(()), statistics)
        generation._pieces = self._generate(generation, ids, pixels, began, min(max_new_tokens, room), sampling, tuple(stop))
        return generation

    def _prompt_text(self, prompt: str | Messages, images: int, raw: bool) -> str:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty: ask something")
            if raw:
                return prompt
            prompt = [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]}]
        elif raw:
            raise InputError("a raw prompt is a text, not a list of messages")
        return self.text.render(prompt)

    def _generate(self, generation: Generation, ids: list[int], pixels: list[NDArray[np.float32]], began: float, most: int,
                  sampling: Sampling, stop: tuple[str, ...]) -> Iterator[str]:
        statistics, choose = generation.statistics, sampler(sampling)
        rows = self._rows(ids, pixels, statistics)
        reused = min(_common(self._cached, rows.sources), len(rows.sources) - 1)
        statistics.reused_rows = reused
        at = time.perf_counter()
        logits = self._step(rows.embeddings[reused:], rows.positions[reused:], rows.sources[reused:], reused, statistics)
        statistics.prefill_ms = (time.perf_counter() - at) * 1e3
        stream, held, position = self.text.stream(), "", rows.next_position
        first = 0.0
        statistics.stopped_by = "length"
        while True:
            token = choose(logits)
            statistics.new_tokens += 1
            first = first or time.perf_counter()
            statistics.first_token_ms = (first - began) * 1e3
            if statistics.new_tokens > 1:
                statistics.per_token_ms = (time.perf_counter() - first) * 1e3 / (statistics.new_tokens - 1)
            statistics.peak_memory_bytes, statistics.memory_meter = memory.peak()
            if token in self._manifest.text.end_ids:
                statistics.stopped_by = "end"
                break
            generation.token_ids.append(token)
            ready, held, stopped = _release(held + stream.push(token), stop)
            if ready:
                yield ready
            if stopped or generation._cancelled or statistics.new_tokens == most:
                statistics.stopped_by = "stop" if stopped else "cancel" if generation._cancelled else "length"
                if stopped:
                    return
                break
            embedding = np.asarray(self._embeddings[token:token + 1])
            logits = self._step(embedding, np.array([position]), [token], len(self._cached), statistics)
            position += 1
        if rest := _release(held + stream.finish(), stop, last=True)[0]:
            yield rest

    def _rows(self, ids: list[int], pixels: list[NDArray[np.float32]], statistics: Statistics) -> Rows:
        """The prompt's rows; the vision tower runs on the pictures that the last call had not."""
        at = time.perf_counter()
        names = [hashlib.sha256(p).hexdigest() for p in pixels]
        new = {name: p for name, p in zip(names, pixels) if name not in self._visual}
        found = {name: self._visual[name] for name in names if name in self._visual}
        for name, picture in new.items():
            out = self._vision.run({"pixels": picture[None].astype(self._pixel_type)})
            kept = out["kept"][0] if "kept" in out else np.arange(self.plan.visual_tokens)
            found[name] = VisualTokens(name, out["visual_tokens"][0], kept)
        self._visual = found
        statistics.vision_ms = (time.perf_counter() - at) * 1e3 if new else 0.0
        return lay_out(ids, self._manifest.text.image_id, [found[n] for n in names], self._embeddings,
                       self._manifest.vision.tokens if self.plan.position == "keep" else None)

    def _step(self, embeddings: NDArray[Any], positions: NDArray[np.int64], sources: Sequence[object], length: int,
              statistics: Statistics) -> NDArray[Any]:
        """Runs new rows behind the first `length` of the cache; returns the last one's logits [vocabulary]."""
        if self._running is not statistics:
            raise InputError("a newer call of this session's generate took over; one session answers one call at a time")
        del self._cached[length:]
        out = self._decoder.run({"embeddings": embeddings[None], "positions": positions[None], "length": np.array([length], np.int64),
                                 "logit_rows": np.array([len(sources) - 1], np.int64)})
        self._cached.extend(sources)
        logits: NDArray[Any] = out["logits"][0, -1]
        return logits


def _common(cached: Sequence[object], wanted: Sequence[object]) -> int:
    """How many rows at the start are the same."""
    return next((n for n, (a, b) in enumerate(zip(cached, wanted)) if a != b), min(len(cached), len(wanted)))


def _release(text: str, stop: tuple[str, ...], last: bool = False) -> tuple[str, str, bool]:
    """Splits what can be shown from what might be the start of a stop text. Returns (ready, held, stopped)."""
    ends = [at for s in stop if s and (at := text.find(s)) >= 0]
    if ends:
        return text[:min(ends)], "", True
    held = 0 if last else max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[:len(text) - held], text[len(text) - held:], False
