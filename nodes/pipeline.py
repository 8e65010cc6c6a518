"""What travels between the stage nodes. Knows no host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqai_core.config import LEVELS, Config, preset
from tqai_core.errors import TqaiError
from tqai_core.registry import build, names

NONE = "none"


@dataclass(frozen=True)
class Pipeline:
    """The stages as specs, without a level: that one is chosen where the pipeline meets a model."""

    scorer: str | None = None
    strategy: str | None = None
    monitor: str | None = None
    codec: str | None = None
    skip_layers: tuple[int | str, ...] = ()
    half_size: float = 0.0

    @staticmethod
    def of(config: Config) -> Pipeline:
        return Pipeline(config.scorer, config.strategy, config.monitor, config.codec, config.skip_layers, config.half_size)

    def with_stage(self, role: str, choice: Mapping[str, Any] | None) -> Pipeline:
        """``choice`` is what a dynamic combo gives: the method's name under the role, its options beside it. The host gives
        None for a name that the combo does not have."""
        if choice is None or role not in choice:
            raise TqaiError(f"this {role} is unknown here: choose one of {', '.join(names(role))}")
        name, options = choice[role], {key: value for key, value in choice.items() if key != role}
        spec = None if name == NONE else build(role, {"name": name, **options}).spec
        return dataclasses.replace(self, **{role: spec})

    def config(self, level: str) -> Config:
        """Raises ValueError where a stage does not work at ``level``."""
        return Config(self.scorer, self.strategy, self.monitor, self.codec, level, self.skip_layers, half_size=self.half_size)

    def to_json(self) -> str:
        """JSON that ``tqai.Config.from_json`` reads too, at the first level where all stages work."""
        for level in LEVELS:
            try:
                return self.config(level).to_json()
            except ValueError as error:
                why = error
        raise TqaiError(f"no level takes this pipeline: {why}")

    @staticmethod
    def from_json(text: str) -> Pipeline:
        """From :meth:`to_json`, or the pipeline dict people know. ValueError says what is wrong with it."""
        return Pipeline.of(Config.from_json(text))


DEFAULT = Pipeline.of(preset("balanced"))
