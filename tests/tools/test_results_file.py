from results_file import markdown_table, mean_and_spread, write_section


def test_numbers_and_tables(tmp_path):
    assert mean_and_spread([1.0, 2.0, 3.0, None]) == "2.0 ± 1.0"
    assert mean_and_spread([4.25]) == "4.2" and mean_and_spread([None]) == "-"
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    path = tmp_path / "R.md"
    write_section(path, "one", "first")
    write_section(path, "two", "second")
    write_section(path, "one", "changed")
    text = path.read_text()
    assert text.startswith("# Results\n") and "first" not in text
    assert text.index("changed") < text.index("second") and text.count("begin one") == 1
