"""How much each FFN segment (eq. 6) and each block (Fig. 3) matters to the dense teacher, over a calibration set.

- A segment is row i of W1, b1[i] and column i of W2. Its score is the sum over them of |gradient x weight|, taken
  per sample before anything is summed: the mean gradient of a well-trained model is near 0 where the gradients of
  its samples are not.
- Per-sample gradients come from one backward pass: of a linear layer with inputs X_b and output gradients dY_b,
  sample b's is dY_b^T X_b. They are made, used and dropped layer by layer, a few samples at a time, while the pass
  runs; weights get no gradient of their own.
- The same forward pass gives each block's change of its input, the conditioning vectors, from which AdaLN is
  compressed, and tokens of every FFN, to which MoE layers are fitted.
- Sums are float64 and can be added up over workers; rows and vectors are to be joined.

Shapes: B batch, T tokens, D width, F hidden width of the FFN, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_core import losses
from moe_core.capture import block_names
from moe_core.distill import KDBatch, predict

CHUNK_ELEMENTS = 2**26
"""Elements of per-sample gradients held at once: 256 MB in float32, one sample of a FLUX.1 FFN matrix and a bit."""


class _FFN(NamedTuple):
    """The two linear layers of an FFN; `first_column`: where W2 begins in the second one's columns."""

    up: nn.Linear
    down: nn.Linear
    first_column: int


class ImportanceAccumulator:
    """Collects scores, block changes and conditioning vectors, batch by batch.

    `state` holds float64 sums: `samples`, `loss` (flow-matching loss, summed over samples), and for each FFN its
    scores [F] under its name. The states of several workers may be added up. `rows` has a dict a sample: `key`,
    `sigma`, and by block, in the order of `blocks`, `relative` (||out - in||^2 / ||in||^2 over both streams) and
    `mse` (mean squared difference of out and in).
    """

    def __init__(self, teacher: nn.Module, tokens_per_sample: int = 0, seed: int = 0):
        """tokens_per_sample: how many each FFN keeps of a sample, or all that it has; which ones, (seed, number of the sample) says."""
        self.teacher = teacher
        self._tokens_per_sample, self._seed = tokens_per_sample, seed
        self._numbers: range = range(0)
        self._tokens: dict[str, list[Tensor]] = {}
        self.blocks = block_names(teacher)
        self.rows: list[dict[str, Any]] = []
        self._ffns = dict(_ffns(teacher))
        self._conditioning: list[Tensor] = []
        self.state: dict[str, Tensor] = {
            "samples": torch.zeros((), dtype=torch.float64),
            "loss": torch.zeros((), dtype=torch.float64),
            **{name: torch.zeros(ffn.up.out_features, dtype=torch.float64) for name, ffn in self._ffns.items()},
        }

    def update(self, batch: KDBatch, keys: Sequence[str] | None = None, number: int | None = None) -> None:
        """Adds a batch. `keys` name its samples in `rows`; by default they are numbered. `number`: that of its first sample in the calibration set,
        by default so many as came before."""
        first = len(self.rows)
        number = first if number is None else number
        self._numbers = range(number, number + len(batch))
        relative_LB, mse_LB = self.add_sums(batch)
        for sample in range(len(batch)):
            self.rows.append(
                {
                    "key": keys[sample] if keys is not None else str(first + sample),
                    "sigma": float(batch.sigma[sample]),
                    "relative": relative_LB[:, sample].tolist(),
                    "mse": mse_LB[:, sample].tolist(),
                }
            )

    def add_sums(self, batch: KDBatch) -> tuple[Tensor, Tensor]:
        """Adds a batch to the sums; returns its samples' block changes, relative and mean squared: [L, B] each.

        This is all the arithmetic, and nothing in it waits for a value: it can be run on fake tensors.
        """
        changes: dict[str, tuple[Tensor, Tensor]] = {}
        noisy = batch.noisy.requires_grad_()  # the one leaf: it carries the gradient through every layer
        with torch.enable_grad(), _frozen(self.teacher), self._hooks(changes):
            answer = predict(self.teacher, batch, noisy)
            loss_B = losses.distill_loss(answer, batch.target)
            # Summed, not averaged: samples do not meet in the model, so this one pass has every sample's own gradient.
            torch.autograd.grad(loss_B.sum(), noisy)
        self.state["loss"] += loss_B.detach().double().sum().cpu()
        self.state["samples"] += len(batch)
        relative_LB, mse_LB = (torch.stack([changes[name][i] for name in self.blocks]).double().cpu() for i in (0, 1))
        return relative_LB, mse_LB

    def scores(self) -> dict[str, Tensor]:
        """FFN name -> score of each segment, float64 [F]. Names: `transformer_blocks.3.ff`,
        `transformer_blocks.3.ff_context`, `single_transformer_blocks.7.moe`."""
        return {name: self.state[name].clone() for name in self._ffns}

    def conditioning_vectors(self) -> Tensor:
        """The conditioning of every sample (`temb`, before AdaLN's SiLU): [N, D]."""
        if not self._conditioning:
            raise ValueError("no batch has been added, so there are no conditioning vectors")
        return torch.cat(self._conditioning)

    def tokens(self) -> dict[str, Tensor]:
        """FFN name -> the inputs that were kept of it, [N, D] in the teacher's precision."""
        return {name: torch.cat(found) for name, found in self._tokens.items()}

    @contextmanager
    def _hooks(self, changes: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
        handles = [
            self.teacher.get_submodule(name).register_forward_hook(_change_hook(changes, name), with_kwargs=True)
            for name in self.blocks
        ]
        handles.append(self.teacher.get_submodule("time_text_embed").register_forward_hook(self._keep_conditioning))
        for name, ffn in self._ffns.items():
            handles.append(ffn.up.register_forward_hook(self._gradient_hook(name, _score_up)))
            if self._tokens_per_sample:
                handles.append(ffn.up.register_forward_hook(self._token_hook(name)))
            handles.append(ffn.down.register_forward_hook(self._gradient_hook(name, _score_down, ffn.first_column)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep_conditioning(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._conditioning.append(output.detach().cpu())

    def _token_hook(self, name: str) -> Any:
        def hook(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            inputs_BTD = args[0].detach()
            there = inputs_BTD.shape[1]
            count = min(self._tokens_per_sample, there)
            # Imported here: `noise` brings pydantic, which a machine that only measures may lack (`make bench-gpu`).
            from moe_core import noise

            # Every sample has a permutation of its tokens, of which the first count.
            chosen = [noise.sample_index(self._seed, range(n * there, n * there + count), there) for n in self._numbers]
            index_BT1 = torch.tensor(chosen, device=inputs_BTD.device).unsqueeze(-1)
            kept_BTD = inputs_BTD.gather(1, index_BT1.expand(-1, -1, inputs_BTD.shape[2]))
            self._tokens.setdefault(name, []).append(kept_BTD.flatten(0, 1).to(module.weight.dtype).cpu())

        return hook

    def _gradient_hook(self, name: str, score: Callable[..., Tensor], *extra: int) -> Any:
        def forward_hook(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            inputs_BTI = args[0].detach()

            def on_gradient(gradient_BTO: Tensor) -> None:
                self.state[name] += score(module, inputs_BTI, gradient_BTO, *extra).cpu()

            output.register_hook(on_gradient)

        return forward_hook


def taylor_scores(teacher: nn.Module, batches: Iterable[KDBatch]) -> dict[str, Tensor]:
    """Eq. 6 summed over segments and samples, see `ImportanceAccumulator.scores`."""
    accumulator = ImportanceAccumulator(teacher)
    for batch in batches:
        accumulator.update(batch)
    return accumulator.scores()


def block_change(blocks: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Block name -> mean over samples of `relative` and `mse`.

    Raises ValueError where there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to average; the calibration set must have at least one sample")
    relative_L, mse_L = (
        torch.tensor([row[kind] for row in rows], dtype=torch.float64).mean(0).tolist() for kind in ("relative", "mse")
    )
    return {name: {"relative": relative_L[i], "mse": mse_L[i]} for i, name in enumerate(blocks)}


def _ffns(teacher: nn.Module) -> Iterator[tuple[str, _FFN]]:
    """The FFNs of a dense FLUX transformer, in order, under the names that they have in the sparse one."""
    for name in block_names(teacher):
        block: Any = teacher.get_submodule(name)
        if name.startswith("single_"):
            width = block.proj_out.out_features
            yield f"{name}.moe", _FFN(block.proj_mlp, block.proj_out, width)
        else:
            yield f"{name}.ff", _FFN(block.ff.net[0].proj, block.ff.net[2], 0)
            yield f"{name}.ff_context", _FFN(block.ff_context.net[0].proj, block.ff_context.net[2], 0)


def _score_up(linear: nn.Linear, inputs_BTD: Tensor, gradient_BTF: Tensor) -> Tensor:
    """Rows of W1 and elements of b1: float64 [F]."""
    score_F = _matrix_score(gradient_BTF, inputs_BTD, linear.weight, over=2)
    if linear.bias is not None:
        score_F += (_wide(gradient_BTF).sum(1) * _wide(linear.bias)).abs().double().sum(0)
    return score_F


def _score_down(linear: nn.Linear, inputs_BTI: Tensor, gradient_BTD: Tensor, first_column: int) -> Tensor:
    """Columns of W2, which are the linear layer's from `first_column` on: float64 [F]."""
    return _matrix_score(gradient_BTD, inputs_BTI[..., first_column:], linear.weight[:, first_column:], over=1)


def _matrix_score(gradient_BTO: Tensor, inputs_BTI: Tensor, weight_OI: Tensor, over: int) -> Tensor:
    """|dY_b^T X_b * W|, summed over samples and over the inputs (`over` = 2; [O]) or the outputs (1; [I]). Float64."""
    weight_OI = _wide(weight_OI)
    step = max(1, CHUNK_ELEMENTS // weight_OI.numel())
    score = torch.zeros(weight_OI.shape[2 - over], dtype=torch.float64, device=weight_OI.device)
    for gradient_bTO, inputs_bTI in zip(gradient_BTO.split(step), inputs_BTI.split(step)):
        gradient_bOI = torch.bmm(_wide(gradient_bTO).transpose(1, 2), _wide(inputs_bTI))
        score += gradient_bOI.mul_(weight_OI).abs_().sum(over).double().sum(0)
    return score


def _change_hook(changes: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: losses.Feature) -> None:
        # By position under gradient checkpointing, by name otherwise.
        image, text = args[:2] if args else (kwargs["hidden_states"], kwargs["encoder_hidden_states"])
        before = (text.detach(), image.detach())
        after = (output[0].detach(), output[1].detach())
        mse_B = losses.feature_loss(after, before)
        elements = sum(stream[0].numel() for stream in before)
        changes[name] = (mse_B * elements / losses.feature_norm(before).square(), mse_B)

    return hook


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of weights inside; as it was, outside."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
