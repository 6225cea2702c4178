"""Which kernel multiplies M rows with [N, K]: GEMV for M < M1, flat GEMM for M1 <= M < M2, the library above.

FlashDecoding++ (arXiv 2311.01282, section 5) measures the inflection points M1 and M2 once per GPU and [N, K]. Tables
of them are a device cache: they hold for one GPU, one torch, one Triton and one dtype. Without a table a roofline model
decides, which knows the device's peaks but not how good its library is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fxopt.codegen import compat, roofline
from fxopt.codegen.files import write_whole
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.epilogue import FLOATS, dtype_name
from fxopt.codegen.kernels.gemm import MAX_ROWS, Config, FusedLinear, configure, reference, shared_bytes
from fxopt.codegen.kernels.gemm_launch import run
from fxopt.codegen.source import cache_folder

Choice = Literal["gemv", "flat", "library"]
TorchDevice = torch.device
SCHEMA = 1
SHIPPED = Path(__file__).parent / "tables"
"""Tables that were measured on real GPUs and ship with the project."""


@dataclass(frozen=True)
class Thresholds:
    """GEMV for M < m1, flat GEMM for m1 <= M < m2, the library from m2 on; 1 <= m1 <= m2."""

    m1: int
    m2: int

    def choose(self, m: int) -> Choice:
        """The kernel for m rows."""
        return "gemv" if m < self.m1 else "flat" if m < self.m2 else "library"


def thresholds_from_times(times: Mapping[Choice, Mapping[int, float]]) -> Thresholds:
    """M1 and M2 from measured seconds by kernel and M: the pair whose worst loss to the fastest kernel is least.

    The loss is the time of the chosen kernel over that of the fastest one at the same M; among pairs that differ by
    less than one percent, which is noise, the one whose losses are the smallest together is taken. (The first M at
    which a kernel loses, which the paper takes, gives away all larger ones to a single noisy time.)
    """
    rows = sorted(times["library"])
    fastest = {m: min(row[m] for row in times.values() if m in row) for m in rows}
    places = [*rows, rows[-1] + 1]
    found: list[tuple[float, float, int, int]] = []
    for m1, m2 in itertools.combinations_with_replacement(places, 2):
        pair = Thresholds(m1 if m1 > rows[0] else 1, m2 if m2 > rows[0] else 1)
        losses = [times.get(pair.choose(m), {}).get(m, math.inf) / fastest[m] for m in rows]
        found.append((max(losses), sum(losses), pair.m1, pair.m2))
    best = min(found)[0]
    _, _, m1, m2 = min((entry for entry in found if entry[0] <= 1.01 * best), key=lambda entry: entry[1:])
    return Thresholds(m1, m2)


def model_thresholds(n: int, k: int, dtype: str, device: roofline.Device, max_m: int = MAX_ROWS) -> Thresholds:
    """What a roofline says: GEMV while its arithmetic hides behind the weights, flat while its padded products do."""
    size = getattr(torch, dtype).itemsize
    memory = size / device.bandwidth
    # Per weight: one conversion, and for each row one multiply-add and its share of loading x; half the vector rate is
    # left to address arithmetic. With this the A100 gets the M1 = 2 that the paper measured.
    vector = 2 / device.peak("float32")
    m1 = next((m for m in range(1, 5) if (1 + 2 * m) * vector > memory / 2), 5)
    rate = device.peak(dtype) * (0.5 if dtype == "float32" else 1.0)
    fits = [rows for rows in (16, 32, 64) if 2 * rows / rate <= memory]
    m2 = min(fits[-1] if fits else 0, max_m) + 1
    m1 = min(m1, max_m + 1)
    return Thresholds(m1, max(m1, m2))


@dataclass(frozen=True)
class TableKey:
    """What a measured table holds for."""

    gpu: str
    torch: str
    triton: str
    dtype: str

    @staticmethod
    def current(dtype: str, device: TorchDevice | None = None) -> TableKey:
        """The key of this machine; a CPU is called by its architecture."""
        on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
        gpu = torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}"
        return TableKey(gpu, torch.__version__.split("+")[0], compat.triton_version(), dtype)

    @property
    def file_name(self) -> str:
        """`nvidia-h200-bfloat16.json`: one file a GPU and dtype, so that other GPUs' tables are never opened."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.gpu} {self.dtype}".lower()).strip("-") + ".json"


@dataclass(frozen=True)
class Entry:
    """One measured [N, K]: thresholds, the best configuration by family and row bucket, seconds by kernel and M."""

    thresholds: Thresholds
    configs: Mapping[str, Config] = field(default_factory=dict)
    times: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


@dataclass
class Table:
    """Measured entries by (N, K) for one key."""

    key: TableKey
    entries: dict[tuple[int, int], Entry] = field(default_factory=dict)

    def save(self, path: Path) -> bool:
        """Writes JSON atomically; False, with a warning, where the folder cannot be written."""
        entries = {f"{n},{k}": asdict(entry) for (n, k), entry in sorted(self.entries.items())}
        text = json.dumps({"schema": SCHEMA, "key": asdict(self.key), "entries": entries}, indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text + "\n")
        except OSError as problem:
            warnings.warn(f"fxopt keeps its measured table in memory only, {path} cannot be written: {problem}")
            return False
        return True

    @staticmethod
    def load(path: Path) -> Table:
        """Reads a table; raises ValueError when the file is no table of this schema, OSError when it cannot be read."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']}, this fxopt reads {SCHEMA}")
            table = Table(TableKey(**data["key"]))
            for name, entry in data["entries"].items():
                n, k = map(int, name.split(","))
                table.entries[n, k] = Entry(
                    Thresholds(**entry["thresholds"]),
                    {where: Config(**config) for where, config in entry["configs"].items()},
                    {kind: {int(m): t for m, t in row.items()} for kind, row in entry["times"].items()},
                )
        except (KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"{path} is not a dataflow table: {problem!r}") from problem
        return table


def places(key: TableKey, path: Path | str | None = None) -> list[Path]:
    """Where a table for `key` may lie: at `path` (file or folder), else in the cache, else among those that ship."""
    if path is not None:
        given = Path(path)
        return [given / key.file_name if given.is_dir() else given]
    return [cache_folder() / "tables" / key.file_name, SHIPPED / key.file_name]


def find_table(key: TableKey, path: Path | str | None = None) -> Table | None:
    """The table for `key` in the first of its :func:`places` that holds one.

    Files for another GPU, version or dtype, or that cannot be read, are ignored; where no table is left, one warning
    says why.
    """
    refused = []
    for place in places(key, path):
        if not place.exists():
            continue
        try:
            table = Table.load(place)
        except (OSError, ValueError) as problem:
            refused.append(f"the table {place}: {problem}")
            continue
        if table.key == key:
            return table
        pairs = zip(asdict(table.key).items(), asdict(key).values(), strict=True)
        differs = ", ".join(f"{name} {theirs} instead of {ours}" for (name, theirs), ours in pairs if theirs != ours)
        refused.append(f"the table {place}: it was measured with {differs}")
    if refused:
        ending = "; `fxopt tune MODEL --only flat_gemm` measures one for this machine"
        warnings.warn(f"fxopt ignores {' and '.join(refused)}{ending}")
    elif path is not None:
        warnings.warn(f"fxopt finds no table at {places(key, path)[0]}; the roofline model decides")
    return None


def tables_digest(path: str = "") -> str:
    """Hash of the tables that decisions on this machine may rest on: compiled code must not outlive them."""
    found = hashlib.sha256()
    for dtype in sorted(map(dtype_name, FLOATS)):
        for place in places(TableKey.current(dtype), path or None):
            if place.is_file():
                found.update(place.name.encode() + b"\0" + place.read_bytes())
    return found.hexdigest()


class Dataflow:
    """Decisions for one device and dtype: a measured table where there is one, the roofline model elsewhere."""

    def __init__(
        self,
        dtype: torch.dtype | str,
        device: torch.device | None = None,
        path: Path | str | None = None,
        max_m: int = MAX_ROWS,
        model: roofline.Device | None = None,
    ) -> None:
        """path is a table or a folder of tables; `model` replaces the device the roofline is computed for."""
        self.dtype = dtype if isinstance(dtype, str) else dtype_name(dtype)
        self.max_m = max_m
        self.model = model or roofline.current_device(device)
        self.refused: dict[tuple[FusedLinear, Config], str] = {}
        # By identity, since a description is decoded once and takes longer to hash than to launch; kept, so that no
        # other can take its place.
        self.chosen: dict[tuple[int, int], tuple[FusedLinear, Config | None]] = {}
        self.table = find_table(TableKey.current(self.dtype, device), path)

    def measured(self, n: int, k: int) -> bool:
        """Whether [n, k] was measured on this device."""
        return self.table is not None and (n, k) in self.table.entries

    def decided_by(self, n: int, k: int) -> str:
        """``measured table`` or ``roofline model``."""
        return "measured table" if self.measured(n, k) else "roofline model"

    def thresholds(self, n: int, k: int) -> Thresholds:
        """M1 and M2 of [n, k]; n is the sum of the widths of a group."""
        if self.table is not None and (n, k) in self.table.entries:
            found = self.table.entries[n, k].thresholds
            return Thresholds(min(found.m1, self.max_m + 1), min(found.m2, self.max_m + 1))
        return model_thresholds(n, k, self.dtype, self.model, self.max_m)

    def choose(self, m: int, n: int, k: int) -> Choice:
        """The kernel for m rows of [n, k]."""
        return self.thresholds(n, k).choose(m)

    def config(self, fused: FusedLinear, m: int) -> Config | None:
        """The configuration for m rows of a group, None where the library is chosen."""
        n = sum(fused.widths)
        family = self.choose(m, n, fused.depth)
        if family == "library":
            return None
        default = configure(fused, m, family, self.model)
        if self.table is None or (n, fused.depth) not in self.table.entries:
            return default
        found = self.table.entries[n, fused.depth].configs.get(place_of(default), default)
        # Tables are measured with one weight; a group that holds two needs more shared memory for the same blocks.
        return found if shared_bytes(fused, found) <= self.model.shared_bytes else default

    def run(
        self,
        fused: FusedLinear,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        extras: Sequence[torch.Tensor] = (),
        origin: str = "",
    ) -> list[torch.Tensor]:
        """Runs a group by whichever kernel the number of rows asks for: x [..., K] to outputs [..., N].

        Where the kernel cannot run, the library does; `refused` then holds the reason, and one warning says it.
        """
        rows = x.numel() // fused.depth
        if (id(fused), rows) not in self.chosen:
            self.chosen[id(fused), rows] = (fused, self.config(fused, rows))
        config = self.chosen[id(fused), rows][1]
        if config is not None and (fused, config) not in self.refused:
            try:
                return run(fused, x, weights, extras, config, origin)
            except Unsupported as problem:
                self.refused[fused, config] = problem.reason
                warnings.warn(f"fxopt leaves {origin or 'a linear'} to the library: {problem.reason}")
        return reference(fused, x, weights, extras)


def place_of(config: Config) -> str:
    """Under this name an entry keeps a configuration: the family and its bucket of rows, such as ``flat-16``."""
    return f"{config.family}-{config.block_m}"
