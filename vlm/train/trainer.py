"""The training loop: step, log, evaluate, save, stop and go on. It sees a task through its methods only."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

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
from vlm.train.finite import HINT, FiniteSteps, weights_are_finite
from vlm.train.meter import Meter
from vlm.train.optimizer import build_optimizer, load_optimizer_state, optimizer_state, schedule
from vlm.train.precision import Precision
from vlm.train.report import Clock, number, say, training_line
from vlm.train.sharding import Sharding, total_norm
from vlm.train.stopping import StopRequest
from vlm.train.trackers import RunLog


class TrainingLoader(Protocol):
    """What the loop needs of the data: `steps` batches an epoch, readable from any step to any other."""

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        ...

    def iterate(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """The epoch's batches from one step to before another."""
        ...

    def check(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        """Raises UserError on all ranks where too many of their samples are bad."""
        ...


class StoppedOnRequest(Exception):
    """SIGTERM, SIGUSR1 or Ctrl-C: the state is saved."""


class Trainer:
    """Trains `task` as `config` says.

    evaluate: scores of the validation splits, with the value that selects the best checkpoint. save: writes a checkpoint folder, the training state
    in it unless it is None. Both are given by the caller, who knows about tokenizers and files.
    """

    def __init__(
        self,
        task: Task,
        loader: TrainingLoader,
        config: Config,
        ranks: Ranks,
        evaluate: Callable[[Task], tuple[dict[str, Any], float]] | None,
        save: Callable[[str, nn.Module, dict[str, Any], dict[str, Any] | None], Path],
    ) -> None:
        self.task = task.to(ranks.device)
        self.loader, self.config, self.ranks = loader, config, ranks
        self._evaluate, self._save = evaluate, save
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
        if self.ranks.main:
            self.log = RunLog(self.config, self.step)
        with self.stop, self.log or nullcontext():
            self._loop()
        return self.scores

    def _loop(self) -> None:
        train = self.config.train
        every = train.evaluate_every or self.epoch_steps
        clock = Clock(self.total_steps, self.step)
        self.task.train()
        batches = self._batches()
        if self.step and self.step % every == 0 and self.evaluated != self.step:
            self.evaluate()  # a request to stop came before it
        while self.step < self.total_steps:
            micro, waited = self._next(batches)
            self._step(micro, self.meter)
            self.step += 1
            self._check_finite(now=False)
            clock.step(self.config.data.batch_size, waited)
            last = self.step == self.total_steps
            due = last or self.step % every == 0
            if self.step % train.log_every == 0 or last:
                self._report(clock)
                self.loader.check(self.ranks.gather)
                release_freed_memory()  # batches of many sizes leave holes in the heap: it would grow to several times what a step needs
            stopping = self.ranks.any(self.stop.made) and not last
            if due and not stopping:
                self.evaluate()
                stopping = self.ranks.any(self.stop.made) and not last
            if stopping or due or self.step % train.save_every == 0:
                self.save("latest", with_state=True)
                clock.restart()
            if stopping:
                raise StoppedOnRequest

    def _batches(self) -> Iterator[Batch]:
        """All batches to the end of training, epoch after epoch, from the present step on."""
        accumulate = self.config.train.accumulate
        step = self.step
        while True:
            epoch, start = divmod(step, self.epoch_steps)
            yield from self.loader.iterate(epoch, start * accumulate, self.epoch_steps * accumulate)
            self.loader.check(self.ranks.gather)  # an epoch may end without a line of the log
            step = (epoch + 1) * self.epoch_steps

    def _next(self, batches: Iterator[Batch]) -> tuple[list[Batch], float]:
        start = time.perf_counter()
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
        improved = self.best is None or value > self.best
        if self.log is not None:
            self.log.write(kind="evaluation", step=self.step, scores=scores, selects=value, best=improved)
        if improved:
            self.best = value
            self.save("best", with_state=False)

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

    def state(self) -> dict[str, Any]:
        """Everything that going on needs beside the settings; every rank must ask, as each has random numbers of its own."""
        averaged = self.averaging.averaged
        return {
            "step": self.step,
            "total_steps": self.total_steps,
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
        """Goes on from `state`.

        Raises:
            UserError: it belongs to a run of another length or of another model.
        """
        same = f"resume with the settings that it was started with ({self.config.out}/config.yaml), or start anew into another --out."
        if state["total_steps"] != self.total_steps:
            raise UserError(
                f"the saved run has {state['total_steps']} steps in all, but these settings and data give {self.total_steps}; {same}"
            )
        try:
            state = saved_state.fitted(state, self.task, self.averaging.averaged)
            self.task.model.load_state_dict(state["model"])
            if self.averaging.averaged is not None and state["averaged"] is not None:
                self.averaging.averaged.load_state_dict(state["averaged"])
            load_optimizer_state(self.task.model, self.optimizer, state["optimizer"], self.task.learned)
            self.task.load_training_state(state["task"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the saved run does not fit these settings ({reason}); {same}") from None
        saved_state.restore_random_state(state["random"], self.ranks.rank, self.ranks.world, self.ranks.device)
        self.step, self.best, self.scores = state["step"], state["best"], state["scores"]
        self.evaluated = state.get("evaluated", self.step)
        self.precision.load_state(state.get("precision", {}))
        self.cost.per_sample = state.get("operations")
        if "finite" in state:  # an older run's state has neither
            self.finite.load_state(state["finite"])
            if len(state["meter"]) == self.ranks.world:
                self.meter.load_state(state["meter"][self.ranks.rank], self.ranks.device)
