"""What layers over a screen share: keys of the registry, and none that reaches below."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from textual.binding import BindingType
from textual.screen import ModalScreen

from ..actions import bindings
from ..widgets.acts import Acts

Result = TypeVar("Result")


class Layer(Acts, ModalScreen[Result], inherit_bindings=False):
    """A layer with the actions of its `scope`; `layer` has Esc only, which gives None."""

    scope = "layer"
    BINDINGS: ClassVar[list[BindingType]] = list(bindings("layer"))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "scope" in cls.__dict__ and "BINDINGS" not in cls.__dict__:
            cls.BINDINGS = list(bindings(cls.scope))
        super().__init_subclass__(**kwargs)

    def action_leave(self) -> None:
        self.dismiss(None)
