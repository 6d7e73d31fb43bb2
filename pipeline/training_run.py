"""The steps of a run on disk: records, evaluations, checkpoints, the best student, in an order no kill can spoil."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

from pipeline.evaluation import HeldOut
from pipeline.evaluations import Evaluations
from pipeline.progress import progress_bar
from pipeline.run_record import RunRecord
from pipeline.students import save_best
from pipeline.trackers import Trackers
from workers.distill.checkpoint import save_checkpoint
from workers.distill.train import NotFiniteStepError, Training


@dataclass
class TrainingRun:
    """A run between its beginning and its summary. Every method is collective."""

    training: Training
    record: RunRecord
    held_out: HeldOut | None
    evaluations: Evaluations
    trackers: Trackers

    def train(self, is_asked_to_stop: Callable[[], bool]) -> int:
        """To the last step, or to where the run is asked to stop or evaluations improve no more.

        Returns:
            The steps done, after which there is a checkpoint.

        Raises:
            InputError: the loss or its gradient is not finite; there is a checkpoint of the steps before.
        """
        training, ranks, done = self.training, self.training.ranks, self.training.first_step
        with ExitStack() as opened:
            metrics = ranks.together(
                lambda: opened.enter_context(self.record.open_metrics(done)) if ranks.is_first else None
            )
            progress = opened.enter_context(progress_bar("distilling", shown=ranks.is_first))
            steps = training.steps(is_asked_to_stop)
            try:
                while not self.evaluations.are_over and (step := next(steps, None)):
                    done = step["step"]
                    self._note(step, metrics)
                    if done % training.config.checkpoint_every == 0:
                        self._checkpoint(done, metrics)
                    progress(done, training.num_steps)
            except NotFiniteStepError as error:
                self._checkpoint(done, metrics)
                ranks.refuse(error)
            self._checkpoint(done, metrics)
        return done

    def evaluate(self) -> dict[str, Any] | None:
        return self.held_out.measure(self.training.engine.measure) if self.held_out else None

    def _note(self, step: dict[str, Any], metrics: IO[str] | None) -> None:
        """Evaluate where it is time to, and write the step down."""
        training, done, every = self.training, step["step"], self.training.config.eval_every
        if every and done % every == 0 and done < training.num_steps and (measured := self.evaluate()):
            step["eval"] = measured
            if self.evaluations.add(done, measured):
                save_best(training, self.record, done)
        if metrics:
            self.record.append(metrics, step)
        self.trackers.log(step)

    def _checkpoint(self, done: int, metrics: IO[str] | None) -> None:
        """Of a run that has begun; students that a resumed run will not look back at go."""
        training = self.training
        if done:
            if metrics:
                self.record.secure(metrics)
            keep = training.config.keep_checkpoints or 1
            moving = training.curriculum.moving
            save_checkpoint(self.record.run_dir, done, training.engine, moving, training.ranks, keep=keep)
            training.ranks.from_first(lambda: self.record.keep_best(self.evaluations.best_step))
