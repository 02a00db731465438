"""What is asked of a model: its prompt, its window, its pictures."""
from __future__ import annotations

from dataclasses import dataclass

from edgecomp_runtime.errors import InputError


@dataclass(frozen=True)
class Request:
    """What is asked of a model. Rows are counted as they enter, the visual tokens of its pictures among them; `keep` of these go on."""
    prompt_tokens: int = 2048
    context: int = 2048
    visual_tokens: int = 0
    keep: int | None = None
    cut_layer: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("context", 1), ("batch", 1), ("visual_tokens", 0), ("cut_layer", 0)):
            if not least <= getattr(self, name) <= MOST:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: {least} to {MOST} can be")
        if self.keep is not None and not 0 < self.keep <= self.visual_tokens:
            raise InputError(f"--keep {self.keep} of {self.visual_tokens} visual tokens: choose 1 to {self.visual_tokens}" if self.visual_tokens
                             else f"--keep {self.keep} without --visual-tokens: say how many a picture has")
        if self.visual_tokens > self.prompt_tokens:
            raise InputError(f"--visual-tokens {self.visual_tokens} exceeds --prompt-tokens {self.prompt_tokens}, which counts them")
        if self.context < self.prompt_tokens:
            raise InputError(f"--context {self.context} is less than --prompt-tokens {self.prompt_tokens}: the window holds the prompt, too")

    @property
    def dropped(self) -> int:
        """Visual tokens that do not go on from the cut."""
        return self.visual_tokens - (self.visual_tokens if self.keep is None else self.keep)

    def rows(self, layer: int, context: int) -> int:
        """What is left of so many rows, the pictures' among them, at a decoder layer."""
        return context - (self.dropped if layer >= self.cut_layer else 0)


MOST = 10**8  # rows: a hundred times the longest window that is trained
