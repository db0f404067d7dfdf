"""What is in a stored set, at a glance: how long, how large and how described its samples are. No number is read."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moedistill.data.latents import SampleError, Store

ROWS = 4
"""How many values are listed of a distribution; the rest is one row more."""
BAR = 30
"""Letters of the longest bar."""


@dataclass
class Overview:
    """What a set's index and headers say of its samples.

    Attributes:
        shapes: of the latents (C, T, H, W), by sample.
        captions: of the samples that have one.
        broken: how many samples could not be looked at.
    """

    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    captions: dict[int, str] = field(default_factory=dict)
    broken: int = 0


def look(store: Store) -> Overview:
    """Looks at each sample of a set."""
    found = Overview()
    for i in range(len(store)):
        try:
            shape, caption = store.shape(i), store.caption(i)
        except SampleError:
            found.broken += 1
            continue
        found.shapes[i] = shape
        if caption is not None:
            found.captions[i] = caption
    return found


def spread_over(shapes: dict[int, tuple[int, ...]], num: int) -> list[int]:
    """So many samples, ascending: from each size about equally many, and evenly spread over those of a size."""
    buckets: dict[tuple[int, ...], list[int]] = {}
    for i, shape in shapes.items():
        buckets.setdefault(shape, []).append(i)
    left = min(num, len(shapes))
    chosen: list[int] = []
    # The smallest first: what it cannot give, the larger ones do. Of more buckets than samples the largest are shown.
    ranked = sorted(buckets.values(), key=len)[-left:] if left else []
    for k, bucket in enumerate(ranked):
        share = min(len(bucket), left // (len(ranked) - k))
        chosen += [bucket[(2 * j + 1) * len(bucket) // (2 * share)] for j in range(share)]
        left -= share
    return sorted(chosen)


def distributions(found: Overview, compression: tuple[int, int] | None = None) -> Iterator[str]:
    """Of lengths, sizes and captions, as lines.

    Args:
        compression: of the VAE, in time and in space, where it is known: then frames and pixels are told.
    """
    videos = [shape for shape in found.shapes.values() if shape[1]]
    if videos and compression is not None:
        time, space = compression
        yield from _histogram("frames", Counter(((t - 1) * time + 1,) for _, t, _, _ in videos))
        yield from _histogram("height × width", Counter((h * space, w * space) for _, _, h, w in videos))
    elif videos:
        yield from _histogram("latent frames", Counter((t,) for _, t, _, _ in videos))
        yield from _histogram("latent height × width", Counter((h, w) for _, _, h, w in videos))
    yield _captions(found)


def _histogram(title: str, counts: Counter[tuple[int, ...]]) -> Iterator[str]:
    """The most frequent values in their order, with bars; and what is left."""
    shown = sorted(counts.most_common(ROWS))
    rows = [("×".join(map(str, value)), count) for value, count in shown]
    if len(counts) > ROWS:
        rows.append((f"{len(counts) - ROWS} others", counts.total() - sum(count for _, count in shown)))
    width, most = max(len(name) for name, _ in rows), max(count for _, count in rows)
    yield title
    for name, count in rows:
        yield f"  {name:>{width}}  {'█' * max(1, round(BAR * count / most))} {count}"


def _captions(found: Overview) -> str:
    """The lengths of captions, by their quartiles."""
    words = sorted(len(caption.split()) for caption in found.captions.values())
    without = len(found.shapes) - len(words)
    if not words:
        return "captions: none"
    least, lower, median, upper, most = _quartiles(words)
    return (
        f"words of a caption: {least} to {most}, half of them {lower} to {upper}, median {median}"
        + f"; {without} samples have no caption" * (without > 0)
    )


def _quartiles(numbers: Sequence[int]) -> list[int]:
    """Least, quartiles and largest of sorted numbers, each one of them."""
    return [numbers[(len(numbers) - 1) * k // 4] for k in range(5)]
