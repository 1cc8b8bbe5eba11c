"""The training loop: step, log, evaluate, save, stop and go on. It sees a task through its methods only."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.config import Config
from vlm.data.batch import Batch
from vlm.errors import UserError
from vlm.memory import release_freed_memory
from vlm.tasks.task import Task
from vlm.train import state as saved_state
from vlm.train.accumulation import arguments
from vlm.train.averaging import Averaging
from vlm.train.compiling import compile_parts, uncompiled
from vlm.train.cost import Cost
from vlm.train.distributed import Ranks
from vlm.train.feeding import TrainingLoader, batches_from, leaving_together
from vlm.train.finite import HINT, FiniteSteps, weights_are_finite
from vlm.train.meter import Meter
from vlm.train.optimizer import build_optimizer, optimizer_state, schedule
from vlm.train.precision import Precision
from vlm.train.report import Clock, number, say, training_line
from vlm.train.resuming import forget_evaluations, restore
from vlm.train.sharding import Sharding, total_norm
from vlm.train.stopping import StoppedOnRequest as StoppedOnRequest
from vlm.train.stopping import StopRequest
from vlm.train.trackers import RunLog


class Trainer:
    """Trains `task` as `config` says.

    evaluate: scores of the validation splits, with the value that selects the best checkpoint, None where none of them has it; it calls `leave` now
    and then. save: writes a checkpoint folder, the training state in it unless it is None. Both are given by the caller, who knows about tokenizers
    and files. order: what the order of the samples depends on (`vlm.train.data_order`); None where nobody asks.
    """

    def __init__(
        self,
        task: Task,
        loader: TrainingLoader,
        config: Config,
        ranks: Ranks,
        evaluate: Callable[[Task], tuple[dict[str, Any], float | None]] | None,
        save: Callable[[str, nn.Module, dict[str, Any], dict[str, Any] | None], Path],
        order: dict[str, Any] | None = None,
    ) -> None:
        self.task = task.to(ranks.device)
        self.loader, self.config, self.ranks = loader, config, ranks
        self._evaluate, self._save, self.order = evaluate, save, order
        self.epoch_steps = loader.steps // config.train.accumulate
        if self.epoch_steps == 0:
            raise UserError(
                f"the training data give {loader.steps} batches an epoch, fewer than train.accumulate={config.train.accumulate}; "
                "use a smaller data.batch_size or more data."
            )
        self.total_steps = max(1, round(config.train.epochs * self.epoch_steps))
        task.prepare(self.epoch_steps)
        self.factor = schedule(config.optimizer, self.total_steps, self.epoch_steps)
        self.sharding = Sharding(task, ranks, config.train.sharding)
        self.averaging = Averaging(task.model, config.train.averaging, self.sharding)
        self.optimizer = build_optimizer(task.model, config.optimizer, task.learned, task.rate_factors)
        self.precision = Precision(config.train.precision, ranks.device)
        if config.train.compile:
            compile_parts(task)
        self.cost = Cost(ranks, config.train.precision)
        self.step = 0
        self.evaluated = 0  # the step of the last evaluation
        self._kept = (0, 0)  # the last step, and the last evaluation, that `latest` holds
        self.finite = FiniteSteps(task.model, self.optimizer, ranks, config.train.max_skipped)
        self.meter = Meter(task.weights)
        self.best: float | None = None
        self.scores: dict[str, Any] = {}
        self.stop = StopRequest()
        self.log: RunLog | None = None

    def fit(self) -> dict[str, Any]:
        """Trains from the present step to the end; the scores of the last evaluation.

        Raises:
            StoppedOnRequest: a signal asked for it; `latest` holds the state.
            UserError: the loss stays not finite, or a file cannot be written.
        """
        with self.stop:
            if self.ranks.main:
                forget_evaluations(Path(self.config.out, "log.jsonl"), self.evaluated)
                self.log = RunLog(self.config, self.step)
            with self.log or nullcontext():
                self._loop()
        return self.scores

    @property
    def finished(self) -> bool:
        """Whether every step is done, and the last one evaluated."""
        return self.step >= self.total_steps and (self._evaluate is None or self.evaluated == self.step)

    def _due(self) -> bool:
        """Whether the present step ends with an evaluation."""
        every = self.config.train.evaluate_every or self.epoch_steps
        return self.step > 0 and (self.step % every == 0 or self.step >= self.total_steps)

    def _loop(self) -> None:
        train = self.config.train
        clock = Clock(self.total_steps, self.step)
        self.task.train()
        batches = self._batches()
        if self._due() and self.evaluated != self.step:
            self.evaluate()  # it was given up, or a request to stop came before it
            self.keep()
        while self.step < self.total_steps:
            micro, waited = self._next(batches)
            self._step(micro, self.meter)
            self.step += 1
            self._check_finite(now=False)
            clock.step(self.config.data.batch_size, waited)
            last = self.step == self.total_steps
            if self.step % train.log_every == 0 or last:
                self._report(clock)
                with leaving_together(self.ranks, self._keep_at_fault):
                    self.loader.check(self.ranks.gather)
                release_freed_memory()  # batches of many sizes leave holes in the heap: it would grow to several times what a step needs
            if last:
                self._check_learned()
            stopping = self.ranks.any(self.stop.made) and not self.finished
            if stopping or self._due() or self.step % train.save_every == 0:
                self.keep()  # before an evaluation, which takes long and may fail
                clock.restart()
            if self._due() and not stopping:
                self.evaluate()
                clock.restart()
                stopping = self.ranks.any(self.stop.made) and not self.finished
                # Else what it found is kept with a later step; a run that goes on from before makes it again, which costs less.
                if stopping or last:
                    self.keep()
            if stopping:
                raise StoppedOnRequest

    def leave(self) -> None:
        """Between the batches of an evaluation, which is given up where someone asked to stop: a run that goes on begins with it. Every rank must
        ask, equally often.

        Raises:
            StoppedOnRequest: on every rank; `latest` holds the step that is evaluated.
        """
        if self.ranks.any(self.stop.made):
            raise StoppedOnRequest

    def _keep_at_fault(self) -> None:
        """Keeps the last step of a run that cannot go on."""
        self.keep()
        if self.step:
            say(
                f"step {self.step} is in {self.config.out}/latest; --resume auto goes on from it once the fault is mended."
            )

    def _check_learned(self) -> None:
        """At the end of a run that has fewer steps than may be skipped in a row."""
        if self.finite.skipped >= self.total_steps:
            raise UserError(
                f"none of the {self.total_steps} steps could be made, as the loss or its gradient was never a finite number: nothing was learned; "
                f"log.jsonl has the keys of the images. {HINT}"
            )

    def _batches(self) -> Iterator[Batch]:
        return batches_from(self.loader, self.step, self.epoch_steps, self.config.train.accumulate, self.ranks)

    def _next(self, batches: Iterator[Batch]) -> tuple[list[Batch], float]:
        start = time.perf_counter()
        with leaving_together(self.ranks, self._keep_at_fault):
            micro = [next(batches) for _ in range(self.config.train.accumulate)]
            waited = time.perf_counter() - start
        return [batch.to(self.ranks.device) for batch in micro], waited

    def _step(self, micro: list[Batch], meter: Meter) -> None:
        """One optimizer step over micro-batches, or none where it is not finite."""
        self.finite.begin()
        factor = self.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * group["factor"] * factor
        names = list(self.task.weights)
        counted = [self.task.counts(batch) for batch in micro]
        totals = self.ranks.sum(
            torch.stack(
                [sum((c[n].float() for c in counted), torch.zeros((), device=self.ranks.device)) for n in names]
            )
        )
        divisors = torch.where(totals > 0, totals, torch.ones_like(totals))
        for index, given in enumerate(arguments(self.task, micro, self.precision.autocast)):
            with self.sharding.no_sync(last=index == len(micro) - 1), self.cost.counting(len(micro[index])):
                with self.precision.autocast(), self.cost.forward():
                    losses = self.sharding.module(*given)
                # DDP averages gradients over ranks, so the sum over ranks needs the factor `world`.
                total = sum(
                    (self.task.weights[n] * self.ranks.world / divisors[i]) * losses[n].sum for i, n in enumerate(names)
                )
                with self.cost.backward():
                    self.precision.scaled(total).backward()  # type: ignore[arg-type]
            meter.add(losses, micro[index])
        self.sharding.reduce()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        mendable = self.precision.unscale(self.optimizer)
        clip = self.config.optimizer.clip
        norm = total_norm(torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else float("inf")))
        finite = meter.finite()
        taken = self.finite.decide(self.step + 1, norm.isfinite() & finite, micro, mendable & finite)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(taken)
        self.averaging.update(self.task.model, taken)
        meter.settle(taken, norm)
        self.precision.settle(self.optimizer, taken)

    def _check_finite(self, now: bool = True) -> None:
        self.finite.check(self.log, lambda: self.save("latest", with_state=True), now)

    def _report(self, clock: Clock) -> None:
        self._check_finite()
        values = self.meter.take(self.ranks)
        if not values:
            return
        values["skipped"] = self.finite.skipped
        values |= clock.interval()
        values |= self.cost.figures(values["samples_per_second"])
        values["lr"] = self.config.optimizer.lr * self.factor(self.step - 1)
        values["temperature"] = float(self.task.model.temperature.detach())
        if self.log is None:
            return
        epoch = self.step / self.epoch_steps
        self.log.write(kind="train", step=self.step, epoch=epoch, **values)
        say(training_line(self.step, self.total_steps, epoch, self.task.weights, values))

    def try_step(self, micro: list[Batch]) -> list[str]:
        """One step, for a dry run: its losses, and its time."""
        meter = Meter(self.task.weights)
        start = time.perf_counter()
        self.task.train()
        self._step([batch.to(self.ranks.device) for batch in micro], meter)
        values = meter.take(self.ranks)
        lines = ["one step: " + ", ".join(f"{name} {number(value)}" for name, value in values.items())]
        lines.append(f"it took {time.perf_counter() - start:.2f} s (the first one is slower)")
        return lines

    def evaluate(self) -> None:
        """Scores of the validation splits; a new best is saved."""
        if self._evaluate is None:
            return
        self._check_finite()
        with self.averaging.applied(self.task), self.precision.autocast(), uncompiled():
            self.task.eval()
            scores, value = self._evaluate(self.task)
        self.task.train()
        self.scores, self.evaluated = scores, self.step
        improved = value is not None and (self.best is None or value > self.best)
        if self.log is not None:
            self.log.write(kind="evaluation", step=self.step, scores=scores, selects=value, best=improved)
        if improved:
            self.best = value
            self.save("best", with_state=False)

    def keep(self) -> None:
        """Saves `latest` with the state, unless that is what it holds; every rank must ask. Raises as `save`."""
        if self._kept != (self.step, self.evaluated):
            self.save("latest", with_state=True)

    def save(self, name: str, with_state: bool) -> None:
        """Writes the checkpoint folder `name` of the run; every rank must ask.

        Raises:
            UserError: it cannot be written (what was there stays), or the weights are not finite.
        """
        self._check_finite()
        if not weights_are_finite(self.task.model, self.ranks):
            raise UserError(f"step {self.step}: the weights are not finite numbers; {name} stays as it was. {HINT}")
        state = (
            saved_state.set_aside(self.state(), Path(self.config.out, f".{name}"), self.ranks) if with_state else None
        )
        model = self.averaging.best(self.task.model)
        failure: UserError | None = None
        if self.ranks.main:
            try:
                self._save(name, model, self.scores, state)
            except UserError as error:
                failure = error
        if self.ranks.any(failure is not None):
            raise failure or UserError(f"{name} could not be saved; the first rank says why.")
        if with_state:
            self._kept = (self.step, self.evaluated)

    def state(self) -> dict[str, Any]:
        """Everything that going on needs beside the settings; every rank must ask, as each has random numbers of its own."""
        averaged = self.averaging.averaged
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "order": self.order,
            "best": self.best,
            "evaluated": self.evaluated,
            "model": self.task.model.state_dict(),
            "averaged": None if averaged is None else averaged.state_dict(),
            "optimizer": optimizer_state(self.task.model, self.optimizer, self.task.learned),
            "task": self.task.training_state(),
            "random": self.ranks.gather([saved_state.random_state(self.ranks.device)]),
            "scores": self.scores,
            "finite": self.finite.state(),
            "precision": self.precision.state(),
            "operations": self.cost.per_sample,  # counted once, as what counts runs uncompiled
            "meter": self.ranks.gather([self.meter.state()]),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; every rank must ask. Raises UserError where it belongs to another run."""
        restore(self, state)
        self._kept = (self.step, self.evaluated)
