"""A teacher that is given: from a folder or from a hub (a small one, on loopback), with a LoRA or without."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moe_core import sampling, small_flux
from moe_core.config import Params, parse
from moe_core.data.embedded import captions_vocabulary
from moe_core.errors import CheckpointError, ConfigError
from tasks import given_teacher
from tasks.params import compose
from tasks.project import read_params
from tests.moe_core.tiny_pipeline import SIZES, tiny_config

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDLE = {
    "README.md": b"a card",
    "flux1-dev.safetensors": b"all weights once more",
    "ae.safetensors": b"the VAE once more",
    "text_encoder/pytorch_model.bin": b"\x80\x04a pickle",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"another precision",
    "transformer/flax_model.msgpack": b"another framework",
}
"""What lies beside a pipeline on the hub and in folders fetched from it."""
LAYER = "transformer_blocks.1.ff.net.0.proj"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the committed parameters."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "params.yaml", folder)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with its transformer in shards, and what else lies in such folders."""
    folder = tmp_path_factory.mktemp("given") / "flux"
    shape = {**SIZES["transformer"], "num_layers": 5, "num_single_layers": 12}
    pipeline = small_flux.build_pipeline(tiny_config(transformer=shape), captions_vocabulary(), 0)
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "transformer")
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="1MB")
    (folder / "LICENSE.md").write_text("a licence")
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA's folder."""
    folder = tmp_path_factory.mktemp("lora")
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 32, generator=generator), torch.randn(128, 4, generator=generator)
    names = (f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight")
    save_file(dict(zip(names, (down, up), strict=True)), folder / "change.safetensors")
    return folder


def put(project: Path, **model: Any) -> Params:
    """The project's parameters with this teacher; they are written, too."""
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["model"] |= model
    (project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return parse(Params, values)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_idle(folder: Path) -> None:
    for name, data in IDLE.items():
        (folder / name).write_bytes(data)


def quiet(done: int, of: int) -> None:
    """Nobody watches."""


def test_a_folder_is_taken_without_what_no_pipeline_loads(project: Path, given: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(given, tmp_path / "flux"))
    add_idle(source)
    told: list[tuple[int, int]] = []
    out = project / "data" / "teacher"
    assert given_teacher.write(put(project, source="folder", path=str(source)), out, lambda *at: told.append(at)) == {}
    assert contents(out) == contents(given)
    assert told[-1][0] == told[-1][1] == len(told) == len(contents(given))
    # Its own files: DVC makes those of an out read-only.
    for path in out.rglob("*.safetensors"):
        assert path.stat().st_nlink == 1


def test_links_of_the_hubs_cache_become_files(project: Path, given: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    for name in contents(given):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(given / name)
    out = project / "data" / "teacher"
    given_teacher.write(put(project, source="folder", path=str(snapshot)), out, quiet)
    assert contents(out) == contents(given)
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_a_lora_goes_into_the_transformer_and_nothing_else_changes(project: Path, given: Path, lora: Path) -> None:
    params = put(project, source="folder", path=str(given), lora={"path": str(lora), "scale": 0.125})
    out = project / "data" / "teacher"
    assert given_teacher.write(params, out, quiet) == {"lora": {"layers": 1, "scale": 0.125}}
    old, new = contents(given), contents(out)
    assert old.keys() == new.keys()
    assert len([name for name in old if old[name] != new[name]]) == 1
    before = sampling.load_transformer(given / "transformer").get_submodule(LAYER).weight
    after = sampling.load_pipeline(out).transformer.get_submodule(LAYER).weight
    down, up = load_file(lora / "change.safetensors").values()
    torch.testing.assert_close(after - before, 0.125 * up @ down, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_said_before_any_stage_runs(
    project: Path, given: Path, lora: Path, tmp_path: Path
) -> None:
    put(project, source="folder", path=str(given / "vae"))
    with pytest.raises(ConfigError, match=r"model.path is \S+/vae, but .*model_index.json does not exist"):
        read_params(project)
    put(project, path=str(given), lora={"path": str(tmp_path / "none.safetensors"), "scale": 1.0})
    with pytest.raises(ConfigError, match=r"model.lora.path is \S+none.safetensors'; there is no such file"):
        read_params(project)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["mob.levels.M.double.groups=6"],
            "mob.levels.M.double: 6 groups of 3 consecutive blocks do not fit: there is room for 5 among 19 blocks, of which [0, 1, 2] stay dense",
        ),
        (
            ["mob.levels.M.double={groups: 0, size: 0, blocks: [[2, 3]]}"],
            "mob.levels.M.double.blocks has [2, 3], but moe.dense_double_blocks keeps [0, 1, 2] dense",
        ),
        (
            ["mob.levels.M.double={groups: 0, size: 0, blocks: [[20, 21]]}"],
            "mob.levels.M.double.blocks has [20, 21], but the model's double blocks are 0 to 18",
        ),
        (["model.guidance_scale=null"], "guidance_scale is null, but guidance_embeds is true; it must be a number"),
        (["model.resolution=1000"], "model.resolution is 1000; it must be a multiple of 16"),
        (
            ["model=hyperflux", "kd=hyperflux", "model.num_inference_steps=4"],
            "kd.timesteps.steps is 8, but model.num_inference_steps is 4",
        ),
        (
            ["model=hyperflux", "kd=hyperflux", "model.resolution=512"],
            "kd.timesteps.shift is 3.15819, but the teacher's sampler shifts by 1.877611 at 512 pixels",
        ),
    ],
)
def test_what_does_not_fit_flux1_is_said_without_the_hub(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as told:
        compose(ROOT, ["experiment=flux1-moe-m", "data.path=/tars", *overrides])
    assert message.startswith(("model.", "kd.")) or str(told.value).startswith(
        "black-forest-labs/FLUX.1-dev/transformer/config.json: "
    )


def test_a_lora_in_anothers_format_is_refused_before_anything_is_written(
    project: Path, given: Path, tmp_path: Path
) -> None:
    name = "lora_unet_double_blocks_7_img_attn_proj"
    file = tmp_path / "kohya.safetensors"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 32), f"{name}.lora_up.weight": torch.zeros(32, 4)}, file)
    params = put(project, source="folder", path=str(given), lora={"path": str(file), "scale": 1.0})
    with pytest.raises(
        CheckpointError, match=r"changes transformer_blocks.7.attn.to_out.0, but the transformer has no"
    ):
        given_teacher.write(params, project / "data" / "teacher", quiet)
    assert not (project / "data").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: a repository's files, their headers, their bytes."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    gated: ClassVar[set[str]] = set()
    served: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        if name not in self.repositories:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        files = self.repositories[name]
        if api and parts[4] == "tree":
            tree = [{"type": "file", "path": file, "size": len(data), "oid": COMMIT} for file, data in files.items()]
            return self._send(200, json.dumps(tree).encode(), {}, body)
        if api:
            siblings = [{"rfilename": file} for file in files]
            return self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {}, body)
        if name in self.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        file = "/".join(parts[4:])
        if body:
            self.served.append(f"{name}/{file}")
        return self._send(200, files[file], {"ETag": f'"{abs(hash(files[file]))}"', "X-Repo-Commit": COMMIT}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(given: Path, lora: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A hub with the pipeline, the LoRA and a gated repository; its address."""

    repositories = {
        "labs/flux": {**contents(given), **IDLE},
        "labs/gated": contents(given),
        "labs/lora": {**contents(lora), "README.md": b"a card"},
    }
    own = type("Own", (Hub,), {"repositories": repositories, "gated": {"labs/gated"}, "served": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), own) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", own
        server.shutdown()


def fetch(project: Path, address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Makes data/teacher by the project's parameters, in a process of its own: the hub's client reads its address at its start."""
    code = (
        "from pathlib import Path; from tasks.project import read_params; from tasks.given_teacher import write;"
        "print(write(read_params(Path.cwd()), Path('data/teacher'), lambda done, of: None))"
    )
    environment = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(project / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    } | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_from_the_hub_only_what_is_needed_is_fetched_and_once(
    project: Path, given: Path, hub: tuple[str, type[Hub]]
) -> None:
    address, own = hub
    lora = {"path": "labs/lora", "weight_name": "change.safetensors", "scale": 0.125}
    put(project, source="hub", path="labs/flux", lora=lora)
    done = fetch(project, address)
    assert done.stdout.strip() == f"{{'revision': '{COMMIT}', 'lora': {{'layers': 1, 'scale': 0.125}}}}", done.stderr
    assert contents(project / "data" / "teacher").keys() == contents(given).keys()
    assert own.served[0] == "labs/lora/change.safetensors"
    assert sorted(own.served[1:]) == sorted(f"labs/flux/{name}" for name in contents(given))
    # What was fetched stays in the hub's cache, and nothing needs the net any more.
    put(project, lora=None)
    done = fetch(project, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert contents(project / "data" / "teacher") == contents(given)


def test_a_hub_model_that_does_not_fit_is_refused_before_its_weights_are_fetched(
    project: Path, hub: tuple[str, type[Hub]]
) -> None:
    address, own = hub
    put(project, source="hub", path="labs/flux", guidance_scale=None)
    done = fetch(project, address)
    assert "guidance_scale is null, but guidance_embeds is true" in done.stderr
    assert own.served
    assert not [name for name in own.served if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("path", "environment", "message"),
    [
        ("labs/gated", {}, "'labs/gated', which is gated: accept its licence at https://huggingface.co/labs/gated"),
        ("labs/none", {}, "'labs/none', but the hub refuses it"),
        ("not an id", {}, "'not an id', but the hub refuses it"),
        ("labs/flux", {"HF_HUB_OFFLINE": "1"}, "'labs/flux', but the hub cannot be reached and its cache lacks it"),
    ],
)
def test_what_the_hub_refuses_is_said(
    project: Path, hub: tuple[str, type[Hub]], path: str, environment: dict[str, str], message: str
) -> None:
    put(project, source="hub", path=path)
    done = fetch(project, hub[0], **environment)
    assert done.returncode
    assert f"moe_core.errors.ConfigError: model.path is the hub id {message}" in done.stderr
