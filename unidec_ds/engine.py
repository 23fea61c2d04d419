"""The DeepSpeed engine behind a small class; every third-party quirk of launching lives here.

`start_engine` turns a process under `python`, `deepspeed`, `accelerate launch` or `torchrun` into
a rank of one process group, through Accelerate's DeepSpeed plugin; `Engine.prepare` wraps the
model; `Engine.backward` and `Engine.step` are the only places where gradients are scaled. The state
that goes into checkpoints is read and written by parameter name in fp32, so it depends on
neither the ZeRO stage nor the world size.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unidec_ds import comm
from unidec_ds.ds_config import DsConfig
from unidec_ds.errors import ConfigError, UserError
from unidec_ds.extensions import compiler, remember_cpu_flags, use_own_build_folder
from unidec_ds.lifeline import DEFAULT_TIMEOUT
from unidec_ds.optim import LearningRates, OptimizerConfig, parameter_groups

_MOMENTS = ("exp_avg", "exp_avg_sq")
# What SLURM's, Open MPI's and MPICH's launchers tell a process of the number that they started.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's <malloc.h>


def launched_world_size() -> int:
    """Returns the number of ranks the launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Returns this process's rank as the launcher says, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def check_launch(ds_config: DsConfig, batch_size: int) -> None:
    """Raises UserError where this launch cannot train; makes no process group.

    Checks that several processes were made ranks of one job, the world size against the batch, the
    ZeRO section against DeepSpeed's own schema, and that a ds_config given to `accelerate launch`
    is the one given to `--ds_config`.
    """
    _check_started_as_ranks()
    world_size = launched_world_size()
    if world_size > batch_size:
        raise UserError(
            f"train.batch_size: the global batch of {batch_size} queries cannot be spread over "
            f"{world_size} ranks; use at most {batch_size} ranks or a larger batch"
        )
    _check_zero_section(ds_config)
    launcher_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if launcher_file not in ("none", ""):
        given = json.loads(Path(launcher_file).read_text(encoding="utf-8"))
        if given != ds_config.content:
            raise UserError(
                f"--ds_config {ds_config.path} differs from the {launcher_file} given to "
                "`accelerate launch`; give both the same file"
            )


def start_engine(
    ds_config: DsConfig, batch_size: int, timeout: timedelta = DEFAULT_TIMEOUT
) -> Engine:
    """Joins the process group and returns the engine, still without a model.

    Args:
        ds_config: checked.
        batch_size: of all ranks together.
        timeout: how long a rank waits for the others in a collective before it fails.

    Raises:
        RuntimeError: Accelerate did not form the group that the launcher asked for.
    """
    world_size = launched_world_size()
    _be_one_rank_without_launcher()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # or CPU ranks believe to be rank 0 of 1
    _prepare_kernel_builds()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedType, InitProcessGroupKwargs
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    backend = get_accelerator().communication_backend_name()
    accelerator = Accelerator(
        mixed_precision="bf16" if ds_config.dtype == "bf16" else "no",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config.for_engine(batch_size, world_size)),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)],
    )
    if (
        accelerator.num_processes != world_size
        or accelerator.distributed_type is not DistributedType.DEEPSPEED
        or comm.world_size() != world_size
    ):
        raise RuntimeError(
            f"the launcher started {world_size} ranks, but Accelerate formed a group of "
            f"{accelerator.num_processes} ({accelerator.distributed_type}); every rank would "
            "train on the same data"
        )
    _limit_threads()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return Engine(accelerator, ds_config)


class Engine:
    """The model inside DeepSpeed. Every method is collective: all ranks must call it."""

    def __init__(self, accelerator: Any, ds_config: DsConfig) -> None:
        self.ds_config = ds_config
        self.device: torch.device = accelerator.device
        self.world_size = comm.world_size()
        self._accelerator = accelerator
        self._engine: Any = None

    def prepare(self, model: nn.Module, config: OptimizerConfig) -> None:
        """Wraps `model` and makes its AdamW (DeepSpeed's CPUAdam when the optimizer is offloaded).

        Gradients, moments and master weights are held as the ds_config's ZeRO stage says.
        """
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config), betas=config.betas, eps=config.eps
        )
        self._engine, _ = self._accelerator.prepare(model, optimizer)

    @property
    def module(self) -> nn.Module:
        """The model itself, for evaluation and export."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model; exactly once per training step, as ZeRO's hooks expect."""
        return self._engine(*args, **kwargs)

    def set_learning_rates(self, rates: LearningRates) -> None:
        """Writes the step's rates into the parameter groups."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rates.encoder if group["role"] == "encoder" else rates.head

    def backward(self, share: Tensor) -> None:
        """Back-propagates this rank's share of the loss.

        DeepSpeed averages the encoder's gradients over ranks where the shares ask for their sum,
        so the share is multiplied by the world size here. Gradients of leaves outside the engine
        (the classifier rows) come out that much too large: `row_gradient_scale` undoes it.
        """
        self._engine.backward(share * self.world_size)

    @property
    def row_gradient_scale(self) -> float:
        """What the gradients of leaves outside the engine must be multiplied by."""
        return 1.0 / self.world_size

    def step(self) -> float:
        """Clips, updates encoder and heads, clears gradients; returns the norm before clipping.

        The norm is not finite when any rank's gradient was not; the caller must stop then.
        """
        local_norm = self._replicated_gradient_norm() if self.ds_config.zero_stage == 0 else None
        self._engine.step()
        norm = local_norm if local_norm is not None else float(self._engine.get_global_grad_norm())
        return norm if norm >= 0 else math.nan  # DeepSpeed reports a norm of inf or NaN as -1

    def state(self) -> dict[str, Tensor]:
        """Returns fp32 CPU tensors "<parameter>" and, once stepped, "<parameter>.exp_avg[_sq]".

        Collectives: one all-reduce per tensor under ZeRO.
        """
        self._link_moments()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            tensors[name] = self._get(parameter, None)
            if self._num_updates() > 0 and parameter.requires_grad:
                for moment in _MOMENTS:
                    tensors[f"{name}.{moment}"] = self._get(parameter, moment)
        return tensors

    def load_state(self, tensors: dict[str, Tensor], num_updates: int) -> None:
        """Sets weights, and moments where present, to what `state` returned.

        Args:
            tensors: what `state` returned, at any ZeRO stage or world size.
            num_updates: AdamW steps taken so far, for its bias correction.
        """
        if num_updates > 0:
            self._create_moments(num_updates)
        for name, parameter in self.module.named_parameters():
            self._set(parameter, tensors[name], None)
            if num_updates > 0 and parameter.requires_grad:
                for moment in _MOMENTS:
                    self._set(parameter, tensors[f"{name}.{moment}"], moment)

    def close(self) -> None:
        """Leaves the process group."""
        self._accelerator.end_training()

    # DeepSpeed's ZeRO optimizer and a plain torch optimizer (stage 0) keep their state in
    # different places; the methods below are all that knows.

    @property
    def _is_sharded(self) -> bool:
        return hasattr(self._engine.optimizer, "single_partition_of_fp32_groups")

    @property
    def _adam(self) -> Any:
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self._is_sharded else optimizer

    def _num_updates(self) -> int:
        return max((int(state["step"]) for state in self._adam.state.values() if "step" in state),
                   default=0)  # fmt: skip

    def _create_moments(self, num_updates: int) -> None:
        masters = (
            self._engine.optimizer.single_partition_of_fp32_groups
            if self._is_sharded
            else [p for p in self.module.parameters() if p.requires_grad]
        )
        is_torch_adam = isinstance(self._adam, torch.optim.AdamW)
        for master in masters:
            self._adam.state[master] = {
                "step": torch.tensor(float(num_updates)) if is_torch_adam else num_updates,
                **{moment: torch.zeros_like(master.detach()) for moment in _MOMENTS},
            }
        self._link_moments()
        self._replay_kernel_steps(num_updates)

    def _replay_kernel_steps(self, num_updates: int) -> None:
        """Brings CPUAdam's own bias corrections to where `num_updates` steps leave them.

        The kernel multiplies them up in fp32 step by step and computes them afresh after a jump,
        which would make a resumed run differ in the last bit. Microseconds a step.
        """
        if not hasattr(self._adam, "ds_opt_adam"):
            return
        adam, group = self._adam, self._adam.param_groups[0]
        unused = [torch.zeros(1) for _ in range(4)]
        for step in range(1, num_updates + 1):
            adam.ds_opt_adam.adam_update(
                adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, *unused
            )

    def _link_moments(self) -> None:
        """Links every parameter group's moments to its parameters.

        DeepSpeed 0.19 links them after the first group's first step, when the other groups have
        no state yet, and then reports theirs as missing.
        """
        if self._is_sharded and self._num_updates() > 0:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _get(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        if not self._is_sharded or not parameter.requires_grad:
            value = parameter if moment is None else self._adam.state[parameter][moment]
            return value.detach().float().cpu().clone()
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if moment is None:
            full: Tensor = safe_get_full_fp32_param(parameter)
        else:
            full = safe_get_full_optimizer_state(parameter, moment)
        return full.detach().cpu().clone()

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        if moment is None:
            parameter.data.copy_(value)
        if not self._is_sharded or not parameter.requires_grad:
            if moment is not None:
                self._adam.state[parameter][moment].copy_(value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _replicated_gradient_norm(self) -> float:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norms = torch.stack([gradient.float().norm() for gradient in gradients])
        return float(norms.norm())


def _check_started_as_ranks() -> None:
    if "WORLD_SIZE" in os.environ:
        return
    for name in _TASK_COUNTS:
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"{count} processes were started ({name}), but nothing has made them ranks of one "
                "job (WORLD_SIZE is not set): each would train alone, all in one run directory. "
                "Start one a node that starts its ranks: `srun --ntasks-per-node=1 bash launch.sh "
                "...` or torchrun (docs/clusters.md); for one process alone `srun --ntasks=1`, or "
                f"unset {name}"
            )


def _check_zero_section(ds_config: DsConfig) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**ds_config.content["zero_optimization"])
    except ValidationError as error:
        faults = [
            f"zero_optimization.{'.'.join(map(str, fault['loc']))}: {fault['msg']} "
            f"(found {fault['input']!r})"
            for fault in error.errors()
        ]
        raise ConfigError(str(ds_config.path), faults) from error


def _be_one_rank_without_launcher() -> None:
    """Gives a process started by plain `python` the environment of rank 0 of 1."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip


def _limit_threads() -> None:
    """Shares the cores among this machine's ranks unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.local_world_size()))


def keep_freed_memory() -> None:
    """Lets the C library keep freed tensors' memory for the next ones, where that is glibc.

    By default it gives large blocks back to the system at once and a CPU step spends about a tenth
    of its time on fresh pages: 200,000 page faults per 256 texts in one chunk of the packaged
    encoder. Kept are at most 2 GiB that are free at the heap's end; blocks of 1 GiB and more still
    go back at once.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _prepare_kernel_builds() -> None:
    """Says that kernels will be compiled; without a compiler does without the optional one.

    On CPU ranks DeepSpeed compiles a shared-memory all-reduce as it starts, and fails where it
    cannot; gloo's own does as well.
    """
    import deepspeed

    folder = use_own_build_folder()
    remember_cpu_flags()
    if compiler() is None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    elif launched_rank() == 0 and not list(folder.glob("**/*.so")):
        print(
            "unidec_ds: DeepSpeed compiles its CPU kernels on first use (once, about two minutes)",
            file=sys.stderr,
            flush=True,
        )
