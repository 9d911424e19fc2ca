"""`make audit` lists every package that users install with its licence, and finds one that asks for more."""

import pytest

pytest.importorskip("packaging")

from benchmarks import audit


def test_packages_and_licences(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit.main() == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for name, words in (("torch", ("fastkd",)), ("timm", ("Apache", "train")), ("sympy", ("BSD", "fastkd"))):
        assert all(word in listed[name] for word in words)
    real = audit.licence
    for text in ("GPL-3.0-only", "GNU Lesser General Public License v3 (LGPLv3)", "CC-BY-NC-4.0", ""):
        monkeypatch.setattr(audit, "licence", lambda name, text=text: text if name == "timm" else real(name))
        assert audit.main() == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("timm ")]
    assert [line.rpartition("  ")[2] for line in faults] == ["asks for more"] * 3 + ["no licence"]
