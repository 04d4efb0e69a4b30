"""The files of an input, through links."""

from megatron_r1.config.folder_files import files_of


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    shards = tmp_path / "elsewhere" / "shards"
    shards.mkdir(parents=True)
    (shards / "b.safetensors").write_text("b")
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    (model / "a.json").write_text("a")
    (model / "weights").symlink_to(shards)
    (model / "inner" / "again").symlink_to(model)
    (model / "broken").symlink_to(tmp_path / "nowhere")
    assert [str(path.relative_to(model)) for path in files_of(model)] == ["a.json", "weights/b.safetensors"]


def test_a_file_is_itself_and_nothing_is_nothing(tmp_path):
    (tmp_path / "one").write_text("1")
    assert files_of(tmp_path / "one") == [tmp_path / "one"]
    assert files_of(tmp_path / "none") == []
