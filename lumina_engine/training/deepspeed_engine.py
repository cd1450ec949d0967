"""The engine of DeepSpeed."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..checkpoint.universal import SavedState
from ..run.directory import open_lock
from .comm import Comm
from .deepspeed_experts import expert_groups, expert_handling
from .engine import (
    MOMENTS,
    Allows,
    StepResult,
    adamw,
    anything,
    bytes_of,
    load_named_state,
    named_state,
    norm_of,
    parameter_groups,
    saved_moments,
)
from .expert_parallel import SpreadExperts
from .loss_scale import LossScale
from .partitions import Piece, flat_pieces, split_pieces
from .precision import Precision
from .split_weights import gathered, scatter, split_weights
from .swap_folder import swap_folder
from .veto import Veto


class DeepSpeedEngine:
    """DeepSpeed with a client AdamW, stages 0 to 3."""

    def __init__(self, model: nn.Module, config: Any, comm: Comm, ds_config: dict[str, Any]) -> None:
        import deepspeed

        os.environ.setdefault("LOCAL_RANK", str(comm.local_rank))  # DeepSpeed reads it itself
        # This op serves inference only, and building it costs tens of seconds and needs a compiler at every start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        level = getattr(logging, str(config.deepspeed_log_level).upper())
        logging.getLogger("DeepSpeed").setLevel(level)
        deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=level <= logging.INFO)
        ds_config = _with_swap_folder(ds_config, config.nvme_path)
        self.comm = comm
        self.stage = int(ds_config.get("zero_optimization", {}).get("stage", 0))
        self.max_grad_norm = config.max_grad_norm
        offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
        self.swaps = offload == "nvme"
        precision = Precision.from_name(config.precision)
        self.scale = LossScale() if precision.scaled else None
        self.clips = self.stage in (1, 2) and self.scale is None and offload == "none"
        if self.clips:
            ds_config = _unclipped(ds_config)
        if self.stage == 3:
            split_weights(model, precision.weights, config.seed, comm, ds_config)
        else:
            model = model.to(device=comm.device, dtype=precision.weights)
        self.experts = SpreadExperts(model, comm)
        groups = expert_groups(parameter_groups(model, config.weight_decay), self.experts)
        inner = adamw(groups, config, torch.optim.AdamW)
        with expert_handling(model, self.experts):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=inner, config=ds_config, dist_init_required=False
            )
        self.masters = precision.weights != torch.float32  # else its partitions are equal copies of the weights
        self.shares = self.clips and not self.masters
        if self.shares:
            self._share_weights()
        # DeepSpeed counts micro steps inside the call that runs the optimizer, and where it clips knows the norm only there.
        # So every step passes through it, and one that must not be applied is stopped at the optimizer itself.
        self.veto = Veto(inner)
        if self.scale is not None:
            # With autocast to fp16 DeepSpeed 0.19 clips by the norm of the scaled gradient and scales back after that. So our
            # scale takes the place of its scaler, in the way that it offers to callers.
            holder, name = (self.optimizer, "gradscaler") if self.stage > 0 else (self.engine, "z0_gradscaler")
            setattr(holder, f"torch_autocast_{name}", None)
        self.module: nn.Module = self.engine.module
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.names = {p: n for n, p in self.module.named_parameters() if p.requires_grad}

    def _share_weights(self) -> None:
        """Have fp32 weights updated in place: DeepSpeed's masters of them are equal copies, copied back after each step."""
        zero = self.optimizer
        for group, partition in enumerate(zero.single_partition_of_fp32_groups):
            parts = zero.parallel_partitioned_bit16_groups[group]
            partition.data = parts[dist.get_rank(group=zero.real_dp_process_group[group])].data
        zero._link_all_hp_params()  # it keeps views of the partitions

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if self.scale is not None and self.stage > 0:
            self.optimizer.override_loss_scale(self.scale.value)
        elif self.scale is not None:
            loss = loss * self.scale.value
        # DeepSpeed averages over ranks, and would divide by the accumulation steps unless told not to
        self.engine.backward(loss * self.comm.world_size, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # it counts micro batches itself and updates nothing before the last

    def step(self, lr: float, allows: Allows = anything) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stage > 0 and not self.clips:
            return self._step_by_its_norm(allows)
        if self.stage == 0 and self.scale is not None:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale.value)
        norm = self._split_norm() if self.clips else self.experts.norm(*self.experts.split(self.parameters))
        grad_norm = float(norm)
        allowed = math.isfinite(grad_norm) and allows(grad_norm)
        if self.clips:
            divisor = (norm + 1e-6) / self.max_grad_norm if 0 < self.max_grad_norm < grad_norm else None
            self._base_optimizer().grad_scale = divisor  # type: ignore[attr-defined]
        elif allowed and self.experts.group is not None and self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.veto.refused = lambda: not allowed
        self.engine.step()
        return StepResult.of(grad_norm, self.scale, allowed)

    def _split_norm(self) -> torch.Tensor:
        """The 2-norm of all gradients at stages 1 and 2, where every value of them belongs to one rank."""
        mine = norm_of([part for parts in self.optimizer.averaged_gradients.values() for part in parts])
        return self.comm.sum(mine.double().square().to(self.comm.device)).sqrt().float()

    def _step_by_its_norm(self, allows: Allows) -> StepResult:
        """A step that DeepSpeed clips, by the norm that it takes in it."""
        answers: list[bool] = []  # one for all parameter groups of the step

        def refused() -> bool:
            if not answers:
                answers.append(allows(float(self.optimizer._global_grad_norm)))
            return not answers[0]

        self.veto.refused = refused
        self.engine.step()
        grad_norm = math.inf if self.optimizer.overflow else float(self.engine.get_global_grad_norm())
        return StepResult.of(grad_norm, self.scale, allowed=all(answers))

    def discard(self) -> None:
        """Forget the gradients gathered since the last step."""
        self.optimizer.zero_grad()

    def model_tensors(self) -> dict[str, torch.Tensor]:
        if self.stage == 3:
            return gathered(self.module, keep=self.comm.rank == 0)
        return self.experts.whole(self.module.state_dict())

    def load_model_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.stage == 3:
            scatter(self.module, tensors, self.comm.rank)
        else:
            self.module.load_state_dict(self.experts.own(tensors))

    def _partitions(self) -> list[torch.Tensor]:
        """The flat fp32 tensors that this rank's optimizer updates: one per parameter group, at stage 3 per sub-group."""
        zero = self.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if self.stage > 0 else self.optimizer

    def _on_disk(self, index: int) -> bool:
        """Whether a partition and its state lie on disk between steps."""
        return bool(self.swaps and self.optimizer._swappable_optimizer_subgroup(index))

    @contextmanager
    def _in_memory(self, index: int, changed: bool = False) -> Iterator[None]:
        """A partition and its optimizer state, read from disk if they lie there, and written back if `changed`."""
        zero = self.optimizer
        if self.stage < 3 or not zero._swappable_optimizer_subgroup(index):
            yield
            return
        zero._optimizer_states_and_gradient_swap_in(index)
        yield
        if changed:
            zero._writeback_swap_state(index, write_opt_state=True, write_gradients=False)
        else:
            zero._release_swap_buffers(index)

    def _pieces(self, index: int) -> list[Piece]:
        """Which parameters a partition is made of."""
        zero = self.optimizer
        if self.stage == 3:
            return list(split_pieces(zero.fp16_groups[index], self.names))
        return list(flat_pieces(zero.bit16_groups[index], self.names, self.experts.begins()))

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Optimizer state of this rank as plain tensors by name of parameter; above stage 0 its parts of the flat partitions.

        Masters are among them unless the weights are fp32 themselves. What lies on disk is copied into memory, all of it.
        """
        if self.stage == 0:
            return dict(named_state(self.optimizer, self.names))
        tensors: dict[str, torch.Tensor] = {}
        for index, partition in enumerate(self._partitions()):
            with self._in_memory(index):
                held = {f"optimizer.{key}": value for key, value in self._base_optimizer().state.get(partition, {}).items()}
                if self.masters:
                    held["master"] = partition.detach()
                on_disk = self._on_disk(index)
                for piece in self._pieces(index):
                    for kind, value in held.items():
                        mine = torch.as_tensor(value)
                        mine = piece.of(mine) if mine.ndim else mine
                        tensors[f"{kind}.{piece.name}"] = mine.clone() if on_disk else mine
        return tensors

    def state_bytes(self) -> int:
        if self.stage == 0:
            return bytes_of(self.state_tensors().values())
        state = self._base_optimizer().state
        held = [
            (*[partition] * (not self.shares), *filter(torch.is_tensor, state.get(partition, {}).values()))
            for index, partition in enumerate(self._partitions())
            if not self._on_disk(index)
        ]
        return bytes_of(tensor for tensors in held for tensor in tensors)

    def state_begins(self) -> dict[str, int]:
        if self.stage == 0:
            return self.experts.begins()
        pieces = (piece for index in range(len(self._partitions())) for piece in self._pieces(index))
        return {piece.name: piece.begin for piece in pieces if piece.begin}

    def load_state(self, saved: SavedState) -> None:
        if self.stage == 0:
            self._load_whole_state(saved)
            return
        for index, partition in enumerate(self._partitions()):
            with self._in_memory(index, changed=True):
                state = {key: torch.zeros_like(partition, requires_grad=False) for key in MOMENTS}
                for piece in self._pieces(index):
                    found = saved_moments(saved, piece.name, piece.begin, piece.count)
                    state["step"] = found["step"].to(
                        partition.device, torch.float32
                    )  # fused kernels of a GPU take none of the host
                    for key in MOMENTS:
                        piece.of(state[key]).copy_(found[key])
                    piece.of(partition.data).copy_(saved.master(piece.name, piece.begin, piece.count))
                if "step" in state:  # a partition of nothing but padding has no state
                    self._base_optimizer().state[partition] = state

    def _load_whole_state(self, saved: SavedState) -> None:
        begins = self.experts.begins()
        with torch.no_grad():
            for parameter, name in self.names.items():
                values = saved.part("master", name, begins.get(name, 0), parameter.numel())
                if values is not None:
                    parameter.copy_(values.reshape(parameter.shape))
        load_named_state(self.optimizer, self.names, begins, saved)


def _unclipped(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with no norm taken and nothing clipped by DeepSpeed.

    It takes the norm of copies in float64 and multiplies all gradients in each step, by 1 too. The fused optimizer divides by
    a factor as it reads them.
    """
    zero = ds_config["zero_optimization"] | {"compute_grad_norm": False}
    return ds_config | {"gradient_clipping": 0.0, "zero_optimization": zero}


def _with_swap_folder(ds_config: dict[str, Any], nvme_path: str) -> dict[str, Any]:
    """The configuration with this rank's own folder for what goes to disk, if anything does, and async_io ready to load.

    DeepSpeed compiles async_io when it is first used. A build that was killed leaves a lock behind, and every later run would
    wait for it; so ranks take turns under a lock that ends with its process, and what is left then is stale.
    """
    zero = ds_config["zero_optimization"]
    blocks = {name: zero[name] for name in ("offload_optimizer", "offload_param") if zero.get(name, {}).get("device") == "nvme"}
    if not blocks:
        return ds_config
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lumina" / "torch_extensions"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache))
    if shutil.which("ninja") is None:  # installed beside this interpreter, whose folder need not be on PATH
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    with os.fdopen(open_lock(cache / "lumina.lock"), "r+b") as turn:
        fcntl.lockf(turn, fcntl.LOCK_EX)
        for stale in cache.glob("*/lock"):
            stale.unlink(missing_ok=True)
        AsyncIOBuilder().load(verbose=False)
    folder = str(swap_folder(nvme_path))
    return ds_config | {"zero_optimization": zero | {name: block | {"nvme_path": folder} for name, block in blocks.items()}}
