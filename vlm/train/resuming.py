"""Going on from a saved state: what of it goes where in a trainer, and what the log says beyond it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import UserError
from vlm.files import replace_text
from vlm.train import state as saved_state
from vlm.train.data_order import check_order
from vlm.train.optimizer import load_optimizer_state
from vlm.train.report import read_json_lines

if TYPE_CHECKING:
    from vlm.train.trainer import Trainer


def restore(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Makes `trainer` go on from `state`, which `Trainer.state` gave. Every rank must ask.

    Raises:
        UserError: it belongs to a run of another order of samples, of another length or of another model.
    """
    task, averaged, ranks, out = trainer.task, trainer.averaging.averaged, trainer.ranks, trainer.config.out
    check_order(state.get("order"), trainer.order, out)
    same = f"resume with the settings that it was started with ({out}/config.yaml), or start anew into another --out."
    if state["total_steps"] != trainer.total_steps:
        raise UserError(
            f"the saved run has {state['total_steps']} steps in all, but these settings and data give {trainer.total_steps}; {same}"
        )
    try:
        state = saved_state.fitted(state, task, averaged)
        task.model.load_state_dict(state["model"])
        if averaged is not None and state["averaged"] is not None:
            averaged.load_state_dict(state["averaged"])
        load_optimizer_state(task.model, trainer.optimizer, state["optimizer"], task.learned)
        task.load_training_state(state["task"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the saved run does not fit these settings ({reason}); {same}") from None
    saved_state.restore_random_state(state["random"], ranks.rank, ranks.world, ranks.device)
    trainer.step, trainer.best, trainer.scores = state["step"], state["best"], state["scores"]
    trainer.evaluated = state.get("evaluated", trainer.step)
    trainer.precision.load_state(state.get("precision", {}))
    trainer.cost.per_sample = state.get("operations")
    if "finite" in state:  # an older run's state has neither
        trainer.finite.load_state(state["finite"])
        if len(state["meter"]) == ranks.world:
            trainer.meter.load_state(state["meter"][ranks.rank], ranks.device)


def forget_evaluations(log: Path, evaluated: int) -> None:
    """Drops from log.jsonl the evaluations after step `evaluated`: the saved state knows nothing of them, so they will be made again.

    Raises:
        UserError: the log cannot be written.
    """
    lines = read_json_lines(log)
    kept = [line for line in lines if line.get("kind") != "evaluation" or line.get("step", 0) <= evaluated]
    if len(kept) < len(lines):
        replace_text(log, "".join(json.dumps(line) + "\n" for line in kept))
