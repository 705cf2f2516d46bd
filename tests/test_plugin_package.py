"""The third-party example as users meet it: built into a wheel, installed elsewhere, found and fitted by name."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "third_party_plugin"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin installed from its wheel; the example's own tests stand beside it."""
    root = tmp_path_factory.mktemp("plugin")
    source = root / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    build = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", root, source]
    subprocess.run(build, check=True)
    (wheel,) = root.glob("*.whl")
    site = root / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    assert sorted(p.name for p in (site / "lightning_peft_ssf").glob("*.py")) == ["__init__.py", "ssf.py"]
    return site


def python(site: Path | None, *args: object, cwd: Path | None = None) -> str:
    """What a new Python prints that has the plugin on its path."""
    env = os.environ | {"PYTHONPATH": str(site or ""), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env, cwd=cwd)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def test_the_registry_reads_and_loads_it(site: Path) -> None:
    program = """
        import sys
        from lightning_peft import registry
        info = registry.describe("ssf")
        print(info.package, info.target, info.problem, sep="|")
        print(info.traits["family"], info.traits["merge"], info.fields["std"], "torch" in sys.modules, sep="|")
        print(registry.load("ssf")(std=0.5), registry.name_of(registry.load("ssf")), sep="|")
    """
    assert python(site, "-c", textwrap.dedent(program)).splitlines() == [
        "lightning-peft-ssf 0.1.0|lightning_peft_ssf.ssf:SSF|",
        "additive|False|('float', '0.02')|False",
        "SSF(name='ssf', targets=('all-linear',), std=0.5)|ssf",
    ]


def test_the_command_lists_it_and_tells_its_options(site: Path) -> None:
    assert "ssf" not in python(None, "-m", "lightning_peft", "methods")
    line = next(x for x in python(site, "-m", "lightning_peft", "methods").splitlines() if x.split()[:1] == ["ssf"])
    assert "scales and shifts every channel" in line
    told = python(site, "-m", "lightning_peft", "methods", "ssf")
    assert "lightning-peft-ssf 0.1.0" in told and "standard deviation of gamma around 1" in told


NET = """
    import lightning as L, torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
        def training_step(self, batch, index):
            return (self.net(batch[0]) - batch[1]).square().mean()
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.01)

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            x = torch.arange(32.0).view(8, 4).sin()
            return DataLoader(TensorDataset(x, x[:, :1]), 4)
"""


def test_a_fit_and_a_load_by_its_name_in_python(site: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(textwrap.dedent(NET))
    fit = """
        import lightning as L
        from lightning_peft import PEFT
        from lightning_peft.methods import SSF
        from tiny import Data, Net
        net = Net()
        quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        peft = PEFT(SSF(targets=("0", "net.2")))
        L.Trainer(callbacks=[peft], max_steps=3, default_root_dir=".", **quiet).fit(net, Data())
        print(sorted(n for n, p in net.named_parameters() if p.requires_grad))
        print(float(net.net(Data().train_dataloader().dataset[0][0])))
    """
    load = """
        import lightning_peft
        from tiny import Data, Net
        net = lightning_peft.load(Net(), "adapter")
        print(float(net.net(Data().train_dataloader().dataset[0][0])))
    """
    *_, trained, output = python(site, "-c", textwrap.dedent(fit), cwd=tmp_path).splitlines()
    assert trained == str([f"net.{i}.adapters.ssf.{t}" for i in (0, 2) for t in ("beta", "gamma")])
    assert python(site, "-c", textwrap.dedent(load), cwd=tmp_path).splitlines()[-1] == output


CONFIG = """
    seed_everything: 1
    model: tiny.Net
    data: tiny.Data
    peft:
      methods:
        class_path: ssf
        init_args:
          std: 0.0
          targets: ["0", "2"]
    trainer:
      accelerator: cpu
      max_steps: 3
      logger: false
"""


def test_a_fit_by_its_name_on_the_command_line(site: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(textwrap.dedent(NET))
    (tmp_path / "config.yaml").write_text(textwrap.dedent(CONFIG))
    python(site, "-m", "lightning_peft", "fit", "--config", "config.yaml", cwd=tmp_path)
    (folder,) = (p.parent for p in tmp_path.rglob("adapter.safetensors"))
    program = f"""
        import lightning_peft, torch
        from lightning_peft.inject import find_record
        from tiny import Net
        net = lightning_peft.load(Net(), {str(folder)!r})
        print(find_record(net)[1].methods[0])
        start = lambda name: 1.0 if name.endswith("gamma") else 0.0
        print(max(float((p - start(n)).abs().max()) for n, p in net.named_parameters() if p.requires_grad))
    """
    method, moved = python(site, "-c", textwrap.dedent(program), cwd=tmp_path).splitlines()[-2:]
    assert method == "SSF(name='ssf', targets=('0', '2'), std=0.0)"
    assert 0.005 < float(moved) < 0.05  # three steps of AdamW at 0.01, from exactly 1 and 0


@pytest.mark.slow
def test_the_example_s_own_tests_pass(site: Path) -> None:
    told = python(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", site.parent / "source" / "tests")
    assert " passed" in told and "failed" not in told
