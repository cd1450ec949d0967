"""A committed model on real rows of its own run: its loss, and where its routers send each token.

Shapes: B batch, S sequence, K experts per token, N tokens of all rows (without padding), L expert layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .files import CheckpointError
from .loading import build_model

if TYPE_CHECKING:
    from ..config.schema import Config
    from ..data.batch import Batch
    from ..model.transformer import DeepSeekTransformer

ROWS = 64  # unless told otherwise


@dataclass(frozen=True)
class ProbeRows:
    """Rows of a run, by task (no name without tasks). `held_out`: of the data that evaluation reads, not of training."""

    batches: Mapping[str, Sequence[Batch]]
    held_out: bool

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(int((batch.document_ids_BS > 0).any(-1).sum()) for found in self.batches.values() for batch in found)


def probe_rows(config: Config, rows: int = ROWS) -> ProbeRows:
    """The first rows that an evaluation of this run reads, or of training where nothing is held out; always the same ones.

    Raises:
        DataError: the data are not where they were. TokenizerError: nor is the tokenizer.
    """
    from ..data.batch import EvalLoader
    from ..data.mixed import stores_of
    from ..data.store import open_data
    from ..data.tokenizer import ConversationTokenizer

    data = open_data(config, ConversationTokenizer(config.tokenizer))
    stores = stores_of(data.train if data.eval is None else data.eval)
    each = max(1, rows // len(stores))
    one = config.model_copy(update={"batch_size": 1, "num_workers": 0})
    found = {name: list(EvalLoader(store, one, micro_batch=min(8, each), max_batches=each)) for name, store in stores.items()}
    return ProbeRows(found, data.eval is not None)


def probe_loss(
    shape: Mapping[str, Any], weights: Mapping[str, torch.Tensor], rows: ProbeRows, tick: Callable[[], object] = lambda: None
) -> float:
    """The loss in nats per trained token of a model given by shape and weights.

    Args:
        tick: called before each batch.

    Raises:
        CheckpointError: no token of the rows carries loss.
    """
    model = build_model(dict(shape), dict(weights)).eval()
    loss = count = 0.0
    with torch.no_grad():
        for batch in (batch for found in rows.batches.values() for batch in found):
            tick()
            out = model(batch.input_ids_BS, labels=batch.labels_BS, **_places(batch), return_aux=True)
            loss, count = loss + float(out.loss_sum), count + batch.num_labels
    if not count:
        raise CheckpointError("no token of the run's own rows carries loss, so nothing can be measured on them")
    return loss / count


def _places(batch: Batch) -> dict[str, Any]:
    return {"document_ids": batch.document_ids_BS, "position_ids": batch.position_ids_BS, "layout": batch.layout}


@dataclass(frozen=True)
class Routes:
    """Where every token of some rows went. `task_N` counts in `tasks`; `layers` are numbers of all blocks, from 0."""

    layers: list[int]
    experts: int
    experts_LNK: np.ndarray
    token_N: np.ndarray
    position_N: np.ndarray  # in the document, from 0
    task_N: np.ndarray
    tasks: list[str]


def routes_of(model: DeepSeekTransformer, rows: ProbeRows) -> Routes:
    """The routers' own choices in evaluation; padding is left out."""
    model.eval()
    parts: list[tuple[np.ndarray, ...]] = []
    tasks = list(rows.batches)
    with torch.no_grad():
        for number, name in enumerate(tasks):
            for batch in rows.batches[name]:
                taken: list[Any] = []
                model(batch.input_ids_BS, **_places(replace(batch, known=None)), logits_to_keep=1, routes=taken)
                real_BS = batch.document_ids_BS > 0
                chosen = torch.stack([route.experts_BSK[real_BS] for route in taken])
                place = np.full(int(real_BS.sum()), number)
                parts.append(
                    (chosen.numpy(), batch.input_ids_BS[real_BS].numpy(), batch.position_ids_BS[real_BS].numpy(), place)
                )
    experts, token, position, task = zip(*parts, strict=True)
    return Routes(
        model.expert_layer_numbers,
        model.config.num_experts,
        np.concatenate(experts, axis=1),
        np.concatenate(token),
        np.concatenate(position),
        np.concatenate(task),
        tasks,
    )
