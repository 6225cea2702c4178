"""Writes the Triton source of a fused linear: GEMV, flat GEMM, and the ordered reduction that ends split-K.

Inside a kernel, `m` are rows of x, `n` columns of the outputs (rows of a weight), `k` the depth. A program works on one
segment; its products are called a, b, ... The epilogue is a function of its own, `finish<segment>`, on float32 tiles
[rows, BLOCK_N].
"""

from __future__ import annotations

from collections.abc import Iterable

from fxopt.codegen.kernels import epilogue_source, prologue_source, row_statistic_source
from fxopt.codegen.kernels.epilogue import Epilogue, Segment
from fxopt.codegen.kernels.gemm import Config, FusedLinear

REDUCE_ROWS = 4
IMPORTS = "import triton\nimport triton.language as tl\n"


class Writer:
    """Text of one module for one group and configuration; every method returns lines."""

    def __init__(self, fused: FusedLinear, config: Config) -> None:
        self.fused, self.config = fused, config
        self.segments = fused.epilogue.segments()
        self.held = len(self.segments[0].products)
        self.letters = [chr(ord("a") + i) for i in range(self.held)]
        self.columns = [sum(fused.widths[:i]) for i in range(len(fused.widths))]
        norm = fused.norm
        # fp16 cannot hold an unnormalised row times gamma, and a mean does not commute without cancellation; there the
        # statistic is computed first. Elsewhere it is gathered in the same pass and applied to the products.
        commutes = norm is not None and norm.kind == "rms" and (config.family == "gemv" or fused.dtype != "float16")
        self.commutes = commutes
        self.first = ["mean", "scale"] if norm is not None and not commutes else []
        """What is computed of a row ahead of the product, [rows, 1] each."""
        if fused.prologue is not None and fused.prologue.statistic is not None:
            self.first = ["statistic"]
        self.even_k = fused.depth % config.block_k == 0

    # --- signatures ------------------------------------------------------------------------------------------------

    def tensors(self, names: Iterable[str]) -> list[str]:
        return [part for name in names for part in (name, f"{name}_stride")]

    def extras(self, reach: set[str] | None = None) -> list[str]:
        """Parameters of the epilogue's extras, those in `reach` only when given; full ones come with a row stride."""
        chosen = [e for e in self.fused.epilogue.extras if reach is None or e.name in reach]
        return [part for e in chosen for part in ([e.name, f"{e.name}_stride"] if e.layout == "full" else [e.name])]

    def outputs(self) -> list[str]:
        return [f"out{i}" for i in range(len(self.fused.epilogue.outputs))]

    def workspace(self) -> list[str]:
        return [] if self.config.splits == 1 else ["partials", "squares"] if self.commutes else ["partials"]

    def main_parameters(self) -> list[str]:
        """Run-time parameters of the multiplying kernel, in order."""
        norm = self.fused.norm
        own = ["gamma"] * bool(norm and norm.gamma) + ["beta"] * bool(norm and norm.beta)
        weights = self.tensors(f"w{i}" for i in range(len(self.fused.widths)))
        last = self.workspace() if self.config.splits > 1 else [*self.extras(), *self.outputs()]
        return ["x", "x_stride", "M", *weights, *own, *prologue_source.parameters(self.fused.prologue), *last]

    def reduce_parameters(self) -> list[str]:
        """Run-time parameters of the reduction, in order."""
        return ["M", *self.workspace(), *self.extras(), *self.outputs()]

    def constants(self) -> dict[str, int]:
        """Compile-time parameters of the multiplying kernel with their values."""
        config = self.config
        own = {"K": self.fused.depth, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "STAGES": config.stages}
        return own if config.family == "gemv" else {"BLOCK_M": config.block_m, **own}

    def reduce_constants(self) -> dict[str, int]:
        """Compile-time parameters of the reduction with their values."""
        return {"SPLITS": self.splits(), "BLOCK_M": REDUCE_ROWS, "BLOCK_N": self.config.block_n}

    def _definition(self, name: str, parameters: Iterable[str], constants: dict[str, int], doc: str) -> list[str]:
        lines = ["", "", "@triton.jit", f"def {name}("]
        lines += [f"    {parameter}," for parameter in parameters]
        lines += [f"    {key}: tl.constexpr = {value}," for key, value in constants.items()]
        return [*lines, "):", f'    """{doc}"""']

    # --- the epilogue ----------------------------------------------------------------------------------------------

    def finish(self, index: int) -> list[str]:
        """The epilogue of a segment as a function of its own."""
        segment, epilogue = self.segments[index], self.fused.epilogue
        reach: set[str] = set().union(*(epilogue.reach(o) for o in segment.outputs))
        width = self.fused.widths[segment.products[0]]
        parameters = [*(f"p{i}" for i in segment.products), "m", "n", "M", *self.extras(reach)]
        parameters += [f"out{i}" for i in segment.outputs]
        even = width % self.config.block_n == 0
        return epilogue_source.finish(f"finish{index}", epilogue, segment, width, even, parameters)

    def _finish_calls(self, products: list[str], m: str, n: str) -> list[str]:
        lines = []
        for index, segment in enumerate(self.segments):
            reach: set[str] = set().union(*(self.fused.epilogue.reach(o) for o in segment.outputs))
            arguments = [*products, m, n, "M", *self.extras(reach), *(f"out{i}" for i in segment.outputs)]
            call = f"finish{index}({', '.join(arguments)})"
            if len(self.segments) == 1:
                return [f"    {call}"]
            last = self._tiles()[index + 1]
            opening = "else:" if index == len(self.segments) - 1 else f"{'el' * (index > 0)}if program < {last}:"
            lines += [f"    {opening}", f"        {call}"]
        return lines

    # --- which columns ---------------------------------------------------------------------------------------------

    def _tiles(self) -> list[int]:
        """Program number at which each segment starts, and the number of programs at the end."""
        starts = [0]
        for segment in self.segments:
            starts.append(starts[-1] - self.fused.widths[segment.products[0]] // -self.config.block_n)
        return starts

    def programs(self) -> int:
        """Programs along the columns."""
        return self._tiles()[-1]

    def _assignments(self, segment: Segment, start: int, weights: bool) -> list[str]:
        tile = "tile = program" if start == 0 else f"tile = program - {start}"
        lines = [tile, f"width = {self.fused.widths[segment.products[0]]}"]
        for letter, product in zip(self.letters, segment.products, strict=True):
            if weights:
                lines += [f"{letter}_weight = w{product}", f"{letter}_stride = w{product}_stride"]
            if self.config.splits > 1:
                lines.append(f"{letter}_column = {self.columns[product]}")
        return lines

    def select(self, weights: bool) -> list[str]:
        """From the program number to the segment's weights and the program's place in it."""
        lines = ["    program = tl.program_id(0)"]
        for index, segment in enumerate(self.segments):
            assignments = self._assignments(segment, self._tiles()[index], weights)
            if index:
                lines.append(f"    if program >= {self._tiles()[index]}:")
            lines += [("        " if index else "    ") + line for line in assignments]
        lines.append("    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)")
        return lines

    def weight_rows(self) -> list[str]:
        # Columns past the end read the last row again: no mask in the loop, and what they compute is never stored.
        even = all(self.fused.widths[s.products[0]] % self.config.block_n == 0 for s in self.segments)
        n = "n" if even else "tl.minimum(n, width - 1)"
        return [
            f"    {letter}_rows = {letter}_weight + {n}.to(tl.int64)[:, None] * {letter}_stride"
            for letter in self.letters
        ]

    # --- the row statistic -----------------------------------------------------------------------------------------

    def row_statistic(self) -> list[str]:
        """The function that gives what `first` names, [rows, 1] each, of whole rows."""
        norm, prologue = self.fused.norm, self.fused.prologue
        if norm is not None:
            return row_statistic_source.of_norm(norm, prologue, self._input("x_rows", "start + k", "m", "inside"))
        assert prologue is not None
        return row_statistic_source.of_prologue(prologue)

    def _before(self) -> str:
        """The prologue's parameters, each followed by a comma."""
        return "".join(f"{name}, " for name in prologue_source.parameters(self.fused.prologue))

    def _input(self, rows: str, at: str, m: str, inside: str, row: str = "") -> str:
        """A float32 tile of the input, after the prologue and before the norm, zero outside; `row` tells rows apart."""
        if self.fused.prologue is not None:
            statistic = f"statistic{row}, " if self.first == ["statistic"] else ""
            return f"prologue({rows}, {at}, {m}, {inside}, M, {self._before()}{statistic}K)"
        return f"tl.load({rows} + {at}, mask={inside} & ({at} < K), other=0.0).to(tl.float32)"

    def _affine_loads(self) -> list[str]:
        norm = self.fused.norm
        mask = "" if self.even_k else ", mask=at < K, other=0.0"
        lines = []
        if norm is not None and norm.gamma:
            value = f"tl.load(gamma + at{mask}).to(tl.float32)"
            # Masked columns are zero in the weights, so a one there does no harm.
            lines.append(f"        gamma_tile = {f'1.0 + {value}' if norm.unit_offset else value}")
        if norm is not None and norm.beta:
            lines.append(f"        beta_tile = tl.load(beta + at{mask}).to(tl.float32)")
        return lines

    def _normalise(self, tile: str, mean: str, scale: str, squares: str) -> list[str]:
        """Lines that gather the statistic of a float32 tile [rows, BLOCK_K] and apply what may be applied now."""
        norm = self.fused.norm
        lines = []  # type: ignore[var-annotated]
        if norm is None:
            return lines
        if self.commutes:
            lines.append(f"        {squares} += {tile} * {tile}")
        elif norm.kind == "layer":
            lines.append(f"        {tile} = ({tile} - {mean}) * {scale}")
        else:
            lines.append(f"        {tile} = {tile} * {scale}")
        if norm.gamma:
            lines.append(f"        {tile} = {tile} * gamma_tile")
        if norm.beta:
            lines.append(f"        {tile} = {tile} + beta_tile")
        return lines

    def scale(self, squares: str) -> str:
        """The commuted statistic [rows, 1] from a sum of squares."""
        assert self.fused.norm is not None
        return f"tl.rsqrt({squares} / {self.fused.depth} + {self.fused.norm.eps!r})"

    # --- families --------------------------------------------------------------------------------------------------

    def gemv(self) -> list[str]:
        """Rows one by one against a tile of the weights; the accumulators stay two-dimensional until the end."""
        rows, fused = range(self.config.block_m), self.fused
        mask = "" if self.even_k else ", mask=at < K, other=0.0"
        doc = f"{len(rows)} rows per program, BLOCK_N columns of each weight, products on the vector units."
        lines = self._definition("gemv", self.main_parameters(), self.constants(), doc)
        lines += [*self.select(True), *self.weight_rows(), "    k = tl.arange(0, BLOCK_K)"]
        lines.append(f"    first = tl.zeros((1, 1), tl.int64) + tl.program_id(1) * {len(rows)}")
        for r in rows:
            # Rows past the end read the last row again and are not stored.
            lines += [f"    m{r} = first + {r}", f"    x_row{r} = x + tl.minimum(m{r}, M - 1) * x_stride"]
            if self.first:
                block = "BLOCK_K * 4" if self.fused.depth > self.config.block_k * 2 else "BLOCK_K"
                inputs = f"x_row{r}, m{r} >= 0, tl.minimum(m{r}, M - 1), M, {self._before()}K, 1, {block}"
                lines.append(f"    {', '.join(f'{name}{r}' for name in self.first)} = row_statistic({inputs})")
            if self.commutes:
                lines.append(f"    squares{r} = tl.zeros((1, BLOCK_K), tl.float32)")
            lines += [f"    {letter}{r} = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)" for letter in self.letters]
        lines.append("    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):")
        lines.append("        at = (start + k)[None, :]")
        lines += self._affine_loads()
        lines += [f"        {le}_tile = tl.load({le}_rows + at{mask}).to(tl.float32)" for le in self.letters]
        for r in rows:
            if fused.prologue is not None:
                tile = self._input(f"x_row{r}", "at", f"tl.minimum(m{r}, M - 1)", f"(m{r} >= 0)", str(r))
            else:
                tile = f"tl.load(x_row{r} + at{mask}).to(tl.float32)"
            lines.append(f"        x_tile{r} = {tile}")
            lines += self._normalise(f"x_tile{r}", f"mean{r}", f"scale{r}", f"squares{r}")
            lines += [f"        {letter}{r} += {letter}_tile * x_tile{r}" for letter in self.letters]
        for r in rows:
            if self.commutes:
                lines.append(f"    scale{r} = {self.scale(f'tl.sum(squares{r}, axis=1)[:, None]')}")
            products = []
            for letter in self.letters:
                product = f"tl.sum({letter}{r}, axis=1)[None, :]"
                lines.append(f"    {letter}{r} = {product}{f' * scale{r}' if self.commutes else ''}")
                products.append(f"{letter}{r}")
            lines += self._finish_calls(products, f"m{r}", "n[None, :]")
        return lines

    def flat(self) -> list[str]:
        """Tiles on the matrix units, M padded to BLOCK_M by masks."""
        config, fused = self.config, self.fused
        mask_k = "" if self.even_k else " & (at < K)"
        mask_w = "" if self.even_k else ", mask=at < K, other=0.0"
        shape = "(BLOCK_N, BLOCK_M)" if config.swap else "(BLOCK_M, BLOCK_N)"
        precise = ', input_precision="ieee"' if fused.dtype == "float32" else ""
        doc = "BLOCK_M rows against BLOCK_N columns of each weight on the matrix units."
        lines = self._definition("flat_gemm", self.main_parameters(), self.constants(), doc)
        lines += [*self.select(True), *self.weight_rows(), "    k = tl.arange(0, BLOCK_K)"]
        lines += [
            "    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]",
            "    x_rows = x + m * x_stride",
            "    inside = m < M",
        ]
        if self.first:
            inputs = f"x_rows, inside, m, M, {self._before()}K, BLOCK_M, BLOCK_K * 2"
            lines.append(f"    {', '.join(self.first)} = row_statistic({inputs})")
        if self.commutes:
            lines.append("    squares_tile = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)")
        lines += [f"    {letter} = tl.zeros({shape}, tl.float32)" for letter in self.letters]
        begin, end = "0", "K"
        if config.splits > 1:
            run = self.split_run()
            lines += ["    split = tl.program_id(2)", f"    begin = split * {run}"]
            lines.append(f"    end = tl.minimum(begin + {run}, K)")
            begin, end = "begin", "end"
        lines.append(f"    for start in tl.range({begin}, {end}, BLOCK_K, num_stages=STAGES):")
        lines.append("        at = (start + k)[None, :]")
        if fused.prologue is None:
            lines.append(f"        x_tile = tl.load(x_rows + at, mask=inside{mask_k}, other=0.0)")
        else:
            tile = self._input("x_rows", "at", "m", "inside")
            lines.append(f"        x_tile = {tile}.to(x.dtype.element_ty)")
        lines += [f"        {letter}_tile = tl.load({letter}_rows + at{mask_w})" for letter in self.letters]
        if fused.norm is not None:
            lines += [*self._affine_loads(), "        x_wide = x_tile.to(tl.float32)"]
            lines += self._normalise("x_wide", "mean", "scale", "squares_tile")
            lines.append("        x_tile = x_wide.to(x.dtype.element_ty)")
        for letter in self.letters:
            pair = f"{letter}_tile, tl.trans(x_tile)" if config.swap else f"x_tile, tl.trans({letter}_tile)"
            lines.append(f"        {letter} = tl.dot({pair}, {letter}{precise})")
        if config.swap:
            lines += [f"    {letter} = tl.trans({letter})" for letter in self.letters]
        if config.splits > 1:
            return lines + self._store_partials()
        if self.commutes:
            lines.append(f"    scale = {self.scale('tl.sum(squares_tile, axis=1)[:, None]')}")
            lines += [f"    {letter} = {letter} * scale" for letter in self.letters]
        return lines + self._finish_calls(self.letters, "m", "n[None, :]")

    # --- split-K ---------------------------------------------------------------------------------------------------

    def split_run(self) -> int:
        """Depth of one split, a multiple of BLOCK_K."""
        return -(self.fused.depth // -(self.config.splits * self.config.block_k)) * self.config.block_k

    def splits(self) -> int:
        """Splits that have work: short rows fill fewer than asked."""
        return -(self.fused.depth // -self.split_run())

    def _store_partials(self) -> list[str]:
        lines = [f"    # partials: [splits, M, {sum(self.fused.widths)}] float32, every element written once."]
        lines.append(f"    at = (split * M + m) * {sum(self.fused.widths)} + n[None, :]")
        lines += [
            f"    tl.store(partials + at + {le}_column, {le}, mask=inside & (n[None, :] < width))"
            for le in self.letters
        ]
        if self.commutes:
            lines.append("    if program == 0:")
            lines.append(
                "        tl.store(squares + split * M + m, tl.sum(squares_tile, axis=1)[:, None], mask=inside)"
            )
        return lines

    def reduce(self) -> list[str]:
        """Adds the splits in order, so that the sum does not depend on which finished first."""
        doc = "Partial sums in order of split, then the epilogue."
        lines = self._definition("reduce_splits", self.reduce_parameters(), self.reduce_constants(), doc)
        lines += self.select(False)
        lines += [
            "    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]",
            "    inside = (m < M) & (n[None, :] < width)",
            f"    at = m * {sum(self.fused.widths)} + n[None, :]",
        ]
        lines += [f"    {letter} = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)" for letter in self.letters]
        if self.commutes:
            lines.append("    total = tl.zeros((BLOCK_M, 1), tl.float32)")
        lines.append("    for split in tl.static_range(SPLITS):")
        lines.append(f"        plane = tl.cast(M, tl.int64) * (split * {sum(self.fused.widths)})")
        for letter in self.letters:
            lines.append(
                f"        {letter} += tl.load(partials + plane + at + {letter}_column, mask=inside, other=0.0)"
            )
        if self.commutes:
            lines.append("        total += tl.load(squares + split * M + m, mask=m < M, other=0.0)")
            lines.append(f"    scale = {self.scale('total')}")
            lines += [f"    {letter} = {letter} * scale" for letter in self.letters]
        return lines + self._finish_calls(self.letters, "m", "n[None, :]")

    def module(self) -> str:
        """The whole file after its header."""
        lines = [IMPORTS.rstrip()]
        if self.fused.prologue is not None:
            lines += prologue_source.function(self.fused.prologue)
        if self.first:
            lines += self.row_statistic()
        for index in range(len(self.segments)):
            lines += self.finish(index)
        lines += self.gemv() if self.config.family == "gemv" else self.flat()
        if self.config.splits > 1:
            lines += self.reduce()
        return "\n".join(lines) + "\n"


def _steps(dag: Epilogue | None) -> list[str]:
    return [] if dag is None else [f"{s.name} = {s.op}{s.args} [{s.origin}]" for s in dag.steps]


def header(fused: FusedLinear, config: Config, origin: str = "") -> dict[str, str]:
    """What the generated file says about itself."""
    epilogue = "; ".join(_steps(fused.epilogue))
    return {
        "written for": origin or "a group without a module path",
        "computes": f"{len(fused.widths)} products of {fused.dtype} x [M, {fused.depth}] with weights "
        + ", ".join(f"[{width}, {fused.depth}]" for width in fused.widths),
        "prologue": "; ".join([*_steps(fused.prologue), *([str(fused.norm)] if fused.norm else [])]) or "none",
        "epilogue": epilogue or "none",
        "configuration": str(config),
    }
