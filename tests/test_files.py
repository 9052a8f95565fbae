"""Files are whole or not there."""

import pytest

from training.config import UserError
from training.files import unwritable, written_whole


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new" / "table.csv"
    for content in ("old", "new"):
        with written_whole(path) as partial:
            partial.write_text(content)
            assert partial.suffix == ".csv" and (content == "old" or path.read_text() == "old")
        assert path.read_text() == content


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "table.csv"
    with written_whole(path) as one, written_whole(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_is_there_and_no_other(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    full = OSError(28, "No space left on device")
    for error, raised in ((full, UserError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(raised) as caught, written_whole(path) as partial:
            partial.write_text("half")
            raise error
        assert raised is KeyboardInterrupt or "table.csv cannot be written (No space left" in str(caught.value)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "table.csv"
    with (
        pytest.raises(UserError, match=r"table\.csv cannot be written .*name another folder"),
        written_whole(path) as part,
    ):
        part.write_text("")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("benchmarks/scaling.py", ["--output-dir", "file"]),  # would measure for minutes first
        ("benchmarks/pruning_curve.py", ["--run", "nowhere", "--output-dir", "file/new"]),
        ("tools/show_augmentations.py", ["--output-dir", "file"]),
        ("tools/make_clips.py", ["--images", "nowhere", "--output", "file/new"]),
        ("analysis/compare.py", ["--default", "v2", "--output", "file/new"]),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(script, flags, tmp_path, call_script, capsys):
    (tmp_path / "file").write_text("mine")
    assert call_script(script, *flags) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --output") and f"cannot be written ({tmp_path / 'file'} is a file)" in said
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: False)
    assert unwritable(tmp_path / "new" / "folder") == f"no permission to write to {tmp_path}"
