"""Several sources as one: `[A, B]`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from mae_et.data.order import images_per_pass
from mae_et.data.sources.listing import LeftOut
from mae_et.data.sources.source import ImageSource, RegionSource, as_regions, parts_of, read_ahead
from mae_et.errors import printable
from mae_et.models.sizes import Size


class ConcatSource:
    """Joins sources one after the other.

    All of them name their classes, or none of them does. Where the lists of names differ, the classes are all names, sorted.

    Args:
        parts: the sources.
        specs: how the user names them.
    """

    labels: Sequence[int] | np.ndarray | None
    class_names: Sequence[str] | None
    why_no_labels = ""
    how_to_label = "label all sources in one way, or name only those that are labelled"

    def __init__(self, parts: Sequence[ImageSource], specs: Sequence[str]) -> None:
        self.parts, self.specs = list(parts), [printable(spec) for spec in specs]
        self.decoding, self.left_out = parts[0].decoding, LeftOut()
        for part in parts:
            self.left_out.update(part.left_out)
        self._ends = np.cumsum([len(part) for part in parts])
        self.labels, self.class_names = self._join_labels()

    def _join_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        unlabelled = [spec for spec, part in zip(self.specs, self.parts, strict=True) if part.labels is None]
        if unlabelled:
            why = getattr(self.parts[self.specs.index(unlabelled[0])], "why_no_labels", "") or "it has none"
            self.why_no_labels = (
                f"{len(unlabelled)} of {len(self.parts)} sources have none, e.g. {unlabelled[0]}: {why}"
            )
            return None, None
        labels = [np.asarray(part.labels) for part in self.parts]
        names = [list(part.class_names or ()) for part in self.parts]
        numbered = [spec for spec, own in zip(self.specs, names, strict=True) if not own]
        if 0 < len(numbered) < len(self.parts):
            named = next(spec for spec in self.specs if spec not in numbered)
            self.why_no_labels = f"{named} names its classes and {numbered[0]} only numbers them"
            return None, None
        joined = names[0]
        if any(other != joined for other in names):
            joined = sorted(set().union(*names))
            places = {name: place for place, name in enumerate(joined)}
            labels = [
                np.array([places[name] for name in own], np.int32)[numbers]
                for own, numbers in zip(names, labels, strict=True)
            ]
        return np.concatenate(labels).astype(np.int32), joined or None

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the part of an image, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, "right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        number, own = self._place(index)
        return self.parts[number].name(own)

    def key(self, index: int) -> str:
        number, own = self._place(index)
        return f"{number}:{self.parts[number].key(own)}"  # the same wherever the sources are

    def size(self, index: int) -> int | None:
        number, own = self._place(index)
        return self.parts[number].size(own)

    def read(self, index: int) -> bytes | None:
        number, own = self._place(index)
        return self.parts[number].read(own)

    def load(self, index: int) -> Image.Image:
        number, own = self._place(index)
        return self.parts[number].load(own)

    @property
    def reads_ahead_always(self) -> bool:
        return any(getattr(part, "reads_ahead_always", False) for part in self.parts)

    def read_ahead(self, indices: Sequence[int]) -> None:
        places = [self._place(index) for index in indices]
        for number, part in enumerate(self.parts):
            if own := [place for chosen, place in places if chosen == number]:
                read_ahead(part, own)


class ConcatRegionSource(ConcatSource):
    """Joins sources of stored pixels; see `RegionSource`."""

    def shape(self, index: int) -> tuple[int, int]:
        number, own = self._place(index)
        return cast(RegionSource, self.parts[number]).shape(own)

    def read_region(self, index: int, box: tuple[int, int, int, int], size: int | Size | None = None) -> np.ndarray:
        number, own = self._place(index)
        return cast(RegionSource, self.parts[number]).read_region(own, box, size)

    def check_sizes(self, sizes: Iterable[int | Size]) -> None:
        sizes = list(sizes)
        for part in self.parts:
            cast(RegionSource, part).check_sizes(sizes)


def join(parts: Sequence[ImageSource], specs: Sequence[str]) -> ConcatSource:
    """Returns several sources as one, with regions if all of them have regions. Arguments as for `ConcatSource`."""
    has_regions = all(as_regions(part) is not None for part in parts)
    return (ConcatRegionSource if has_regions else ConcatSource)(parts, specs)


def describe_sampling(source: ImageSource, weights: Sequence[float]) -> str:
    """Returns how many images of each source a pass shows with `data.train_weights`."""
    sizes = [len(part) for part in parts_of(source)]
    specs: Sequence[Any] = getattr(source, "specs", ("data.train",))
    rows = [
        f"{share} of {spec} ({size} images, {share / size:.3g} times each)"
        for share, spec, size in zip(images_per_pass(sizes, weights), specs, sizes, strict=True)
    ]
    return f"data.train_weights: a pass of {sum(sizes)} images shows {', '.join(rows)}"
