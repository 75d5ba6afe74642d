"""The reconstruction error by frequency band on the report page."""

import csv

from mae_et.report.band_figures import band_figures
from mae_et.report.join import make_benchmark
from mae_et.report.page import write_report
from tests.report.folders import example, pretrain


def test_band_figures__one_for_each_pretraining_and_running_run(tmp_path):
    titles = [figure.title.rsplit(": ", 1)[1] for figure in band_figures(make_benchmark([example(tmp_path)]))]
    assert sorted(titles) == ["constant_0", "etpp_0"]  # "running" has logged none yet


def test_band_figures__lines_and_numbers_are_the_logged_ones(tmp_path):
    pretrain(tmp_path / "one", epochs=4.0, seconds=100.0)
    (figure,) = band_figures(make_benchmark([tmp_path]))
    assert [one.label for one in figure.legend][::7] == ["0 to 14 px", "98 to 112 px"]
    assert figure.rows[0] == ["0 to 14 px", 2.0, 50.0, 0.6]
    assert figure.rows[-1] == ["98 to 112 px", 4.0, 100.0, 0.9]
    assert [label for label, _ in figure.variants] == ["equivalent epochs", "wall time, s"]


def test_report__shows_the_bands_and_writes_their_csv(tmp_path):
    pretrain(tmp_path / "runs" / "one")
    write_report(make_benchmark([tmp_path / "runs"]), tmp_path / "report")
    with open(tmp_path / "report" / "figures" / "bands_1.csv") as file:
        assert len(list(csv.reader(file))) == 1 + 8 * 2
    for name in ("report.html", "report.md"):
        assert "Reconstruction error by frequency band: one" in (tmp_path / "report" / name).read_text()


def test_report__without_bands_has_no_such_figure(tmp_path):
    folder = pretrain(tmp_path / "one")
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines(True) if "band" not in line]
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert not list(band_figures(make_benchmark([tmp_path])))
