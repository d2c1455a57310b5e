"""Where a model is that a run's settings name."""

from ddpm_hf.common.locations import name_from_run


def test_a_relative_name_is_found_from_any_working_directory(tmp_path, monkeypatch):
    # Breaks if a checkpoint of a run that started from `models/base` loads in one working directory only.
    (tmp_path / "work" / "models" / "base").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "work" / "runs" / "first"
    monkeypatch.chdir(tmp_path / "work")
    assert name_from_run("models/base", run) == "models/base"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert name_from_run("models/base", run) == str(tmp_path / "work/models/base")
    assert name_from_run("user/model", run) == "user/model"  # a name on the Hub
    assert name_from_run(str(tmp_path / "x"), run) == str(tmp_path / "x")
