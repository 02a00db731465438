"""A model's weights as its checkpoint stores them, read one at a time: nothing holds the whole model in another type."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from edgecomp_runtime.errors import EdgecompError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Weights:
    """Takes a model's parameters away and leaves empty ones of the wanted type, whose memory nobody touches.

    What was stored stays mapped from the checkpoint's files. A graph is traced with the empty parameters, and the content is
    converted tensor by tensor as it is written; a layer that has to compute is filled for as long.

    Args:
        model: as loaded, in the type that it is stored in; changed in place.
        precision: 'fp32' or 'fp16'.
        through: a precision that content is rounded to on its way.
    """

    def __init__(self, model: Any, precision: str, *, through: str | None = None):
        self.model, self.dtype, self.through = model, DTYPES[precision], DTYPES[through or precision]
        self._stored: dict[int, torch.Tensor] = {}
        self._instead: dict[int, Callable[[], np.ndarray[Any, Any]]] = {}
        self._names: dict[str, torch.nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        for parameter in self._names.values():
            if id(parameter) not in self._stored:
                self._stored[id(parameter)] = parameter.data
                parameter.data = torch.empty(parameter.shape, dtype=self.dtype if parameter.is_floating_point() else parameter.dtype)
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # for _renew_buffers
        _renew_buffers(model, self.dtype)

    def replace(self, name: str, content: Callable[[], np.ndarray[Any, Any]]) -> None:
        """Takes the content of a parameter from elsewhere from now on."""
        self._instead[id(self._names[name])] = content

    def array(self, name: str) -> np.ndarray[Any, Any] | None:
        """A parameter's content by its Hugging Face name; None where the name is not a parameter's.

        Raises:
            EdgecompError: a value is beyond the range of fp16.
        """
        parameter = self._names.get(name)
        if parameter is None:
            return None
        stored, found = self._stored[id(parameter)], self._content(parameter)
        if found.dtype == torch.float16 and stored.dtype != torch.float16 and not bool(found.isfinite().all()):
            raise EdgecompError(f"the weight {name} reaches {float(stored.abs().max()):.3g}, and fp16 ends at 65504: use --precision fp32")
        content: np.ndarray[Any, Any] = found.numpy()
        return content

    def fill(self, module: torch.nn.Module) -> None:
        """Gives a module's parameters their content."""
        for parameter in module.parameters():
            parameter.data = self._content(parameter)

    def empty(self, module: torch.nn.Module) -> None:
        """Takes it away again."""
        for parameter in module.parameters():
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)

    def fill_except(self, modules: Sequence[torch.nn.Module]) -> None:
        """Gives all parameters their content but those of some modules."""
        left_out = {id(parameter) for module in modules for parameter in module.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in left_out:
                parameter.data = self._content(parameter)

    def _content(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if instead := self._instead.get(id(parameter)):
            return torch.from_numpy(instead()).to(parameter.dtype)
        stored = self._stored[id(parameter)]
        return stored.to(self.through).to(parameter.dtype) if stored.is_floating_point() else stored


def _renew_buffers(model: Any, dtype: torch.dtype) -> None:
    """Buffers as a model of this type has them.

    Those that are computed, not stored, came out in the checkpoint's type: Gemma's embedding scale loses digits in bf16. HF's own
    initialisation makes them anew; it leaves tensors alone that are marked as initialised, which all parameters are.
    """
    for module in model.modules():
        computed = module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is not None and buffer.is_floating_point() and buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(module, name, buffer.to(dtype))
                computed = computed | {name}
        if computed & set(module._buffers):
            model._init_weights(module)
