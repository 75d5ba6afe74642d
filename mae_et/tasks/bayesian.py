"""The Bayesian search: Optuna suggests curricula of equal cost and stops those that fall behind.

Several processes take trials from one study in the folder of the search. What is suggested follows from the seed, the number
of the trial and the results before it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mae_et.curriculum.search.space import curriculum_of, full_size_trial, suggestions, whole_trial
from mae_et.curriculum.search.trial import Found, Space, margin_of_noise
from mae_et.engine.distributed import World
from mae_et.errors import UserError
from mae_et.tasks.trials import SECONDS_BETWEEN_LOOKS, TrialRunner, drop_checkpoints

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

STORAGE = "study.log"
NUM_RANDOM_TRIALS = 8  # before the sampler follows a model and the pruner prunes


def import_optuna() -> Any:
    """Imports Optuna.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            f"algorithm = 'bayesian' needs optuna, which cannot be imported ({error}): pip install 'mae_et[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class BayesianSearch:
    """Takes trials from a study until it has as many as asked for.

    Args:
        runner: of the trials.
        space: what to choose from.
        world: of one process.
    Raises:
        UserError: if Optuna is missing, or its storage cannot be written.
    """

    def __init__(self, runner: TrialRunner, space: Space, world: World) -> None:
        self.runner, self.space, self.world = runner, space, world
        self.settings = runner.settings
        has_strength = runner.config.data.augmentation.ramp != "none"
        self.ranges = suggestions(space, has_strength)
        self.optuna = import_optuna()
        self.study = self._open_study()

    def search(self) -> Found:
        """Returns the best curriculum. The other processes of the search return the same."""
        baseline = self.runner.run_all(
            [full_size_trial(self.space, seed) for seed in self.space.noise_seeds], self.world
        )
        reference = [record.score for record in baseline.values()]
        while (claimed := self._claim()) is not None:
            with claimed as trial:
                if trial is not None:
                    self._run(trial)
            if trial is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        return self._choose(reference)

    def _open_study(self) -> optuna.Study:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        path = self.runner.work_dir / STORAGE
        try:
            with path.open("a"):
                pass
            storage = JournalStorage(JournalFileBackend(str(path)))
            return self.optuna.create_study(
                storage=storage,
                study_name="curriculum",
                direction="maximize",
                load_if_exists=True,
                pruner=self.optuna.pruners.MedianPruner(
                    # The first half is left alone: small bandwidths score low at full size until they have grown.
                    n_startup_trials=NUM_RANDOM_TRIALS,
                    n_warmup_steps=math.ceil(self.settings.stages / 2) - 1,
                ),
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"the study in {path} cannot be opened: {error}. Choose a --work-dir that can be written, or remove the file to "
                "start the study again"
            ) from error

    def _sampler(self, number: int) -> Any:
        seed = self.space.seeds[0] * 100_003 + number
        if self.settings.sampler == "gp":
            return self.optuna.samplers.GPSampler(seed=seed, n_startup_trials=NUM_RANDOM_TRIALS)
        # Multivariate: shares and bandwidths act together. Constant liar: processes do not suggest the same.
        return self.optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=NUM_RANDOM_TRIALS, multivariate=True, constant_liar=True
        )

    def _claim(self) -> contextlib.AbstractContextManager[optuna.Trial | None] | None:
        """Returns a context that holds the lock of a trial and yields it; None in it: wait; None: all trials are done.

        A trial that a killed process left is taken before a new one is asked for.
        """
        states = self.optuna.trial.TrialState
        with self.runner.lock("study", timeout=600) as is_ours:
            if not is_ours:
                raise UserError(f"another process holds the lock of the study in {self.runner.work_dir} for 10 minutes")
            trials = self.study.get_trials(deepcopy=False)
            running = [trial for trial in trials if trial.state == states.RUNNING]
            for frozen in running:
                if (held := self._hold(frozen.number)) is not None:
                    if self.study.get_trials(deepcopy=False)[frozen.number].state != states.RUNNING:
                        held.close()  # its process ended it after `trials` was read
                        continue
                    self.study.sampler = self._sampler(frozen.number)
                    trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
                    return self._held(held, self._suggested(trial))
            if len(trials) < self.settings.trials:
                self.study.sampler = self._sampler(len(trials))
                trial = self.study.ask()
                held = self._hold(trial.number)
                assert held is not None  # nobody knows the number yet
                return self._held(held, self._suggested(trial))
            return contextlib.nullcontext(None) if running else None

    def _hold(self, number: int) -> contextlib.ExitStack | None:
        stack = contextlib.ExitStack()
        if stack.enter_context(self.runner.lock(_name(number))):
            return stack
        stack.close()
        return None

    @staticmethod
    @contextlib.contextmanager
    def _held(stack: contextlib.ExitStack, trial: optuna.Trial) -> Iterator[optuna.Trial]:
        with stack:
            yield trial

    def _suggested(self, trial: optuna.Trial) -> optuna.Trial:
        for name, (low, high) in self.ranges.items():
            if isinstance(low, int):
                trial.suggest_int(name, low, int(high))
            else:
                trial.suggest_float(name, low, high)
        return trial

    def _run(self, trial: optuna.Trial) -> None:
        """Trains a trial with each seed and tells the study. The first seed decides whether it is pruned."""
        rows = curriculum_of(self.space, trial.params)

        def falls_behind(part: int, score: float) -> bool:
            trial.report(score, part)
            return trial.should_prune()

        scores: list[float] = []
        for seed in self.space.seeds:
            one = whole_trial(self.space, _name(trial.number), rows, seed)
            record = self.runner.run(one, self.world, None if scores else falls_behind)
            drop_checkpoints(self.runner.folder(one))
            if record.status == "pruned":
                self.study.tell(trial.number, state=self.optuna.trial.TrialState.PRUNED)
                return
            scores.append(record.score)
        self.study.tell(trial.number, statistics.fmean(scores))

    def _choose(self, reference: list[float]) -> Found:
        """Returns the best trial, or among ties the one with the smallest mean bandwidth over the compute.

        The runs at full size, which measured the noise, take part. The rule for ties is this project's.
        """
        done = [one for one in self.study.get_trials() if one.state == self.optuna.trial.TrialState.COMPLETE]
        full = full_size_trial(self.space, self.space.seeds[0])
        noise = statistics.stdev(reference)
        margin = margin_of_noise(noise, len(self.space.seeds), len(self.space.seeds))
        found = [("full-size", statistics.fmean(reference), full.rows)] + [
            (_name(one.number), float(one.value or 0.0), curriculum_of(self.space, one.params)) for one in done
        ]
        best = max(found, key=lambda one: one[1])
        tied = [one for one in found if one[1] >= best[1] - margin]
        chosen = min(tied, key=lambda one: (sum(row.compute_fraction * row.bandwidth for row in one[2]), one[0]))
        tie = f"{len(tied)} tie with the best ({best[0]}, {best[1]:.5g}) within the margin {margin:.3g}: the one with the " \
            "smallest mean bandwidth is chosen"  # fmt: skip
        alone = f"{best[0]} is best by more than the margin {margin:.3g}"
        against = (
            f"its score {chosen[1]:.5g} against {statistics.fmean(reference):.5g} at full size for the same compute"
        )
        return Found(
            rows=chosen[2],
            equivalent_epochs=self.space.equivalent_epochs,
            noise=noise,
            margin=margin,
            decisions=(),
            trials=tuple(f"{chosen[0]}_seed{seed}" for seed in self.space.seeds),
            why=f"{alone if len(tied) == 1 else tie}; {against}",
        )


def _name(number: int) -> str:
    return f"trial-{number:04d}"
