"""Files are whole or not there."""

import pytest

from training.config import UserError
from training.files import written_whole


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
