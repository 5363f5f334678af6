import pytest
import torch

from moe_core.capture import block_names, record
from moe_core.distill import predict
from tests.moe_core.tiny_flux import SIZES, make_batch, make_student, make_teacher


def test_features_are_the_blocks_outputs_in_order():
    teacher, batch = make_teacher(), make_batch(2)
    with record(teacher) as recording:
        predict(teacher, batch)
    assert list(recording.features) == block_names(teacher)
    assert len(recording.features) == SIZES["num_layers"] + SIZES["num_single_layers"]
    text, image = recording.features["single_transformer_blocks.2"]
    assert text.shape == (2, 3, 16)
    assert image.shape == (2, 4, 16)
    # The last feature is what the model's own head makes its answer from.
    temb = teacher.time_text_embed(batch.sigma * 1000, batch.guidance * 1000, batch.pooled)
    torch.testing.assert_close(teacher.proj_out(teacher.norm_out(image, temb)), predict(teacher, batch))


def test_routings_of_experts_and_blocks_are_recorded():
    student, batch = make_student("mob"), make_batch(5)
    with record(student) as recording:
        predict(student, batch)
    groups = ["transformer_blocks.1.router", "single_transformer_blocks.0.router"]
    assert list(recording.block_routings) == groups
    assert recording.block_routings[groups[0]].probs_Bm.shape == (5, 3)
    inside = [name for name in recording.routings if name.startswith("transformer_blocks.1.") and ".ff." in name]
    # Every sample passed one block of the group, so their routers saw five samples together.
    assert sum(recording.routings[name].probs_TE.shape[0] for name in inside) == 5


def test_only_the_asked_for_features_are_kept():
    teacher = make_teacher()
    with record(teacher, ["transformer_blocks.1"]) as recording:
        predict(teacher, make_batch(1))
    assert list(recording.features) == ["transformer_blocks.1"]


def test_an_unknown_block_is_named():
    with pytest.raises(AttributeError, match="nothing"):
        with record(make_teacher(), ["nothing"]):
            pass


def test_hooks_are_gone_afterwards_also_after_an_error():
    student = make_student("mob")
    with pytest.raises(RuntimeError, match="on purpose"):
        with record(student):
            raise RuntimeError("on purpose")
    assert not any(module._forward_hooks for module in student.modules())


@pytest.mark.parametrize("open_in_backward", [False, True])
def test_gradient_checkpointing_changes_neither_recording_nor_gradients(open_in_backward: bool):
    batch = make_batch(3)
    gradients = []
    for checkpointing in (False, True):
        student = make_student("moe").train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        with record(student) as recording:
            predict(student, batch)
            loss = torch.stack([image.square().sum() + text.sum() for text, image in recording.features.values()]).sum()
            loss = loss + torch.stack([r.probs_TE[..., 0].sum() for r in recording.routings.values()]).sum()
            kept = dict(recording.features)
            if open_in_backward:
                loss.backward()
                assert all(recording.features[name] is feature for name, feature in kept.items())
        if not open_in_backward:
            loss.backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
