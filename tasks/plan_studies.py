"""What the studies of the parameters take, for the plan: trainings and pictures of all runs."""

from __future__ import annotations

from collections.abc import Mapping

from moe_core.config import Params, StudyConfig, arm_params, parse
from moe_core.config.studies import TEMPLATES
from tasks.plan_costs import Costs, StageCost
from tasks.plan_teacher import Teacher
from tasks.study_arms import ALONE

MODELS = {"shared_expert_kd": "shared", "moe_kd": "L"}
"""Stage -> the plan's name of what it makes; other stages' models are named as their arms."""


def studies(params: Params, teacher: Teacher) -> list[StageCost]:
    """One each."""
    return [_study(params, teacher, name, study) for name, study in params.studies.items()]


def _study(params: Params, teacher: Teacher, name: str, study: StudyConfig) -> StageCost:
    """Each arm is counted with the largest budget, the others in proportion to their steps, validations included."""
    largest = max(study.budgets, key=lambda budget: study.budgets[budget])
    share = sum(study.budgets.values()) / study.budgets[largest]
    memory: Mapping[str, float] = {}
    flops, steps = 0.0, 0
    for arm, own in study.arms.items():
        values = arm_params(params.model_dump(mode="json"), study, arm, largest, study.seeds[0])
        trained = parse(Params, values, f"study, arm {arm}")
        trained = trained.model_copy(update={"compute": trained.compute.model_copy(update=ALONE)})
        costs, model = Costs(trained, teacher), MODELS.get(own.stage, arm)
        config = trained.baselines[arm].kd if own.stage == "baseline" else getattr(trained.kd, TEMPLATES[own.stage])
        training, pictures = (
            costs.distillation(own.stage, config, costs.configs[model]),
            costs.generation(model, benchmarks=False),
        )
        once = training.flops * share + pictures.flops * study.prompts / params.eval.prompts * len(study.budgets)
        flops += once * len(study.seeds)
        steps += own.share * sum(study.budgets.values()) * len(study.seeds)
        memory = max(memory, training.memory, pictures.memory, key=lambda kinds: sum(kinds.values()))
    runs = len(study.arms) * len(study.budgets) * len(study.seeds)
    return StageCost(
        f"study_runs@{name}", f"{runs} trainings, {steps} steps of {study.batch_size}; pictures", flops, memory
    )
