"""Routers of one's own: one whose boundaries are a `TimestepRouter`'s, one of a class of its own, and useless ones."""

from dataclasses import dataclass, field
from itertools import count, pairwise

from moedistill import Router, RouterConfig, Segment, TimestepRouter, hookimpl


@dataclass(kw_only=True)
class HalvesConfig(RouterConfig):
    """Two experts, parted in the middle of the trajectory."""

    upper: str
    lower: str

    def build(self, trajectory):
        return TimestepRouter.from_points(trajectory, [self.upper, self.lower], [trajectory.num_steps // 2])


class Shares(Router):
    """Experts by name, each with the low end of its segment, from high to low noise."""

    def __init__(self, ends, closed="low"):
        self.ends, self.closed = dict(ends), closed
        self.notes = [f"{len(self.ends)} shares"]

    @property
    def segments(self):
        edges = pairwise([1.0, *self.ends.values()])
        return [Segment(name, low, high, self.closed) for name, (high, low) in zip(self.ends, edges, strict=True)]

    def to_dict(self):
        return {"kind": "shares", "ends": self.ends, "closed": self.closed}

    @classmethod
    def from_dict(cls, data):
        return cls(data["ends"], data["closed"])


@dataclass(kw_only=True)
class SharesConfig(RouterConfig):
    """Shares of the trajectory's points, by expert, from high to low noise."""

    points: dict[str, int] = field(default_factory=dict)

    def build(self, trajectory):
        left, ends = trajectory.num_steps, {}
        for expert, share in self.points.items():
            left -= share
            ends[expert] = trajectory.sigma(left)
        return Shares(ends)


class Listed(Shares):
    """Whatever segments it is given."""

    def __init__(self, segments):
        self.listed = segments

    @property
    def segments(self):
        return self.listed

    @classmethod
    def from_dict(cls, data):
        return cls(data["segments"])

    def to_dict(self):
        return {"kind": "timestep"}


class Coin(Shares):
    """A choice that does not keep to the segments."""

    tosses = count()

    def expert_at(self, sigma):
        return list(self.ends)[next(self.tosses) % 2]


class Soft(Shares):
    def expert_at(self, sigma):
        return {"semantic": sigma, "detail": 1 - sigma}


class Unwritten(Shares):
    def to_dict(self):
        return {"kind": "shares", "ends": self.segments, "closed": self.closed}


class Forgetful(Shares):
    @classmethod
    def from_dict(cls, data):
        return cls({"semantic": 0.5, "detail": 0.0})


class Disguised(Shares):
    """Says that it is another kind than it is."""

    def to_dict(self):
        return {**super().to_dict(), "kind": "timestep"}


class Renamed(Shares):
    experts = ("detail", "semantic")


def _listed(*ranges):
    return Listed([Segment(name, low, high, *closed) for name, low, high, *closed in ranges])


ENDS = {"semantic": 0.8, "detail": 0.0}
USELESS = {
    "none": lambda: None,
    "function": lambda: lambda sigma: "semantic",
    "empty": lambda: Listed([]),
    "tuples": lambda: Listed([("semantic", 0.0, 1.0)]),
    "overlap": lambda: _listed(("semantic", 0.5, 1.0), ("detail", 0.0, 0.6)),
    "gap": lambda: _listed(("semantic", 0.9, 1.0), ("detail", 0.0, 0.6)),
    "upside down": lambda: _listed(("detail", 0.0, 0.6), ("semantic", 0.6, 1.0)),
    "closed": lambda: _listed(("semantic", 0.6, 1.0), ("detail", 0.0, 0.6, "high")),
    "low": lambda: _listed(("semantic", 0.9, 1.0), ("detail", 0.7, 0.9)),
    "twice": lambda: _listed(("semantic", 0.8, 1.0), ("semantic", 0.0, 0.8)),
    "pointless": lambda: _listed(("semantic", 0.999, 1.0), ("detail", 0.998, 0.999), ("late", 0.0, 0.998)),
    "coin": lambda: Coin(ENDS),
    "soft": lambda: Soft(ENDS),
    "unwritten": lambda: Unwritten(ENDS),
    "forgetful": lambda: Forgetful(ENDS),
    "disguised": lambda: Disguised(ENDS),
    "renamed": lambda: Renamed(ENDS),
}


@dataclass(kw_only=True)
class UselessConfig(RouterConfig):
    how: str

    def build(self, trajectory):
        return USELESS[self.how]()


@dataclass(kw_only=True)
class DrawnConfig(RouterConfig):
    """Other boundaries each time."""

    drawn = count(1)

    def build(self, trajectory):
        return TimestepRouter.from_points(trajectory, ["semantic", "detail"], [1 + next(self.drawn) % 5])


@hookimpl
def register_components(components):
    components.register("router", "halves", HalvesConfig, "parted in the middle")
    components.register("router", "shares", SharesConfig, "by numbers of points")
    components.register("router", "useless", UselessConfig, "no routers")
    components.register("router", "drawn", DrawnConfig, "by chance")
