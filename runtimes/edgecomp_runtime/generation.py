"""An answer on its way: the stream of its text, what it took, and what ends it."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """What one call took. Times in milliseconds; visual tokens are counted over all images of the call.

    first_token_ms runs from the call to its first token; per_token_ms is the mean over the steps after it, without the time
    that the caller took between them.
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
    statistics: Statistics
    pieces: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cancelled: bool = False

    def __next__(self) -> str:
        piece = next(self.pieces)
        self.text += piece
        return piece

    def cancel(self) -> None:
        """Ends the answer before its next token. May be called from another thread."""
        self.cancelled = True

    def finish(self) -> str:
        """Runs to the end and returns the whole text."""
        for _ in self:
            pass
        return self.text


class StopTexts:
    """Holds back what might be the start of a stop text until that is decided."""

    def __init__(self, texts: Sequence[str]):
        self._texts, self._held, self.met = [t for t in texts if t], "", False

    def push(self, piece: str) -> str:
        """Takes the next piece of text; returns what can be shown. After a stop text `met` is true and nothing follows."""
        text = self._held + piece
        if ends := [at for t in self._texts if (at := text.find(t)) >= 0]:
            self.met, self._held = True, ""
            return text[:min(ends)]
        keep = max((n for t in self._texts for n in range(1, len(t)) if text.endswith(t[:n])), default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]

    def finish(self, piece: str) -> str:
        """The last piece and whatever was held back; nothing follows."""
        text = self.push(piece) + self._held
        self._held = ""
        return text
