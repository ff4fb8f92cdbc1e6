"""F27: runs of other versions are opened, or refused in one sentence, and left as they are.

    python tests/faults/test_versions.py

adds an interrupted run of this version to `runs/`, in a folder named after its schema: once for each schema
that is released.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.matrix import Figure, row
from faults.test_hostile import forged, newest

import downslope as ds
from downslope.errors import BadInput
from downslope.journal import read
from downslope.report import report
from downslope.train import checkpoint, plan

RUNS = Path(__file__).with_name("runs")
STEPS = 6


def begun(out: Path) -> None:
    """A training of a built-in task that was stopped after its checkpoint at step 4."""

    class Stopped(BaseException):
        pass

    def stop(self: ds.Training, *given: Any) -> None:
        if self.step == 4:
            raise Stopped
        advance(self, *given)

    advance = ds.Training.advance
    recipe = ds.Recipe(ds.chain(ds.adamw(lr=1e-3)), steps=STEPS, batch_size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ds.Training, "advance", stop)
        with pytest.raises(Stopped):
            ds.train("cancer-logistic", recipe, out=out, save_every=2, valid_every=2, quiet=True)
    for lock in out.glob("*.lock"):
        lock.unlink()


def contents(out: Path) -> dict[str, bytes]:
    """Every file but the locks, which say who looked last, and the page."""
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix not in (".lock", ".html")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@row("F27", None, every_day=True)
def test_f27_a_run_of_every_schema_is_gone_on_with_or_refused(figure: Figure, tmp_path: Path) -> None:
    for original in figure.of(sorted(RUNS.iterdir())):
        out = Path(shutil.copytree(original, tmp_path / original.name))
        schema = json.loads((newest(out) / checkpoint.MANIFEST).read_bytes())["schema"]
        assert original.name == f"schema-{schema}"
        report(out)
        if schema == checkpoint.SCHEMA:
            assert ds.resume(out, quiet=True).steps == STEPS
            (resumed,) = [event for event in read(out / "journal.jsonl") if event["kind"] == "resume"]
            assert (resumed["step"], resumed["damaged"]) == (4, [])
        else:
            with pytest.raises(
                BadInput, match=f"has schema {schema}; this version reads {checkpoint.SCHEMA}"
            ):
                ds.resume(out, quiet=True)
            assert contents(out) == contents(original)


def test_f27_this_version_has_its_run() -> None:
    assert (RUNS / f"schema-{checkpoint.SCHEMA}").is_dir(), "python tests/faults/test_versions.py"


NEWER = {
    checkpoint.MANIFEST: (checkpoint.SCHEMA + 1, r"has schema \d+; this version reads \d+"),
    "run.json": (plan.SCHEMA + 1, "was written by a newer version of downslope"),
}


@row("F27", None, every_day=True)
def test_f27_a_run_of_a_newer_version_is_refused_and_left_as_it_is(figure: Figure, tmp_path: Path) -> None:
    for name, (schema, said) in figure.of([*NEWER.items()]):
        out = tmp_path / name
        begun(out)
        path = out / name if (out / name).exists() else newest(out) / name
        data = json.dumps({**json.loads(path.read_bytes()), "schema": schema, "unknown": "to us"}).encode()
        path.write_bytes(data) if path.parent == out else forged(out, name, data)
        before = contents(out)
        with pytest.raises(BadInput, match=said) as caught:
            ds.resume(out, quiet=True)
        assert not isinstance(caught.value, checkpoint.Damaged)
        assert contents(out) == before


if __name__ == "__main__":
    begun(RUNS / f"schema-{checkpoint.SCHEMA}")
