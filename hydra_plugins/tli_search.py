"""The sweeper `hydra/sweeper=optuna`: Hydra takes one from this folder alone. What it does stands in src/search.py."""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper


class SearchSweeper(Sweeper):
    """Found at every start of the command, so it imports nothing heavy."""

    def __init__(self, **_: Any) -> None:  # the search was planned from the config by now
        super().__init__()

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:  # noqa: ARG002 (Hydra names its arguments)
        from src import search, sweep

        begun = sweep.under_way()
        assert self.launcher and begun.search
        search.run(begun.search, begun.store, self.launcher.launch, sweep.write)
