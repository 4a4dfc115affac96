"""How much of the product with the head reading agreement alone spares. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

_COUNTS = ("rows", "full", "screened", "candidates")


@dataclass(frozen=True)
class WorkSkipped:
    """What the witnesses spared.

    rows: (layer, token) rows in all, those of the model's own last layer among them. full: rows that had the full
    product in float32. witnessed: rows that a candidate settled. screened: rows that a product in bfloat16 settled.
    candidates: products of a row with a single candidate. vocabulary: products that a full row takes.
    """

    rows: int = 0
    full: int = 0
    screened: int = 0
    candidates: int = 0
    vocabulary: int = 1

    @property
    def witnessed(self) -> int:
        return self.rows - self.full - self.screened

    @property
    def witnessed_share(self) -> float:
        return self.witnessed / self.rows if self.rows else 0.0

    @property
    def products_avoided(self) -> float:
        """Share of the float32 products of the whole lens that was never computed."""
        whole = self.rows * self.vocabulary
        return 1 - (self.full * self.vocabulary + self.candidates) / whole if whole else 0.0

    @classmethod
    def from_json(cls, document: Mapping[str, float]) -> WorkSkipped:
        return cls(**{field.name: int(document[field.name]) for field in fields(cls)})

    def to_json(self) -> dict[str, float]:
        return asdict(self) | {"witnessed_share": self.witnessed_share, "products_avoided": self.products_avoided}

    def plus(self, other: WorkSkipped) -> WorkSkipped:
        """Both together: what two parts of a run were spared, with one head."""
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _COUNTS})

    def since(self, before: WorkSkipped) -> WorkSkipped:
        """What was added since then."""
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in _COUNTS})
