"""Whether a classifier table fits, and what would: known before anything is allocated."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from unidec_ds.classifier import partition
from unidec_ds.classifier.row_formats import (
    BiasCorrection,
    FormatName,
    RowOptimizer,
    bytes_per_label,
    formats_of,
)
from unidec_ds.classifier.storage import Placement, nvme_directory
from unidec_ds.errors import UserError


def check_fits(
    num_labels: int,
    width: int,
    world_size: int,
    row_format: FormatName,
    bias_correction: BiasCorrection,
    placement: Placement,
    device: torch.device,
    local_world_size: int = 1,
    optimizer: RowOptimizer = "adamw",
) -> None:
    """Refuses a table that will not fit, with what would.

    Ranks of one machine share its memory and its disk; each has an accelerator of its own. Call it
    on every rank before any of them allocates: what one has taken is no longer free to the others.

    Raises:
        UserError: bytes needed, bytes there, and the formats and world sizes that would fit.
    """
    sharing = 1 if placement.kind == "device" else local_world_size
    free = free_bytes(placement, device)
    label_bytes = {
        n: bytes_per_label(n, bias_correction, width, optimizer) for n in formats_of(optimizer)
    }
    rows_per_place = sharing * partition.num_local_rows(num_labels, 0, world_size)
    needed = rows_per_place * label_bytes[row_format]
    if needed <= free:
        return
    advice = [
        f"classifier.format: {name} ({_gib(rows_per_place * size)})"
        for name, size in label_bytes.items()
        if rows_per_place * size <= free
    ]
    rows_that_fit = free // label_bytes[row_format] // sharing
    if rows_that_fit:
        ranks = "" if sharing == 1 else f" with {sharing} ranks a machine"
        advice.append(f"a world size of {-(-num_labels // rows_that_fit)} or more{ranks}")
    if placement.kind != "nvme":
        advice.append("offload_optimizer.device: nvme in the ds_config")
    place = {"cpu": "host memory", "nvme": f"the disk of {placement.nvme_path}"}
    where = place.get(placement.kind, f"the memory of {device}")
    raise UserError(
        f"the classifier table does not fit into {where}: {num_labels:,} labels x {width} in "
        f"format {row_format} ({label_bytes[row_format]:,} bytes a label) over {world_size} "
        f"rank{'s' if world_size > 1 else ''} need {_gib(needed)} ({needed:,} bytes) there, and "
        f"{_gib(free)} ({free:,} bytes) are free. "
        + (f"What would fit: {'; or '.join(advice)}." if advice else "Not one row fits: free some.")
    )


def free_bytes(placement: Placement, device: torch.device) -> int:
    """Returns how many bytes could be allocated now where `placement` puts the table."""
    if placement.kind == "nvme":
        disk = os.statvfs(nvme_directory(placement))
        return disk.f_bavail * disk.f_frsize
    if placement.kind == "device" and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_free_bytes()


def host_free_bytes() -> int:
    """Returns the host memory this process could get: the machine's, within its cgroups' limits."""
    free = sys.maxsize
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used, reclaimable in _cgroup_memory():
        free = min(free, max(0, limit - used + reclaimable))
    return free


def _cgroup_memory() -> list[tuple[int, int, int]]:
    """Returns (limit, used, reclaimable) bytes of each limited cgroup this process is in."""
    membership = Path("/proc/self/cgroup")
    if not membership.exists():
        return []
    found = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                limit = int((folder / names[0]).read_text())  # "max" raises: not limited here
                used = int((folder / names[1]).read_text())
                stat = dict(
                    row.split() for row in (folder / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):
                continue
            found.append((limit, used, int(stat.get(names[2], 0))))
    return found


def _gib(num_bytes: int) -> str:
    """Returns bytes in words."""
    return f"{num_bytes / 2**30:.1f} GiB"
