"""What the metrics are measured with; all of it is written into the profile."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnopt.errors import OptionError


@dataclass(frozen=True)
class Settings:
    """Sizes and thresholds.

    Attributes:
        sink: keys at the front that count as attention sinks (StreamingLLM, arXiv 2309.17453, keeps 4).
        windows: local masses are measured for these, powers of two.
        recent: recent keys that a streaming head sees, a power of two; None for a quarter of the longest prompt
            (an eighth to each side where keys on both sides are seen).
        skip: rows before this are left out of shape metrics: short rows are similar by construction. At most a
            quarter of a prompt.
        pair_prompts: prompts on which layers are compared.
        pair_rows: rows of each of them that are compared.
        pair_context: at most this many first tokens of each of them.
        pair_bytes: memory that maps, keys and values kept for comparison may take; fewer prompts are compared if
            need be.
        needles: synthetic prompts for the retrieval score.
        needle_length, needle_context: tokens of a needle and of its prompt.
        spectrum_prompts: prompts for the spectra of keys and values.
        seed: of everything random.
    """

    sink: int = 4
    windows: tuple[int, ...] = (16, 64, 256)
    recent: int | None = None
    skip: int = 32
    pair_prompts: int = 8
    pair_rows: int = 32
    pair_context: int = 512
    pair_bytes: int = 512 << 20
    needles: int = 8
    needle_length: int = 16
    needle_context: int = 256
    spectrum_prompts: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        wide = [*self.windows, *([self.recent] if self.recent is not None else [])]
        if any(width < 1 or width & (width - 1) for width in wide):
            raise OptionError(f"windows of {wide} are not all powers of two", "distances are binned by powers of two")

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
