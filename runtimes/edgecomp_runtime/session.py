"""Image and prompt in, a stream of text out: the one generation loop that all backends share."""
from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from edgecomp_runtime import backends, memory
from edgecomp_runtime.buffers import HostMemory, cache_regions, is_state
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.cuts import Cuts
from edgecomp_runtime.errors import InputError
from edgecomp_runtime.generation import Generation, Statistics, StopTexts
from edgecomp_runtime.limits import bucket, limits
from edgecomp_runtime.rows import Layout, Rows, VisualTokens, embedded, following, lay_out
from edgecomp_runtime.sampling import Sampling, sampler
from edgecomp_runtime.text import Text

if TYPE_CHECKING:
    import PIL.Image

Picture = Union[str, "PathLike[str]", "PIL.Image.Image", NDArray[np.uint8]]
Messages = Sequence[dict[str, Any]]


class Session:
    """A bundle's plan, loaded and ready. Not for use by two threads at once.

    What was computed is reused: a later call whose conversation starts as the last one did prefills only its new rows,
    and an image seen in the last call is not run through the vision tower again.

    Args:
        bundle: an open bundle.
        plan: a budget of the bundle by name; its default where None.
        backend: 'auto', 'onnxruntime' or 'null', or one that is made already.
        threads: for one operator; None is one a core.

    Raises:
        UnknownNameError, EdgecompError: the plan or backend does not exist or its package is not installed.
    """

    def __init__(self, bundle: Bundle, *, plan: str | None = None, backend: str | backends.Backend = "auto",
                 threads: int | None = None):
        self.bundle, self._manifest = bundle, bundle.manifest
        self.plan_name, self.plan = bundle.plan(plan)
        self._backend = backends.backend(backend, threads) if isinstance(backend, str) else backend
        files = self._backend.files(bundle, self.plan_name)
        graphs = {part: graph for part, (_, graph) in files.items()}
        template = bundle.manifest.text.chat_template
        self.text = Text(bundle.manifest.text, bundle.file(bundle.manifest.text.tokenizer), bundle.read_text(template) if template else None)
        self._embed = partial(embedded, np.asarray(bundle.embeddings()), self._manifest.embeddings.scale)
        self._layout = Layout.of(self._manifest.vision, self._manifest.decoder, self.plan)
        self._cuts = Cuts.of(self._manifest.vision, self._manifest.decoder, self.plan)
        here, cached = self._backend.memory(), [t for t in graphs["prefill"].inputs if is_state(t.role)]
        self._state = cache_regions(cached, self._cuts.starts(), self.plan.cache_rows, here)
        most = limits(self._manifest, self.plan, self._backend.prefill_rows, self._backend.logit_rows)
        self._decoder = self._backend.load(*files["prefill"], most, self._state, here)
        self._row_decoder = None  # of one row without pictures, where a dialect has a graph of its own for it
        if files["decode"][0] != files["prefill"][0]:
            self._row_decoder = self._backend.load(*files["decode"], most, self._state, here)
        self._vision = self._backend.load(*files["vision"], {"images": 1}, {}, here)
        self._on_host = isinstance(here, HostMemory)
        if self._on_host:  # the weights are in it, and what was read, packed and let go
            threading.Thread(target=memory.settle, daemon=True).start()  # takes tenths of a second
        self._places = [t for t in graphs["prefill"].inputs if t.role == "places"]
        self._pixel_type = next(t.dtype for t in graphs["vision"].inputs if t.role == "pixels")
        self._stacked = [t.key for t in graphs["prefill"].inputs if t.role == "deepstack"]
        self._cached: list[object] = []  # what each row of the first layer's KV cache was made from
        self._chunk = self._backend.prefill_rows
        self._pictures = 0  # whole ones in the cache
        self._survived: dict[int, NDArray[np.int64]] = {}  # by cut: the last prompt's pictures' tokens that went on [images, K]
        self._saved = {layer: np.zeros(0, np.int64) for layer in self._cuts.layers}  # positions that each whole picture in the cache gave up there
        self._visual: dict[str, VisualTokens] = {}
        self._running: Statistics | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache's buffers."""
        return sum(region.nbytes for region in self._state.values())

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
            A `Generation`. Pictures have been read when this returns, no graph has run; iterate it.

        Raises:
            InputError: an empty prompt, a picture that cannot be used, another number of pictures than of places for
                them, or a prompt longer than the window; before anything is computed.
        """
        began = time.perf_counter()
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; an answer has at least 1 token")
        sampling = Sampling(temperature, top_p, seed)
        ids, pixels = self._prepare(prompt, images, raw, 1)
        needed, room = self._room(ids)
        kept = self.plan.tokens_at(self._manifest.decoder.layers)
        statistics = Statistics(self.plan_name, self._backend.name, len(images) * self._manifest.vision.tokens, len(images) * kept, needed,
                                preprocess_ms=(time.perf_counter() - began) * 1e3)
        self._running = statistics
        generation = Generation(statistics)
        generation.pieces = self._generate(generation, ids, pixels, began, min(max_new_tokens, room), sampling, tuple(stop))
        return generation

    def score(self, prompt: str | Messages, images: Sequence[Picture], answer: Sequence[int], *, raw: bool = False) -> NDArray[Any]:
        """The logits [len(answer) + 1, vocabulary] that a given answer meets: row t is what follows its first t ids.

        For ranking choices, perplexity and verification. Raises InputError as `generate` does.
        """
        ids, pixels = self._prepare(prompt, images, raw, len(answer))
        statistics = self._running = Statistics()
        rows = self._rows(ids, pixels, statistics)
        length = self._reusable(rows)
        found = [self._step(rows.since(length), length, statistics).copy()]
        if answer:
            more = following(answer, self._embed(answer), rows.next_position, len(rows.positions))
            found.append(self._step(more, len(self._cached), statistics, len(answer)))
        return np.concatenate(found)

    def visual_tokens(self, image: Picture) -> VisualTokens:
        """A picture's visual tokens [K, D] and the raster places [K] they take, as the decoder gets them."""
        from edgecomp_runtime import images as pictures
        return self._see([pictures.preprocess(pictures.load(image), self._manifest.image, self._pixel_type)])[0]

    def kept(self, image: Picture, prompt: str = "") -> dict[str, NDArray[np.int64]]:
        """The places among the unpruned visual tokens that each step lets go on, by its site; steps inside the vision graph are one.

        `prompt` is the question, which cuts inside the decoder are run with. Raises InputError as `generate` does.
        """
        places = self.visual_tokens(image).kept
        vision = [step.site for step in self.plan.steps if not step.site.startswith("decoder")]
        found = {vision[-1] if vision else "projector": places}
        if self.plan.cuts:
            self.reset()
            self.score(prompt, [image], [])
            for cut in self.plan.cuts:
                places = places[self._survived[cut.layer][0]]
                found[f"decoder:{cut.layer}"] = places
        return found

    def reset(self) -> None:
        """Forgets the last call: the next one computes everything anew."""
        self._cached, self._visual, self._pictures = [], {}, 0

    def _prepare(self, prompt: str | Messages, images: Sequence[Picture], raw: bool, answer: int) -> tuple[list[int], list[NDArray[Any]]]:
        """The prompt's ids and the pictures' pixels, once both are known to fit with an answer of so many tokens."""
        from edgecomp_runtime import images as pictures
        info, vision = self._manifest.text, self._manifest.vision
        text = self._prompt_text(prompt, len(images), raw)
        places, ids = self.text.encode_prompt(text, vision.texts)
        if places != len(images):
            raise InputError(f"the prompt has {places} places for images and {len(images)} images were given: give one for each {info.placeholder}")
        if ids.count(info.image_id) != places * vision.runs:
            raise InputError(f"the prompt has {info.image_token} in it, which stands for visual tokens: put {info.placeholder} where a picture goes")
        if places > vision.max_images:
            raise InputError(f"{places} images are more than the {vision.max_images} that this bundle was compiled for: "
                             "compile with a larger --max-images")
        needed, room = self._room(ids)
        if room < answer:
            raise InputError(f"the prompt takes {needed} rows, {places * self.plan.visual_tokens} of them visual tokens, which leaves no room for an "
                             f"answer in the window of {max(self.plan.cache_rows)} rows and {self._manifest.decoder.context} positions: shorten it, "
                             "or compile with a larger --context")
        return ids, [pictures.preprocess(pictures.load(image), self._manifest.image, self._pixel_type) for image in images]

    def _room(self, ids: list[int]) -> tuple[int, int]:
        """Rows that the prompt takes, and tokens that fit behind it. Pruned places count as positions under 'keep'."""
        runs = ids.count(self._manifest.text.image_id)
        images, text = runs // len(self._layout.runs), len(ids) - runs
        by_layer = [rows - text - images * self.plan.tokens_at(layer) for layer, rows in enumerate(self.plan.cache_rows)]
        return text + images * self._layout.rows, min(*by_layer, self._manifest.decoder.context - text - images * self._layout.positions)

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

    def _generate(self, generation: Generation, ids: list[int], pixels: list[NDArray[Any]], began: float, most: int,
                  sampling: Sampling, stop: tuple[str, ...]) -> Iterator[str]:
        statistics, choose = generation.statistics, sampler(sampling)
        rows = self._rows(ids, pixels, statistics)
        reused = statistics.reused_rows = self._reusable(rows)
        at = time.perf_counter()
        logits = self._step(rows.since(reused), reused, statistics)
        token = choose(logits[-1])
        now = time.perf_counter()
        statistics.prefill_ms, statistics.first_token_ms = (now - at) * 1e3, (now - began) * 1e3
        stream, stops, position, decoding = self.text.stream(), StopTexts(stop), rows.next_position, 0.0
        while True:
            statistics.new_tokens += 1
            if token in self._manifest.text.end_ids:
                statistics.stopped_by = "end"
                break
            generation.token_ids.append(token)
            if ready := stops.push(stream.push(token)):
                yield ready
            if stops.met or generation.cancelled or statistics.new_tokens == most:
                statistics.stopped_by = "stop" if stops.met else "cancel" if generation.cancelled else "length"
                break
            at = time.perf_counter()
            row = following([token], self._embed([token]), position, len(rows.positions))
            logits = self._step(row, len(self._cached), statistics)
            token = choose(logits[-1])
            decoding += time.perf_counter() - at
            statistics.per_token_ms = decoding * 1e3 / statistics.new_tokens
            position = row.next_position
        statistics.peak_memory_bytes, statistics.memory_meter = memory.peak()
        if not stops.met and (rest := stops.finish(stream.finish())):
            yield rest

    def _rows(self, ids: list[int], pixels: list[NDArray[Any]], statistics: Statistics) -> Rows:
        """The prompt's rows, visual tokens included."""
        at = time.perf_counter()
        images = self._see(pixels)
        statistics.vision_ms = (time.perf_counter() - at) * 1e3
        return lay_out(ids, self._manifest.text.image_id, images, self._embed, self._layout)

    def _see(self, pixels: list[NDArray[Any]]) -> list[VisualTokens]:
        """Each picture's visual tokens. The vision tower runs only on those that the last call had not."""
        found, names = {}, [_name(picture) for picture in pixels]
        for name, picture in zip(names, pixels):
            if name not in found and name not in self._visual:
                out = self._vision.run({"pixels": picture[None]})
                kept = out["kept"][0].copy() if "kept" in out else np.arange(self.plan.visual_tokens)
                deepstack = np.stack([out[key][0] for key in self._stacked]) if self._stacked else None
                self._visual[name] = VisualTokens(name, out["visual_tokens"][0].copy(), kept, deepstack)
            found[name] = self._visual[name]
        self._visual = found
        return [found[name] for name in names]

    def _reusable(self, rows: Rows) -> int:
        """How many rows at the start of the cache are the prompt's own; the last row is computed anew, for its logits."""
        same = next((n for n, (a, b) in enumerate(zip(self._cached, rows.sources)) if a != b), min(len(self._cached), len(rows.sources)))
        same = min(same, len(rows.sources) - 1)
        while 0 < same < len(rows.segments) and rows.segments[same] and rows.segments[same - 1] == rows.segments[same]:
            same -= 1  # rows that see each other both ways come together
        if self.plan.cuts:
            if self.plan.needs_prompt and rows.runs.any():
                return 0  # what was kept of the pictures depends on the question
            while np.count_nonzero(rows.runs[:same]) % self._layout.rows:
                same -= 1  # a picture is cut as a whole
        return same

    def _step(self, rows: Rows, length: int, statistics: Statistics, logit_rows: int = 1) -> NDArray[Any]:
        """Runs new rows behind the first `length` of the cache; returns the logits [logit_rows, vocabulary] of the last ones, until the next step."""
        if self._running is not statistics:
            raise InputError("a newer call of this session's generate took over; one session answers one call at a time")
        if length < len(self._cached):
            del self._cached[length:]
            self._pictures = sum(isinstance(source, tuple) for source in self._cached) // self._layout.rows
        count, start, found = len(rows.sources), 0, []
        first = count - logit_rows  # the first row whose logits are asked for
        while start < count:
            end = self._end(rows, start, first)
            lengths = [len(self._cached), *self._cuts.lengths(len(self._cached), self._pictures)]
            moved = [int(self._saved[layer][:self._pictures].sum()) for layer in self._cuts.layers]
            cut, behind = self._cuts.feeds(rows.runs[start:end], lengths[1:], moved)
            gone = end - behind[-1]  # of the rows up to here, those that the last layer does not compute now
            wanted = np.arange(max(first, start) - gone, max(first, end) - gone)
            pictures = bool(rows.runs[start:end].any())
            runs = self._row_decoder if self._row_decoder and end - start == 1 and not pictures else self._decoder
            asked = np.zeros(1, np.int64) if self._row_decoder and not len(wanted) else wanted  # engines give one row's at least
            out = runs.run({**rows.feeds(start, end, lengths[0], asked, len(self._stacked)), **cut, **self._cache_ends(lengths, behind),
                            **self._looked_at(lengths, behind)})
            logits = out["logits"][0][:len(wanted)]
            found.append(logits if end == count else logits.copy())
            if pictures:
                self._survived = {layer: out[f"kept.{layer}"].copy() for layer in self._cuts.layers}
                if self._cuts.compact == "graph":
                    self._saved = {layer: np.append(saved[:self._pictures], out[f"saved.{layer}"]) for layer, saved in self._saved.items()}
                self._pictures += int(np.count_nonzero(rows.runs[start:end])) // self._layout.rows
            self._cached.extend(rows.sources[start:end])
            start = end
        return np.concatenate(found) if len(found) > 1 else found[0]

    def _end(self, rows: Rows, start: int, first: int) -> int:
        """Behind the last of the rows that are taken at a time, from `start` on; logits are asked for from `first` on."""
        count = len(rows.sources)
        if self.plan.cuts and rows.runs.any():
            return count  # a decoder takes a prompt in parts, but pictures that it cuts with all that stands around them
        if self._row_decoder and self.plan.cuts:
            return start + 1  # the graph for several rows cuts, and there is no picture
        end = min(start + self._chunk, count, max(start, first) + self._backend.logit_rows)
        while end < count and rows.segments[end] and rows.segments[end - 1] == rows.segments[end]:
            end += 1
        return end

    def _cache_ends(self, lengths: Sequence[int], behind: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Where the new rows end in each cache, and for how many in all attention is planned: on a GPU for one new row all that the cache has
        room for, so that the work is the same from one token to the next and a CUDA graph of it can be run again."""
        found: dict[str, NDArray[Any]] = {}
        for layer, length, rows in zip(("", *(f".{layer}" for layer in self._cuts.layers)), lengths, behind):
            end, capacity = length + rows, self.plan.cache_rows[int(layer[1:] or 0)]
            found["last_row" + layer], found["row_numbers" + layer] = np.array([end - 1], np.int32), np.arange(rows)[None]
            found["total_rows" + layer] = np.array(capacity if rows == 1 and not self._on_host else end, np.int32)
        return found

    def _looked_at(self, lengths: Sequence[int], behind: Sequence[int]) -> dict[str, NDArray[np.int64]]:
        """The rows of each cache that a dialect with buckets looks at."""
        found = {}
        for tensor in self._places:
            at = 0 if tensor.layer is None else self._cuts.layers.index(tensor.layer) + 1
            found[tensor.key] = np.arange(bucket(lengths[at] + behind[at], self.plan.cache_rows[tensor.layer or 0]))
        return found


def _name(pixels: NDArray[Any]) -> str:
    """A picture's identity: equal pixels are the same picture."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()
